"""ScienceWorld: splits, who wins, how a failure and both rules of success end, and which settings are refused."""

from random import Random

import pytest
from support.runs import needs, skip_or_fail

from aem_exp.config import instantiate, load
from aem_exp.core.errors import ConfigError
from aem_exp.envs import scienceworld
from aem_exp.envs.jvm import _find_java
from aem_exp.envs.scienceworld import VARIATIONS, ScienceWorld, open_game

needs("scienceworld")
if _find_java() is None:
    skip_or_fail("needs Java")


@pytest.fixture(scope="module")
def world():
    return ScienceWorld(tags=False)


@pytest.fixture(scope="module")
def env(world):
    made = world.env()
    yield made
    made.close()


def find_task(world, name, split="dev"):
    return next(task for task in world.tasks(split) if task.kind == name)


@pytest.mark.slow
def test_tasks_are_the_variations_of_the_package(world):
    jvm = world.start_jvm()
    game = open_game(jvm)
    assert set(game.getTaskNames()) == set(VARIATIONS)
    for name in ("boil", "identify-life-stages-2", "lifespan-longest-lived", "grow-fruit"):
        game.load(name, 0, "", False)
        assert game.getTaskMaxVariations(name) == VARIATIONS[name]
        official = {
            "train": list(game.getVariationsTrain()),
            "dev": list(game.getVariationsDev())[:5],
            "test": list(game.getVariationsTest())[:10],
        }
        for split, variations in official.items():
            assert [t.payload["variation"] for t in world.tasks(split) if t.kind == name] == variations
    jvm.close()
    assert {split: len(world.tasks(split)) for split in world.splits} == {"train": 3592, "dev": 145, "test": 271}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["find-animal", "lifespan-shortest-lived", "power-component", "find-plant"])
def test_the_oracle_completes_a_task(world, env, name):
    task = find_task(world, name, "test")
    turn, paid = env.reset(task), 0.0
    assert not env.goal.startswith("Your task")
    while not turn.done and env.turns < 60:
        turn = env.step(world.oracle(env))
        paid += turn.reward
    assert (turn.terminated, turn.metrics["won"], turn.metrics["score"], paid) == (True, 1.0, 1.0, 10.0)


@pytest.mark.slow
def test_games_repeat_in_a_jvm_that_has_played_others(world, env):
    """Without the JVM's option `hashCode`, the order of objects would differ."""
    task, random = find_task(world, "test-conductivity"), Random(0)

    def play(env):
        turns = [env.reset(task)]
        for action in ("look around", "open door to kitchen", "go hallway", "look around", "inventory", "look around"):
            turns.append(env.step(action))
        return turns

    fresh = world.env()
    expected = play(fresh)
    fresh.close()
    for name in random.sample(sorted(VARIATIONS), 6):
        env.reset(find_task(world, name, "train"))
        env.step("look around")
    assert play(env) == expected


@pytest.mark.slow
def test_a_wrong_focus_ends_the_episode_without_reward(world, env):
    env.reset(find_task(world, "find-animal"))
    assert not env.step("no such thing").metrics["admissible"]
    assert not env.step("reset task").metrics["admissible"]
    answer = env.step("focus on agent")
    if not answer.done:  # the game asks which one is meant
        answer = env.step("0")
    assert (answer.terminated, answer.reward, answer.metrics["won"], answer.metrics["score"]) == (True, 0.0, 0.0, 0.0)
    assert env.step("look around").terminated


@pytest.mark.slow
@pytest.mark.parametrize(("success", "won"), [("complete", 0.0), ("beacon", 1.0)])
def test_waiting_after_a_subgoal_is_a_success_for_beacon_only(success, won):
    """Three times `wait` are 33 moves of the game, so BEACON's rule ends the episode."""
    world = ScienceWorld(tags=False, success=success)
    env = world.env()
    env.reset(find_task(world, "melt"))
    for room in ("kitchen", "workshop", "living room", "bathroom", "outside", "art studio", "foundry", "greenhouse"):
        turn = env.step(f"teleport to {room}")
        if turn.metrics["score"] > 0:
            break
    assert turn.metrics["score"] > 0
    for _ in range(3):
        turn = env.step("wait")
    assert (turn.terminated, turn.metrics["won"]) == (bool(won), won)
    assert turn.reward == 10.0 * won
    env.close()


def test_scores_can_be_paid():
    world = ScienceWorld(tags=False, pays="score", objects=False, reward=1.0)
    env, task = world.env(), find_task(world, "lifespan-longest-lived")
    turn, paid = env.reset(task), []
    assert "Objects:" not in turn.observation
    while not turn.done and env.turns < 30:
        turn = env.step(world.oracle(env))
        paid.append(turn.reward)
    assert sum(paid) == pytest.approx(1.0)
    assert sum(reward > 0 for reward in paid) > 1
    env.close()


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"simplifications": "simple"}, "simplifications", "easy"),
        ({"simplifications": "teleportAction,noElectricalAction"}, "simplifications", "impossible"),
        ({"tasks": "hard"}, "tasks", "short"),
    ],
)
def test_wrong_settings_are_refused(changes, field, words):
    with pytest.raises(ConfigError) as caught:
        instantiate(load(["env=scienceworld"]).env.make | changes)
    assert caught.value.field == f"env.make.{field}"
    assert words in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(scienceworld, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs its package.*scienceworld"):
        ScienceWorld()
