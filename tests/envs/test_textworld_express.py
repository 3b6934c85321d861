"""TextWorldExpress: who wins each game, what is read, open episodes of the same task, and which settings are refused."""

import os
import signal
import stat
from random import Random

import pytest
from support.runs import needs, skip_or_fail

from aem_exp.config import instantiate, load
from aem_exp.core.errors import ConfigError
from aem_exp.envs import textworld_express
from aem_exp.envs.executor import SerialExecutor
from aem_exp.envs.jvm import _find_java
from aem_exp.envs.textworld_express import TextWorldExpress

needs("textworld_express")
if _find_java() is None:
    skip_or_fail("needs Java")

EASY_MAP = {"numLocations": 5, "maxDistanceApart": 2, "includeDoors": 0, "maxDistractorItemsPerLocation": 0}
# Game, its parameters, the least share of successes of the player, and the most of random actions in 20 turns.
GAMES = [
    ("mapreader", EASY_MAP, 1.0, 0.3),
    ("mapreader", {}, 1.0, 0.2),
    ("coin", {}, 1.0, 0.5),
    ("twc", {}, 1.0, 0.1),
    ("cookingworld", {"numLocations": 1, "numIngredients": 1}, 1.0, 0.1),
    ("arithmetic", {}, 1.0, 0.3),
    ("sorting", {}, 1.0, 0.1),
    ("simonsays", {}, 1.0, 0.1),
    ("peckingorder", {}, 0.9, 0.1),  # with two objects of one name, the package's own solution may take the wrong one
]


def play(env, task, choose, turns=60):
    turn = env.reset(task)
    played = [turn]
    while not turn.done and len(played) <= turns:
        turn = env.step(choose(env, turn))
        played.append(turn)
    return played


@pytest.mark.slow
@pytest.mark.parametrize(("game", "params", "least", "most"), GAMES)
def test_the_player_wins_and_random_actions_rarely_do(game, params, least, most):
    world, random = TextWorldExpress(game, params, tags=False), Random(0)
    env, won, chance = world.env(), [], []
    for split in ("dev", "test"):
        for task in world.tasks(split)[:10]:
            last = play(env, task, lambda env, turn: world.expert(env, Random(0)))[-1]
            won.append(last.metrics["won"])
            assert last.metrics["score"] >= last.metrics["won"]
            chance.append(play(env, task, lambda env, turn: random.choice(turn.actions), 20)[-1].metrics["won"])
    env.close()
    assert sum(won) >= least * len(won)
    assert sum(chance) <= most * len(chance)


@pytest.mark.slow
@pytest.mark.parametrize("game", ["sorting", "twc"])
def test_open_episodes_of_the_same_task_do_not_change_each_other(game):
    """The members of a group; in one JVM, two games of `sorting` would share their objects."""
    world = TextWorldExpress(game, tags=False)
    for task in world.tasks("train")[:4]:
        env, other = world.env(), world.env()
        alone = play(env, task, lambda env, turn: world.expert(env, Random(0)))
        other.reset(task)
        turn, random = env.reset(task), Random(0)
        turns = [turn]
        while not turn.done:
            other.step(random.choice(other.actions))
            turn = env.step(world.expert(env, Random(0)))
            turns.append(turn)
        assert turns == alone
        env.close()
        other.close()


@pytest.mark.slow
def test_the_player_recovers_from_random_actions():
    world, random = TextWorldExpress("mapreader", EASY_MAP, tags=False), Random(0)
    env = world.env()
    won = [
        play(env, task, lambda env, turn: world.expert(env, random, noise=0.3))[-1].metrics["won"]
        for task in world.tasks("train")[:30]
    ]
    assert sum(won) >= 29


@pytest.mark.slow
def test_words_cover_what_is_read():
    world = TextWorldExpress("mapreader", EASY_MAP, tags=False)
    words, env, random, unknown = set(world.words()), world.env(), Random(1), set()
    for task in world.tasks("test"):
        turns = play(env, task, lambda env, turn: random.choice(turn.actions), 8)
        read = " ".join([env.goal, *(turn.observation for turn in turns)])
        unknown |= {word for word in "".join(c if c.isalnum() else " " for c in read).split() if word not in words}
    assert len(unknown) <= 3, unknown


@pytest.mark.parametrize(("pays", "rewards"), [("success", {0.0, 10.0}), ("score", {0.0, 5.0})])
def test_rewards(pays, rewards):
    world = TextWorldExpress("mapreader", EASY_MAP, tags=False, pays=pays, reward=10.0)
    turns = play(world.env(), world.tasks("dev")[0], lambda env, turn: world.expert(env, Random(0)))
    assert {turn.reward for turn in turns} == rewards
    assert sum(turn.reward for turn in turns) == 10.0
    assert turns[-1].terminated


def test_a_failed_game_pays_nothing_and_ends():
    world, random = TextWorldExpress("arithmetic", tags=False, pays="score"), Random(0)
    env, lost = world.env(), 0
    for task in world.tasks("dev")[:20]:
        last = play(env, task, lambda env, turn: random.choice(turn.actions))[-1]
        lost += last.terminated and not last.metrics["won"]
        assert 0 <= last.metrics["score"] <= 1 and last.reward >= -1
    assert lost


def test_a_jvm_that_dies_fails_one_step_and_is_replaced():
    world = TextWorldExpress("mapreader", EASY_MAP, tags=False)
    executor, task = SerialExecutor(world), world.tasks("dev")[0]
    first = executor.reset({0: task})[0]
    os.kill(world._jvm._process.pid, signal.SIGKILL)
    world._jvm._process.wait(30)
    failed = executor.step({0: "read map"})[0]
    assert failed.turn is None and failed.error
    assert executor.reset({0: task})[0] == first
    assert executor.step({0: "read map"})[0].turn.observation.startswith("The map reads")
    executor.close()


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"game": "chess"}, "game", "mapreader"),
        ({"params": {"rooms": 5}}, "params", "Known properties: numLocations"),
        ({"params": {"numLocations": 5000}}, "params", "less than or equal"),
        ({"sizes": {"train": 1001}}, "sizes.train", "1 to 1000"),
    ],
)
def test_wrong_settings_are_refused(changes, field, words):
    with pytest.raises(ConfigError) as caught:
        instantiate(load(["env=textworld_express"]).env.make | changes)
    assert caught.value.field == f"env.make.{field}"
    assert words in str(caught.value)


def test_missing_and_broken_java_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="needs Java"):
        TextWorldExpress()
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'Unsupported class file' >&2\nexit 1\n")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(ConfigError, match="does not start: Unsupported class file"):
        TextWorldExpress()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(textworld_express.world, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs its package.*textworld-express"):
        TextWorldExpress()
