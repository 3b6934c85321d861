"""A user's world is checked against the contract, and its panels against its training tasks, before a run."""

import logging
from dataclasses import replace

import pytest
from support.runs import DEADLINE

from aem_exp import config
from aem_exp.__main__ import main
from aem_exp.config import load
from aem_exp.core import user_code
from aem_exp.core.errors import ConfigError, RunError
from aem_exp.envs import Task, opening, panel
from aem_exp.evaluate import command as evaluate
from aem_exp.evaluate import panels
from aem_exp.jobs import preflight, world_check
from aem_exp.rollout.sampling.base import Sample
from aem_exp.rollout.types import Response, Trajectory

MODULE = """
from aem_exp.envs import Task, Turn

class Echo:
    goal = "say it"
    def parse(self, response): return response.strip()
    def reset(self, task):
        self.word = task.payload["word"]
        return Turn(f"say {self.word}", metrics={"won": 0.0})
    def step(self, response):
        won = response.strip() == self.word
        return Turn("done", float(won), terminated=True, metrics={"won": float(won)})
    def close(self): pass

class World:
    fingerprint = "echo-1"
    splits = ("train", "dev", "test")
    words_ = ("yes", "no", "perhaps")
    def tasks(self, split):
        first = 1000 * self.splits.index(split)
        return [Task(f"{split}-{i}", seed=first + i, payload={"word": w}) for i, w in enumerate(self.words_ * 20)]
    def env(self): return Echo()
    def words(self): return ("say", *self.words_)
    def expert(self, env, random, noise=0.0, shyness=0.0): return random.choice(self.words_) if noise else env.word

class Bare: pass
class NoSplits(World): splits = "train"
class Twice(World):
    def tasks(self, split): return [Task("same", seed=i, payload={"word": "yes"}) for i in range(60)]
class Shared(World):
    def tasks(self, split): return [Task(f"t-{i}", seed=i, payload={"word": "yes"}) for i in range(60)]
class OneText(World):
    def words(self): return "yes no"
class NoExpert:
    fingerprint, splits, tasks, env = World.fingerprint, World.splits, World.tasks, World.env
"""
YAML = """
name: {name}
make: {{_target_: someones.{name}}}
history: full
max_turns: 2
response_tokens: 4
context_tokens: 64
prompt: {{first: "{{observation}}", next: "{{observation}}"}}
"""


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    (tmp_path / "env").mkdir()
    (tmp_path / "someones.py").write_text(MODULE)
    for name in ("World", "Bare", "NoSplits", "Twice", "Shared", "OneText", "NoExpert"):
        (tmp_path / "env" / f"{name}.yaml").write_text(YAML.format(name=name))
    monkeypatch.setenv("AEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AEM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def open_world(user_folder, name, *more):
    return preflight.open_checked_world(load([f"env={name}", *more], user_folder))


def test_a_world_that_keeps_the_contract_is_accepted(user_folder):
    assert open_world(user_folder, "World").fingerprint == "echo-1"


@pytest.mark.parametrize(
    ("name", "more", "prefix", "fact"),
    [
        ("Bare", ["model.make=null", "model.path=a/b"], "env.make._target_=someones.Bare: ", "fingerprint"),
        ("NoSplits", [], "env.make._target_=someones.NoSplits: ", "splits"),
        ("Twice", [], "evaluation.panel=dev: ", "'same'"),
        ("Shared", [], "env Shared=t-0: ", "in train and in the panel dev"),
        ("NoExpert", [], "model.make=aem_exp.tiny.make: ", "env NoExpert"),
        ("World", ["evaluation.final=exam"], "evaluation.final=exam: ", "dev, test"),
        ("World", ["trainer.tasks_per_step=61"], "trainer.tasks_per_step=61: ", "60"),
    ],
)
def test_a_world_that_breaks_the_contract_is_refused(user_folder, name, more, prefix, fact):
    with pytest.raises(ConfigError) as caught:
        open_world(user_folder, name, *more)
    assert str(caught.value).startswith(prefix) and fact in str(caught.value)


def test_words_must_be_a_list(user_folder):
    from aem_exp import policy

    experiment = load(["env=OneText", "model.make.episodes=1"], user_folder)
    with pytest.raises(ConfigError, match=r"words\(\)") as caught:
        policy.make_cached(experiment, opening.open_world(experiment))
    assert (caught.value.field, caught.value.value) == ("env.make", "OneText")


@pytest.mark.slow
def test_a_run_can_be_continued_and_evaluated_without_the_users_module(user_folder, capsys, monkeypatch):
    """The run directory contains a copy of the code. Printed commands keep --config-dir."""
    import sys

    small = ["trainer.steps=1", "trainer.tasks_per_step=2", "trainer.group_size=2", "trainer.mini_batch=4"]
    small += ["evaluation.tasks=4", "model.make.episodes=32", "model.make.steps=2", "model.make.habit_steps=1"]
    assert main(["env=World", *small, "--config-dir", str(user_folder)]) == 0
    run_dir = config.run_dir(load(["env=World", *small], user_folder))
    (user_folder / "someones.py").unlink()
    monkeypatch.delitem(sys.modules, "someones")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(user_folder)])
    capsys.readouterr()
    arguments = [str(run_dir), "--tasks", "4", "--repeats", "1", "--only", "policy", "--config-dir", str(user_folder)]
    assert evaluate.main(arguments) == 0
    assert f"--config-dir {user_folder}" in capsys.readouterr().out
    assert main([f"from={run_dir}", "trainer.steps=2"]) == 0


# Held-out tasks that are also training tasks.

GAMES = """
from random import Random
from aem_exp.envs import LazyTasks, Task, Turn

class Guess:
    goal = "guess"
    def parse(self, response): return response.strip()
    def reset(self, task):
        self.number = self.secret(task)
        return Turn("guess", metrics={"won": 0.0})
    def secret(self, task): return Random(task.seed).randint(0, 10**6)
    def step(self, response):
        won = response.strip() == str(self.number)
        return Turn("no", float(won), terminated=won, metrics={"won": float(won)})
    def close(self): pass

class Guessing:
    "All games begin alike; only a hidden number differs."
    fingerprint, splits, game = "g", ("train", "dev", "test"), Guess
    first = {"train": 0, "dev": 10**6, "test": 2 * 10**6}
    size = 4096
    def tasks(self, split): return LazyTasks(self.size if split == "train" else 40, lambda i: self.draw(split, i))
    def draw(self, split, i): return Task(f"{split}-{i}", seed=self.first[split] + i)
    def env(self): return self.game()
    def words(self): return ["guess"]
    def expert(self, env, random, noise=0.0, shyness=0.0): return str(env.number)

class Few(Guessing):
    "Only two numbers: equal games are a coincidence, not a leak."
    class game(Guess):
        def secret(self, task): return Random(task.seed).randint(0, 1)
class ByName(Guessing):
    "Games depend on their ids, and all seeds are 0."
    class game(Guess):
        def secret(self, task): return task.id
    def draw(self, split, i): return Task(f"{split}-{i}")
class SameObject(Guessing):
    all = LazyTasks(100, lambda i: Task(f"t-{i}", seed=i))
    def tasks(self, split): return self.all
class SameIds(Guessing):
    def draw(self, split, i): return Task(f"t-{i}", seed=i)
class LastIds(Guessing):
    def tasks(self, split):
        return LazyTasks(10**5, self.one) if split == "train" else LazyTasks(40, lambda i: self.one(10**5 - 40 + i))
    def one(self, i): return Task(f"t-{i}", seed=i)
class SameSeeds(Guessing):
    def draw(self, split, i): return Task(f"{split}-{i}", seed=i)
class SeedsAmong(Guessing):
    "The panel's seeds are in the middle of a large training split."
    size = 10**6
    first = {"train": 0, "dev": 123_457, "test": 2 * 10**6}
class SameGames(Guessing):
    size = 900
    class game(Guess):
        def secret(self, task): return task.seed % 1000
    first = {"train": 0, "dev": 1000, "test": 2000}
class ListedSeeds(Guessing):
    def tasks(self, split): return [Task(f"{split}-{i}", seed=i % 20) for i in range(60)]
class SameIdOtherGame(Guessing):
    def draw(self, split, i): return Task(f"{i}", seed=self.first[split] + i)
"""
LEAKS = {  # world -> the leaked task, and facts of the error
    "SameObject": ("t-0", "in train", "panel dev"),
    "SameIds": ("t-0", "in train", "panel dev"),
    "LastIds": ("t-99960", "in train", "panel dev"),
    "SameSeeds": ("dev-0", "seed, kind and payload", "panel dev", "train-0:"),
    "SeedsAmong": ("dev-0", "seed, kind and payload", "panel dev", "train-123457:"),
    "ListedSeeds": ("dev-0", "seed, kind and payload", "panel dev", "train-"),
    "SameGames": ("dev-0", "observations and rewards", "panel dev", "train-0 "),
}


@pytest.fixture
def games(user_folder, monkeypatch):
    (user_folder / "guessed.py").write_text(GAMES)
    monkeypatch.setattr(user_code, "CHECK_SECONDS", DEADLINE)
    monkeypatch.setattr(world_check, "COMPARE_SECONDS", DEADLINE)
    for name in (*LEAKS, "Guessing", "Few", "ByName", "SameIdOtherGame"):
        (user_folder / "env" / f"{name}.yaml").write_text(YAML.format(name=name).replace("someones", "guessed"))
    return user_folder


@pytest.mark.parametrize("name", LEAKS)
def test_a_held_out_task_that_is_a_training_task_is_refused(games, name):
    task, *facts = LEAKS[name]
    with pytest.raises(ConfigError) as caught:
        open_world(games, name)
    assert (caught.value.field, caught.value.value) == (f"env {name}", task)
    assert all(fact in caught.value.remedy for fact in facts)


@pytest.mark.parametrize("name", ["Guessing", "Few", "ByName", "SameIdOtherGame"])
def test_games_that_only_begin_alike_are_accepted(games, name):
    assert open_world(games, name).fingerprint == "g"


# Checks of the results on a panel.


def play_panel(ended="over", won=True, observation="a {}"):
    metrics = {"won": 0.0} if won else {}
    responses = [Response([], Sample([1], [0.0], [0.0]), observation.format(i), "x", metrics=metrics) for i in range(4)]
    return [Trajectory(Task(f"t{i}"), i, 0, [response], ended=ended) for i, response in enumerate(responses)]


def check_results(trajectories, caplog):
    """The warnings about the results."""
    with caplog.at_level(logging.WARNING):
        panels.check_results(panel.Panel("dev", [t.task for t in trajectories], ""), trajectories)
    return caplog.text


def test_a_context_below_every_prompt_ends_the_run(caplog):
    played = [replace(t, responses=[], ended="context") for t in play_panel()]
    with pytest.raises(RunError, match=r"no first prompt of the panel dev fits .*raise env\.context_tokens") as caught:
        check_results(played, caplog)
    assert caught.value.kind == "config"


def test_a_world_must_report_success(caplog):
    with pytest.raises(RunError, match=r"metrics\['won'\]") as caught:
        check_results(play_panel(won=False), caplog)
    assert caught.value.kind == "env"


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({}, ()),
        ({"observation": "the same"}, ("panel dev", "no task is held out")),
        ({"ended": "context"}, ("4 of 4", "panel dev", "env.context_tokens")),
    ],
)
def test_results_of_little_meaning_are_warned_about(changes, facts, caplog):
    text = check_results(play_panel(**changes), caplog)
    assert all(fact in text for fact in facts) and bool(facts) == bool(text)


def play_guesses(*numbers):
    """Guessing games, one for each list of guesses. They begin alike; the hidden number is the number of the task."""
    games = []
    for number, guesses in enumerate(numbers):
        responses = [
            Response(
                [],
                Sample([1], [0.0], [0.0]),
                "guess" if i == 0 else "no",
                text,
                metrics={"won": float(text == str(number))},
            )
            for i, text in enumerate(guesses)
        ]
        games.append(Trajectory(Task(f"t{number}", number), number, 0, responses, ended="over"))
    return games


@pytest.mark.parametrize(
    ("games", "warned"),
    [
        (play_guesses(["0"], ["0", "1"]), False),  # equal responses, but only one of them won
        (play_guesses(["7"], ["8"]), False),  # no equal responses: nothing is known
        (play_guesses(["7", "8"], ["7", "8"]), True),  # equal responses and equal answers
    ],
)
def test_different_guessing_games_are_not_reported_as_one_game(games, warned, caplog):
    assert bool(check_results(games, caplog)) == warned
