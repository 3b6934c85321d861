"""Every world in `conf/env/` keeps the contract of `aem_exp.envs`, and so does the example in its docstring."""

import hashlib
import os
import re
import subprocess
import sys
import textwrap
from functools import cache
from importlib.util import find_spec
from random import Random
from typing import Literal, get_args, get_origin

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TESTS
from support.alfworld_files import write_official_files
from support.openenv_service import ACTIONS, OpenEnvServer
from support.runs import skip_or_fail

from aem_exp import envs
from aem_exp.config import conf_root, instantiate, load, targets
from aem_exp.core.errors import ConfigError
from aem_exp.envs import Turn
from aem_exp.envs.alfworld.library import PACKAGES as ALFWORLD
from aem_exp.envs.bfcl.wheel import fetch_wheel
from aem_exp.envs.webshop import generated
from aem_exp.jobs import preflight

NAMES = sorted(path.stem for path in (conf_root() / "env").glob("*.yaml"))
SMALL = {
    "alfworld": {"games": None},
    "scienceworld": {"tasks": "short"},
    "webshop": {"nouns": "words"},
    "swe": {"turns": 100},  # with fewer turns, nonsense responses would be graded again and again
}  # changed keywords of `make`; the fixture `data` generates small data sets in the official layout
TURNS = 60  # more than any expert needs
NONSENSE = (
    "",
    " \n\t",
    "xyzzy",
    "x" * 100_000,
    "<" * 100_000,
    "\x00\ufffd\u202e",
    "去冰箱 🧊 İstanbul ﬁ",
    "<action>",
    "</action><action>",
    "<think></think>",
    "<action>xyzzy</action><action>xyzzy</action>",
    "<think>a</think><think>b</think><action>xyzzy</action><action>plugh</action>",
    "<think>" * 1000 + "<action>" * 1000,
    "{observation} {0} %s \\1",
)
every_world = pytest.mark.parametrize("name", NAMES)


@cache
def experiment(name):
    return load([f"env={name}"])


def make(name, **changes):
    return instantiate(experiment(name).env.make | SMALL.get(name, {}) | changes)


@pytest.fixture(scope="module", autouse=True)
def data(common):
    """Small data sets in the official layout, if this machine can make and play them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AEM_CACHE", str(common / "cache"))
        patch.setenv("ALFWORLD_DATA", str(common / "alfworld"))
        with FileLock(common / "bfcl.lock"):
            fetch_wheel(None, lambda line: None)
        with FileLock(common / "data.lock"):
            if all(map(find_spec, ALFWORLD)) and not (common / "alfworld").exists():
                write_official_files(common / "alfworld")
            patch.setenv("WEBSHOP_DATA", str(generated.generate_catalogue(400, 0)))
        yield


@pytest.fixture(scope="module", autouse=True)
def server():
    """The server for env=openenv."""
    if not find_spec("openenv"):
        yield
        return
    running = OpenEnvServer()
    SMALL["openenv"] = {"base_url": running.url, "actions": ACTIONS}
    yield
    running.stop()


@cache
def world(name):
    """The configured world, made once; or the error, if this machine cannot make it."""
    experiment(name)  # must load even if this machine lacks something
    try:
        return make(name)
    except ConfigError as error:
        return str(error)


@pytest.fixture
def ready(name):
    if name == "swebench":
        pytest.skip("needs downloaded images; test_swe.py plays it on a generated image")
    made = world(name)
    if isinstance(made, str):
        skip_or_fail(made)
    return made


def task_count(made, tasks):
    """The number of tasks to play: fewer if an episode is slow."""
    slow = hasattr(made, "rehearse") or made.fingerprint.startswith("scienceworld")
    return max(2, tasks // 5) if slow else tasks


def sensible_response(made, env, turn, random):
    """The response of the expert or the oracle, else any admissible action."""
    if hasattr(made, "expert"):
        return made.expert(env, random)
    if hasattr(made, "oracle"):
        return made.oracle(env)
    return random.choice(turn.actions or ("",))


def play(made, env, task, wandering=0.0):
    """An episode as (response, turn) pairs; the first response is empty. `wandering` is the share of random actions."""
    random = Random(task.id)
    turns = [("", env.reset(task))]
    while not turns[-1][1].done and len(turns) <= TURNS:
        last = turns[-1][1]
        wander = last.actions and random.random() < wandering
        response = random.choice(last.actions) if wander else sensible_response(made, env, last, random)
        turns.append((response, env.step(response)))
    return turns


def check_types(turn):
    assert isinstance(turn, Turn)
    assert isinstance(turn.observation, str)
    assert isinstance(turn.reward, int | float)
    assert {type(flag) for flag in (turn.terminated, turn.truncated, turn.valid)} == {bool}
    assert turn.actions is None or (isinstance(turn.actions, tuple) and all(isinstance(a, str) for a in turn.actions))
    assert all(isinstance(key, str) and isinstance(value, int | float) for key, value in turn.metrics.items())


@pytest.mark.slow
@every_world
def test_two_instances_have_the_same_tasks(name, ready):
    other = make(name)
    assert other.fingerprint == ready.fingerprint
    assert ready.splits[0] == "train"
    for split in ready.splits:
        tasks, others = ready.tasks(split), other.tasks(split)
        assert len(tasks) == len(others) > 0
        count = min(len(tasks), 200)
        assert [tasks[i] for i in range(count)] == [others[i] for i in range(count)]
        assert tasks[0] == others[0]  # a second access gives the same task


def record(made):
    """The fingerprint, and a hash of the dev tasks and a few episodes."""
    tasks = [*made.tasks("dev")]
    played = [play(made, made.env(), task, wandering=0.3) for task in tasks[: task_count(made, 8)]]
    return [made.fingerprint, hashlib.sha256(repr([tasks, played]).encode()).hexdigest()]


@pytest.mark.slow
@every_world
def test_another_process_plays_the_same(name, ready):
    """Tasks, turns and the expert's choices do not depend on the seed of Python's hashes."""
    code = f"import envs.test_contract as t; t.SMALL = {SMALL!r}; print(*t.record(t.world({name!r})))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}  # this process has a random one
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=TESTS)
    assert other.stdout.split() == record(ready), other.stderr


@pytest.mark.slow
@every_world
def test_every_task_has_its_own_id(name, ready):
    ids = {split: [task.id for task in ready.tasks(split)] for split in ready.splits}
    assert all(len(ids[split]) == len(ready.tasks(split)) for split in ready.splits)  # iteration gives all tasks
    all_ids = [one for split in ready.splits for one in ids[split]]
    assert len(set(all_ids)) == len(all_ids)


@pytest.mark.slow
@every_world
def test_turns_keep_the_contract(name, ready):
    env = ready.env()
    for task in ready.tasks("dev")[: task_count(ready, 10)]:
        turns = [turn for _, turn in play(ready, env, task, wandering=0.5)]
        assert isinstance(env.goal, str)
        assert env.goal.strip()
        for turn in turns:
            check_types(turn)
        first, *rest = turns
        assert (first.reward, first.done, first.valid) == (0.0, False, True)
        assert first.metrics.get("won", 0) == 0
        assert rest
        assert all(turn.metrics["won"] in (0, 1) for turn in rest)
        assert not any(turn.done for turn in rest[:-1])
    assert env.close() is None


@pytest.mark.slow
@every_world
def test_the_same_actions_give_the_same_turns(name, ready):
    """Members of a group play the same game, also in an environment that has played another task before."""
    tasks = ready.tasks("train")
    used = ready.env()
    for task, before in zip(tasks[: task_count(ready, 5)], tasks[5:10], strict=False):
        env = ready.env()
        played = play(ready, env, task, wandering=0.5)
        play(ready, used, before)
        again = [used.reset(task)]
        assert used.goal == env.goal
        again += [used.step(response) for response, _ in played[1:]]
        assert again == [turn for _, turn in played]


@pytest.mark.slow
@every_world
@pytest.mark.parametrize("other", [0, 1], ids=["same_task", "another_task"])
def test_environments_share_no_state(name, ready, other):
    """Two open episodes do not change each other, even if both play the same task, as the members of a group do."""
    one, two = ready.env(), ready.env()
    tasks = ready.tasks("dev")
    alone = play(ready, ready.env(), tasks[0])
    turns = [one.reset(tasks[0])]
    two.reset(tasks[other])
    for response, _ in alone[1:]:
        two.step(response)
        turns.append(one.step(response))
    assert turns == [turn for _, turn in alone]


@cache
def open_episode(name):
    """An environment with an open episode, and its last turn in a list."""
    env = world(name).env()
    return env, [env.reset(world(name).tasks("dev")[0])]


@pytest.mark.slow
@every_world
@settings(max_examples=60, derandomize=True)
@given(response=st.one_of(st.text(max_size=300), st.from_regex(r"(</?(think|action|tool_call)>|[a-z \d]|\n){0,40}")))
def test_random_text_is_invalid_or_not_admissible(name, response):
    if isinstance(world(name), str):
        pytest.skip(world(name))
    check_nonsense(name, response)


@pytest.mark.slow
@every_world
def test_malformed_responses_are_invalid_or_not_admissible(name, ready):
    for response in NONSENSE:
        check_nonsense(name, response)


def check_nonsense(name, response):
    """A nonsense response can be parsed, is invalid or not admissible, and earns nothing."""
    env, turns = open_episode(name)
    action = env.parse(response)
    assert isinstance(action, str)
    assert env.parse(response) == action
    before = turns[-1]
    after = env.step(response)
    check_types(after)
    if before.actions is None:
        assert not after.valid or after.metrics.get("admissible") == 0
    else:
        assert not after.valid or action not in before.actions
    assert after.reward <= 0
    assert after.metrics["won"] == 0
    turns[:] = [env.reset(world(name).tasks("dev")[0]) if after.done else after]


@every_world
def test_the_fingerprint_depends_on_every_keyword(name, ready):
    """A changed number, switch or choice, and a shorter list, each give another fingerprint."""
    seen = {ready.fingerprint}
    count = 1
    block = experiment(name).env.make | SMALL.get(name, {})
    hints = targets._read_signature("env.make", block["_target_"]).hints
    for key, value in block.items():
        if isinstance(value, list) and len(value) > 1:
            changed = value[:-1]
        elif isinstance(value, bool):
            changed = not value
        elif isinstance(value, int | float):
            changed = value + 1
        elif get_origin(hints.get(key)) is Literal:
            changed = next(choice for choice in get_args(hints[key]) if choice != value)
        else:
            continue
        try:
            seen.add(make(name, **{key: changed}).fingerprint)
        except ConfigError:  # this keyword cannot be changed alone
            continue
        count += 1
    assert count > 1
    assert len(seen) == count


@pytest.mark.slow
@every_world
def test_the_oracle_or_the_expert_wins(name, ready):
    if not hasattr(ready, "expert"):
        pytest.skip("this world has no expert")
    env = ready.env()
    for task in ready.tasks(ready.splits[-1])[: task_count(ready, 20)]:
        turns, random = [env.reset(task)], Random(task.id)
        while not turns[-1].done and len(turns) <= TURNS:
            answer = ready.oracle(env) if hasattr(ready, "oracle") else ready.expert(env, random)
            turns.append(env.step(answer))
        last = turns[-1]
        assert last.terminated
        assert last.metrics["won"] == 1
        assert last.reward > 0
    env.close()


def test_the_example_in_the_docstring_runs(tmp_path, monkeypatch):
    """Its module and its YAML, as printed."""
    code, yaml = re.search(
        r"guess\.py`:\n\n(.*?)\n\nIts config[^\n]*:\n\n(.*?)\n\nBefore", envs.__doc__, re.DOTALL
    ).groups()
    (tmp_path / "guess.py").write_text(textwrap.dedent(code))
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "guess.yaml").write_text(textwrap.dedent(yaml))
    monkeypatch.syspath_prepend(tmp_path)
    made = preflight.open_checked_world(load(["env=guess", "model.make=null", "model.path=a/b"], tmp_path))
    env = made.env()
    env.reset(made.tasks("dev")[0])
    assert not env.step("no idea").valid
    turns = [env.step(f" {number} ") for number in range(1, 9)]
    assert [turn.metrics["won"] for turn in turns].count(1.0) == 1
    first_win = next(i for i, turn in enumerate(turns) if turn.done)
    assert [turn.observation for turn in turns] == ["higher"] * first_win + ["right"] + ["lower"] * (7 - first_win)
