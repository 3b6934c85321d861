"""BabyAI as text: what the agent reads, who wins, and which settings are refused."""

from random import Random

import pytest
from support.runs import needs

from aem_exp.config import instantiate, load
from aem_exp.core.errors import ConfigError
from aem_exp.envs import babyai
from aem_exp.envs.babyai import ACTIONS, BabyAI, describe_view

needs("minigrid")


class Ball:
    color, type = "red", "ball"


def view(**cells):
    """A view with the given cells, such as `c3_4=(kind, colour, state)`; all others are empty."""
    import numpy

    image = numpy.zeros((7, 7, 3), dtype="uint8")
    image[..., 0] = 1
    for name, content in cells.items():
        column, row = map(int, name.removeprefix("c").split("_"))
        image[column, row] = content
    return image


@pytest.mark.parametrize(
    ("image", "carried", "text"),
    [
        (view(), None, "you see nothing"),
        (view(c3_5=(6, 0, 0)), None, "you see a red ball 1 forward"),
        (view(c1_6=(5, 4, 0)), None, "you see a yellow key 2 left"),
        (view(c5_2=(4, 2, 2)), None, "you see a locked blue door 4 forward and 2 right"),
        (view(c3_4=(2, 5, 0), c2_6=(2, 5, 0)), None, "you see nothing\nwall 2 forward and 1 left"),
        (view(c3_6=(6, 0, 0)), Ball(), "you see nothing\nyou carry a red ball"),  # its own cell shows what it carries
    ],
)
def test_a_view_is_described(image, carried, text):
    assert describe_view(image, carried) == text


def play(world, task, choose, turns):
    env = world.env()
    turn = env.reset(task)
    read = [env.goal, turn.observation]
    for _ in range(turns):
        if turn.done:
            break
        turn = env.step(choose(env))
        read.append(turn.observation)
    env.close()
    return turn, read


@pytest.mark.slow
@pytest.mark.parametrize("level", ["GoToLocal", "PickupLoc", "PutNextLocal", "Open"])
def test_the_bot_wins_random_actions_rarely_and_all_words_are_known(level):
    world = BabyAI(level)
    known, random, chance = set(" ".join(world.words()).split()), Random(0), 0.0
    for task in world.tasks("test")[:12]:
        last, read = play(world, task, world.oracle, 300)
        assert last.terminated and last.metrics["won"] == 1 and last.reward == 1
        assert not set(" ".join(read).split()) - known
        chance += play(world, task, lambda env: random.choice(list(ACTIONS)), 16)[0].metrics["won"]
    assert chance <= 4


def test_the_bot_recovers_from_random_actions():
    world, random = BabyAI("GoToLocal"), Random(1)
    won = [
        play(world, task, lambda env: world.expert(env, random, noise=0.3), 64)[0].metrics["won"]
        for task in world.tasks("train")[:20]
    ]
    assert sum(won) >= 19


def test_the_goal_is_the_mission():
    world = BabyAI("PickupLoc")
    env = world.env()
    goals = set()
    for task in world.tasks("dev")[:5]:
        env.reset(task)
        goals.add(env.goal)
    assert len(goals) > 1 and all(goal.startswith("pick up") for goal in goals)
    env.close()


@pytest.mark.parametrize(
    ("changes", "field", "choice"),
    [({"level": "GoToMars"}, "level", "GoToLocal"), ({"sizes": {"exam": 3}}, "sizes.exam", None)],
)
def test_wrong_settings_are_refused(changes, field, choice):
    with pytest.raises(ConfigError) as caught:
        instantiate(load(["env=babyai"]).env.make | changes)
    assert caught.value.field == f"env.make.{field}"
    assert choice is None or choice in caught.value.choices


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(babyai, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs minigrid.*babyai"):
        BabyAI()
