"""User-defined worlds, advantage functions and schedules are tried before a run; errors name file and line."""

import logging
import threading

import pytest
from support.runs import DEADLINE

from aem_exp.__main__ import main
from aem_exp.config import load
from aem_exp.core import user_code
from aem_exp.core.errors import ConfigError
from aem_exp.jobs import function_check, preflight, world_check

MODULE = '''
import itertools, sqlite3, threading
from random import Random
import numpy, torch
from aem_exp.envs import LazyTasks, Task, Turn

class Env:
    """Guess a number that follows from the seed of the task. All games begin with the same observation."""
    goal = "guess"
    def __init__(self, most): self.most = most
    def parse(self, response): return response.strip()
    def reset(self, task):
        self.number = Random(task.seed).randint(1, self.most)
        return Turn("guess", metrics={"won": 0.0})
    def step(self, response):
        won = response.strip() == str(self.number)
        return Turn("no", float(won), terminated=won, metrics={"won": float(won)})
    def close(self): pass

class World:
    fingerprint, splits, kind = "guess-1", ("train", "dev", "test"), Env
    first = {"train": 0, "dev": 1000, "test": 2000}
    def __init__(self, most=9): self.most = most
    def tasks(self, split): return LazyTasks(100, lambda i: Task(f"{split}-{i}", seed=self.first[split] + i))
    def env(self): return self.kind(self.most)
    def words(self): return ["guess", "no", *map(str, range(10))]
    def expert(self, env, random, noise=0.0, shyness=0.0): return str(env.number)

class Boom(World):
    class kind(Env):
        def reset(self, task): raise RuntimeError("boom")  # here: Boom
class StepBooms(World):
    class kind(Env):
        def step(self, response): return {}["missing"]  # here: StepBooms
class SaysText(World):
    class kind(Env):
        def step(self, response): return "a text"  # here: SaysText
class NoGoal(World):
    class kind(Env):
        goal = 7
class Words(World):
    class kind(Env):
        def step(self, response): return Turn("no", metrics={"won": "yes"})  # here: Words
class Silent(World):
    class kind(Env):
        def step(self, response): return Turn("no", 1.0, terminated=True)
class Percent(World):
    class kind(Env):
        def step(self, response): return Turn("no", 1.0, terminated=True, metrics={"won": 100.0})
class NoClose(World):
    def env(self): return type("Half", (), dict.fromkeys(("reset", "step", "parse"), print))()
class OneForAll(World):
    one = Env(9)
    def env(self): return self.one  # here: OneForAll
class Listed(World):
    tasks = ["a", "b"]
class Property(World):
    @property
    def fingerprint(self): raise KeyError("no version")  # here: Property
class NumpyFlag(World):
    class kind(Env):
        def step(self, response): return Turn("no", terminated=numpy.bool_(True), metrics={"won": 1.0})  # here: NumpyFlag
class Dice(World):
    class kind(Env):
        def reset(self, task): return super().reset(task) and Turn(f"guess {next(throws)}")
throws = itertools.count()
made = World()
class NoEnv(World):
    def env(self): raise OSError("no such board")  # here: NoEnv
class Mute(World):
    def expert(self, env, random, noise=0.0, shyness=0.0): return None  # here: Mute
class Narrow(World):
    def expert(self, env, random): return "1"
class NumberWords(World):
    def words(self): return [1, 2]
class OneText(World):
    def words(self): return "guess no"
class Broken(World):
    def __init__(self, most=9): self.most = most + 1  # here: Broken
class Stream(World):
    def tasks(self, split): return (Task(f"{split}-{i}", seed=i) for i in range(9))
class Dicts(World):
    def tasks(self, split): return [{"id": i} for i in range(99)]
class NumberIds(World):
    def tasks(self, split): return [Task(i, seed=self.first[split] + i) for i in range(99)]
class OddPayload(World):
    def tasks(self, split): return [Task(f"{split}-{i}", self.first[split] + i, payload={"at": (1, 2)}) for i in range(99)]
class NoDev(World):
    splits = ("train",)
class NoTest(World):
    def tasks(self, split): return super().tasks({"train": "train", "dev": "dev"}[split])  # here: NoTest
class Nothing(World):
    splits = None
class Unicode(World):
    class kind(Env):
        goal = "rate eine Zahl 🧊"
        def reset(self, task): return super().reset(task) and Turn("去冰箱 İstanbul 🧊")
class Surrogate(World):
    class kind(Env):
        def reset(self, task): return Turn("\\ud800")  # here: Surrogate
class Endless(World):
    class kind(Env):
        def step(self, response): return Turn("no", metrics={"won": 0.0})
class Sleeps(World):
    gate = threading.Event()  # never set
    class kind(Env):
        def reset(self, task): World.asked.set(); Sleeps.gate.wait()
World.asked = threading.Event()
class Jvm(World):
    external = True
    class kind(Env):
        def reset(self, task): raise AssertionError("it was started")
class Chooses(World):
    class kind(Env):
        def reset(self, task): return Turn("choose", actions=("left", "right"))
        def step(self, response):
            assert response in ("left", "right"), response
            return Turn("no", actions=("left", "right"), metrics={"won": 0.0})
    expert = words = property()  # hasattr says no
class Base(World):
    """Its database may be used by the thread that opened it alone: as in a run, where that is the main one."""
    def __init__(self, most=9): self.base, self.most = sqlite3.connect(":memory:"), most
    class kind(Env): pass
    def env(self):
        self.base.execute("select 1")
        return super().env()

def fine(played, scale: float = 1.0): return scale * played.score_R
def a_float(played): return 1.0  # here: a_float
def too_few(played): return played.return_M
def not_a_number(played): return played.score_R / (played.score_R * 0)
def raises(played): return played.score_R @ torch.zeros(3, 3)  # here: raises
def stuck(played): threading.Event().wait()
def whole(played): return played.score_R.long()
def complex_(played): return played.score_R * 1j
def divides(played):
    group = played.return_M.view(-1, 8)
    mean, std = group.mean(1, keepdim=True), group.std(1, keepdim=True)
    return ((group - mean) / std).flatten()[played.trajectory_R]

class Steady:
    def __call__(self, progress): return 0.5
class Texts:
    def __call__(self, progress): return "half"  # here: Texts
class Ends:
    def __call__(self, progress): return 1 / (1 - progress)  # here: Ends
class Infinite:
    def __call__(self, progress): return float("inf")
class NoSchedule:
    def __init__(self, value): self.value = value
class Nested:
    def __init__(self, value): raise ValueError("no such value")  # here: Nested
'''
YAML = """
name: {name}
make: {{_target_: someones_parts.{name}}}
history: full
max_turns: 3
response_tokens: 4
context_tokens: 64
prompt: {{first: "{{observation}}", next: "{{observation}}"}}
"""
FOLDER = ["model.make=null", "model.path=a/b"]


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "env").mkdir()
    (folder / "someones_parts.py").write_text(MODULE)
    for line in MODULE.splitlines():
        if line.startswith("class "):
            name = line.split()[1].rstrip(":").partition("(")[0]
            (folder / "env" / f"{name}.yaml").write_text(YAML.format(name=name))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("AEM_CACHE", str(folder / "cache"))
        patch.setenv("AEM_OUTPUTS", str(folder / "outputs"))
        patch.setattr(user_code, "CHECK_SECONDS", DEADLINE)
        patch.setattr(world_check, "COMPARE_SECONDS", DEADLINE)
        yield folder


def at(mine, mark):
    """The location of a line of the module, as error messages show it."""
    number = next(i for i, line in enumerate(MODULE.splitlines(), start=1) if line.endswith(f"# here: {mark}"))
    return f"({mine / 'someones_parts.py'}, line {number})"


def refused(mine, *words):
    with pytest.raises(ConfigError) as caught:
        preflight.open_checked_world(load([*words], mine))
    said = str(caught.value)
    assert "\n" not in said
    return said


def check_sentence(mine, said, field, name, fact):
    """The error names the field, the fact and, if the module marks it, the line of the user's code."""
    assert said.startswith(f"{field}=someones_parts.{name}: ")
    assert fact in said
    if f"# here: {name}\n" in MODULE:
        assert said.endswith(at(mine, name))


WRONG = {
    "Boom": "reset failed: RuntimeError: boom",
    "StepBooms": "step failed: KeyError: 'missing'",
    "SaysText": "step must return a Turn, not str",
    "NoGoal": "goal must be a str, not int",
    "Words": "Turn.metrics['won'] must be a finite number, not 'yes'",
    "Silent": "no turn has metrics['won']",
    "Percent": "metrics['won'] must be 0.0 or 1.0, not 100.0",
    "NoClose": "without the method close",
    "OneForAll": "env() must make a new environment for each call",
    "Listed": "tasks must be a method",
    "Property": "fingerprint failed: KeyError: 'no version'",
    "NumpyFlag": "Turn.terminated must be a bool, not numpy.bool",
    "NoEnv": "env() failed: OSError: no such board",
    "Mute": "the result of expert() must be a str, not NoneType",
    "Narrow": "expert() failed: TypeError",
    "NumberWords": "words() must return a list of words, but it contains 1",
    "OneText": "words() must return a list of words, not one text",
    "Stream": "aem_exp.envs.LazyTasks, not a generator",
    "Dicts": "aem_exp.envs.Task, not dict",
    "NumberIds": "tasks('dev'): the id of a task must be a str, not int",
    "OddPayload": "tasks('dev'): Task.payload",
    "NoTest": "tasks('test') failed: KeyError: 'test'",
    "Nothing": "splits a tuple of names",
    "Surrogate": "surrogates not allowed",
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_world_is_refused(mine, name):
    said = refused(mine, f"env={name}")
    check_sentence(mine, said, "env.make._target_", name, WRONG[name])


def test_invalid_keywords_of_a_world_are_refused(mine):
    said = refused(mine, "env=Broken", "+env.make.most=abc")
    assert said.startswith("env.make._target_=someones_parts.Broken: making it failed: TypeError: ")
    assert said.endswith(at(mine, "Broken"))
    said = refused(mine, "env=World", "+env.make.most=abc")  # fails only during an episode
    assert "reset failed: TypeError: " in said


def test_task_that_changes_when_replayed_gives_a_warning(mine, caplog):
    with caplog.at_level(logging.INFO):
        assert preflight.open_checked_world(load(["env=Dice"], mine))
    assert "env Dice: task train-0 was a different game" in caplog.text


def test_target_that_is_an_instance_is_refused(mine):
    said = refused(mine, "env=World", "env.make._target_=someones_parts.made")
    assert "someones_parts.made: must be a class or a function" in said


def test_world_without_held_out_panels_is_refused(mine):
    assert "such as dev and test" in refused(mine, "env=NoDev")


@pytest.mark.parametrize("name", ["World", "Unicode", "Endless", "Base"])
def test_valid_world_passes(mine, name, caplog):
    with caplog.at_level(logging.INFO):
        assert preflight.open_checked_world(load([f"env={name}"], mine)).fingerprint == "guess-1"
    assert not caplog.records


def test_without_an_expert_random_actions_are_played(mine):
    assert preflight.open_checked_world(load(["env=Chooses", *FOLDER], mine))


def test_hung_world_is_skipped(mine, caplog, monkeypatch):
    monkeypatch.setattr(user_code, "CHECK_SECONDS", 0.2)
    with caplog.at_level(logging.INFO):
        world = preflight.open_checked_world(load(["env=Sleeps"], mine))
    assert world.asked.wait(DEADLINE)
    assert "env Sleeps: two episodes took more than 0.2 s" in caplog.text
    stuck = [thread for thread in threading.enumerate() if thread.name == user_code.THREAD_NAME]
    assert stuck and all(thread.daemon for thread in stuck)
    world.gate.set()


def test_worlds_that_start_programs_are_not_tried(mine, caplog):
    with caplog.at_level(logging.INFO):
        assert preflight.open_checked_world(load(["env=Jvm"], mine))
    assert "env Jvm: not tried before the run" in caplog.text


ADVANTAGES = {
    "a_float": "must return a tensor of one advantage per response, not float",
    "too_few": "returned advantages of shape (64,) for ",
    "not_a_number": "advantages that are not finite",
    "raises": "failed: RuntimeError: ",
    "complex_": "must return real numbers, not complex128",
    "divides": "advantages that are not finite",
}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_invalid_advantage_function_is_refused(mine, name):
    said = refused(mine, f"baseline.advantage={{_target_: someones_parts.{name}}}")
    check_sentence(mine, said, "baseline.advantage._target_", name, ADVANTAGES[name])


@pytest.mark.parametrize(
    "words",
    [
        ["baseline.advantage={_target_: someones_parts.fine, scale: 2.0}"],
        ["baseline.advantage={_target_: someones_parts.whole}"],
        [
            "baseline.advantage={_target_: someones_parts.divides}",
            "trainer.drop_equal=true",
        ],  # equal groups are dropped
        ["modulation.lam={_target_: someones_parts.Steady}"],
    ],
)
def test_valid_functions_pass(mine, words):
    assert preflight.open_checked_world(load(words, mine))


def test_hung_advantage_function_is_skipped(mine, caplog, monkeypatch):
    monkeypatch.setattr(user_code, "CHECK_SECONDS", 0.2)
    function_check.check_functions(load(["baseline.advantage={_target_: someones_parts.stuck}"], mine))
    assert "someones_parts.stuck: took more than 0.2 s" in caplog.text


SCHEDULES = {
    "Texts": "must return a finite number, not 'half' at progress 0",
    "Ends": "progress 1 failed: ZeroDivisionError: float division by zero",
    "Infinite": "must return a finite number, not inf at progress 0",
    "NoSchedule": "must make a schedule",
    "Nested": "making it failed: ValueError: no such value",
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_invalid_schedule_is_refused(mine, name):
    value = ", value: 1" if name.startswith("N") else ""
    said = refused(mine, f"modulation.lam={{_target_: someones_parts.{name}{value}}}")
    check_sentence(mine, said, "modulation.lam._target_", name, SCHEDULES[name])


def test_run_and_plan_report_the_same_error(mine, capsys):
    for words in (["env=Boom"], ["env=Boom", "plan=true"]):
        assert main([*words, "--config-dir", str(mine)]) == 2
        said = capsys.readouterr().err
        assert said == f"aem_exp: env.make._target_=someones_parts.Boom: {WRONG['Boom']} {at(mine, 'Boom')}\n"
    assert main(["env=Boom", "--config-dir", str(mine), "--cfg", "job"]) == 0  # --cfg plays no episode


def test_submission_checks_the_functions_of_every_experiment(mine):
    from aem_exp.jobs import dispatch

    first, second = load([], mine), load(["modulation.lam={_target_: someones_parts.Texts}"], mine)
    with pytest.raises(ConfigError, match=r"someones_parts\.Texts: must return a finite number, not 'half'"):
        dispatch.check_worlds([first, second])
