"""The contract of `aem_exp.envs`, held by every world in `conf/env/` that this version can run."""

import hashlib
import os
import subprocess
import sys
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

from aem_exp.config import conf_root, instantiate, load, targets
from aem_exp.core.errors import ConfigError
from aem_exp.envs import Turn
from aem_exp.envs.alfworld.library import PACKAGES as ALFWORLD
from aem_exp.envs.webshop import generated

NAMES = sorted(path.stem for path in (conf_root() / "env").glob("*.yaml"))
SMALL = {
    "alfworld": {"games": None},
    "webshop": {"nouns": "words"},
    "swe": {"turns": 100},  # or nonsense would be graded, again and again
}  # official layout, small sets made here: see `data`
TURNS = 60  # more than any scripted player needs
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
    """Official data in small, where this machine can make and play it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AEM_CACHE", str(common / "cache"))
        patch.setenv("ALFWORLD_DATA", str(common / "alfworld"))
        with FileLock(common / "data.lock"):
            if all(map(find_spec, ALFWORLD)) and not (common / "alfworld").exists():
                write_official_files(common / "alfworld")
            patch.setenv("WEBSHOP_DATA", str(generated.generate_catalogue(400, 0)))
        yield


@pytest.fixture(scope="module", autouse=True)
def server():
    """What env=openenv talks to."""
    if not find_spec("openenv"):
        yield
        return
    running = OpenEnvServer()
    SMALL["openenv"] = {"base_url": running.url, "actions": ACTIONS}
    yield
    running.stop()


@cache
def world(name):
    """The world as configured, made once; or why this machine cannot make it."""
    experiment(name)  # which must load, whatever is missing here
    try:
        return make(name)
    except ConfigError as error:
        return str(error)


@pytest.fixture
def ready(name):
    if name == "swebench":
        pytest.skip("its images are other people's; test_swe.py plays it on one that is made there")
    made = world(name)
    if isinstance(made, str):
        skip_or_fail(made)
    return made


def some(made, tasks):
    """How many tasks to play: fewer, where scoring an episode is slow."""
    return max(2, tasks // 5) if hasattr(made, "rehearse") else tasks


def moves(made, env, turn, random):
    """A response that goes somewhere: the scripted player's, else any admissible action."""
    if hasattr(made, "expert"):
        return made.expert(env, random)
    return random.choice(turn.actions or ("",))


def play(made, env, task, wandering=0.0):
    """An episode of (response, turn) pairs, the first without a response."""
    random = Random(task.id)
    turns = [("", env.reset(task))]
    while not turns[-1][1].done and len(turns) <= TURNS:
        last = turns[-1][1]
        wander = last.actions and random.random() < wandering
        response = random.choice(last.actions) if wander else moves(made, env, last, random)
        turns.append((response, env.step(response)))
    return turns


def check_types(turn):
    assert isinstance(turn, Turn)
    assert isinstance(turn.observation, str)
    assert isinstance(turn.reward, int | float)
    assert {type(flag) for flag in (turn.terminated, turn.truncated, turn.valid)} == {bool}
    assert turn.actions is None or (isinstance(turn.actions, tuple) and all(isinstance(a, str) for a in turn.actions))
    assert all(isinstance(key, str) and isinstance(value, int | float) for key, value in turn.metrics.items())


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
        assert tasks[0] == others[0]  # asked for again


def record(made):
    """The dev tasks and a few episodes, as a hash."""
    tasks = [*made.tasks("dev")]
    played = [play(made, made.env(), task, wandering=0.3) for task in tasks[: some(made, 8)]]
    return [made.fingerprint, hashlib.sha256(repr([tasks, played]).encode()).hexdigest()]


@every_world
def test_another_process_plays_the_same(name, ready):
    """Neither tasks nor turns, nor a scripted player's choices, follow from the salt of Python's hashes."""
    code = f"import test_worlds as t; t.SMALL = {SMALL!r}; print(*t.record(t.world({name!r})))"
    others = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": salt},
            cwd=TESTS,
        )
        for salt in ("1", "2")
    ]
    assert [other.stdout.split() for other in others] == [record(ready)] * 2, others[0].stderr


@every_world
def test_every_task_has_its_own_id(name, ready):
    ids = {split: [task.id for task in ready.tasks(split)] for split in ready.splits}
    assert all(
        len(ids[split]) == len(ready.tasks(split)) for split in ready.splits
    )  # iteration ends no sooner than len says
    everything = [one for split in ready.splits for one in ids[split]]
    assert len(set(everything)) == len(everything)


@every_world
def test_turns_are_what_the_contract_says(name, ready):
    env = ready.env()
    for task in ready.tasks("dev")[: some(ready, 10)]:
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


@every_world
def test_the_same_actions_meet_the_same_turns(name, ready):
    """In another environment, and in one that has played something else: members of a group play the very same game."""
    tasks = ready.tasks("train")
    used = ready.env()
    for task, before in zip(tasks[: some(ready, 5)], tasks[5:10], strict=False):
        env = ready.env()
        played = play(ready, env, task, wandering=0.5)
        play(ready, used, before)
        again = [used.reset(task)]
        assert used.goal == env.goal
        again += [used.step(response) for response, _ in played[1:]]
        assert again == [turn for _, turn in played]


@every_world
def test_environments_do_not_share_anything(name, ready):
    one, two = ready.env(), ready.env()
    first, second = ready.tasks("dev")[:2]
    alone = play(ready, ready.env(), first)
    turns = [one.reset(first)]
    two.reset(second)
    for response, _ in alone[1:]:
        turns.append(one.step(response))
        two.step(response)
    assert turns == [turn for _, turn in alone]


@cache
def standing(name):
    """An environment to be talked to, and what it last said."""
    env = world(name).env()
    return env, [env.reset(world(name).tasks("dev")[0])]


@every_world
@settings(deadline=None, max_examples=60, derandomize=True)
@given(response=st.one_of(st.text(max_size=300), st.from_regex(r"(</?(think|action|tool_call)>|[a-z \d]|\n){0,40}")))
def test_nonsense_is_answered(name, response):
    if isinstance(world(name), str):
        pytest.skip(world(name))
    answer_nonsense(name, response)


@every_world
def test_notorious_nonsense_is_answered(name, ready):
    for response in NONSENSE:
        answer_nonsense(name, response)


def answer_nonsense(name, response):
    """It has a reading, wins nothing, ends nothing by winning, and is invalid or nothing that one could do here."""
    env, turns = standing(name)
    action = env.parse(response)
    assert isinstance(action, str)
    assert env.parse(response) == action
    before = turns[-1]
    after = env.step(response)
    check_types(after)
    if before.actions is None:
        assert not after.valid
    else:
        assert not after.valid or action not in before.actions
    assert after.reward <= 0
    assert after.metrics["won"] == 0
    turns[:] = [env.reset(world(name).tasks("dev")[0]) if after.done else after]


@every_world
def test_a_fingerprint_tells_worlds_apart(name, ready):
    """Every number, switch and choice, and every list made shorter, is part of how the world plays."""
    seen = {ready.fingerprint}
    told = 1
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
        except ConfigError:  # this one cannot be changed alone
            continue
        told += 1
    assert told > 1
    assert len(seen) == told


@every_world
def test_who_knows_the_answer_wins(name, ready):
    if not hasattr(ready, "expert"):
        pytest.skip("no player who would get there")
    env = ready.env()
    for task in ready.tasks(ready.splits[-1])[: some(ready, 20)]:
        turns, random = [env.reset(task)], Random(task.id)
        while not turns[-1].done and len(turns) <= TURNS:
            answer = ready.oracle(env) if hasattr(ready, "oracle") else ready.expert(env, random)
            turns.append(env.step(answer))
        last = turns[-1]
        assert last.terminated
        assert last.metrics["won"] == 1
        assert last.reward > 0
    env.close()
