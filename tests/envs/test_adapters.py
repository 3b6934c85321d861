"""Adapters to other libraries: Gymnasium in this process, and a real OpenEnv server."""

import re

import pytest
from support import ROOT
from support.openenv_service import ACTIONS, OpenEnvServer
from support.runs import needs

from aem_exp.config import instantiate, load
from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.envs import Task
from aem_exp.envs.executor import SerialExecutor
from aem_exp.envs.workers import WorkerPool
from aem_exp.jobs import preflight

pytestmark = pytest.mark.machine


@pytest.fixture(scope="module")
def server():
    needs("openenv")
    running = OpenEnvServer()
    yield running
    running.stop()


def lake(**changes):
    needs("gymnasium")
    return instantiate(load(["env=frozen_lake"]).env.make | changes)


def test_frozen_lake_is_played_in_text():
    world = lake()
    env = world.env()
    first = env.reset(world.tasks("dev")[0])
    assert first.observation.startswith("[S]FFF") and "\x1b" not in first.observation
    assert first.actions == ("left", "down", "right", "up")
    turns = [env.step(word) for word in ("Down", " down ", "right", "right", "down", "right")]
    assert [turn.done for turn in turns] == [False] * 5 + [True]
    assert (turns[-1].reward, turns[-1].metrics["won"]) == (1.0, 1.0)
    assert env.step("down").reward == 0


def documented_taxi(folder):
    """Load the example of docs/extending.md as printed."""
    text = (ROOT / "docs" / "extending.md").read_text()
    found = re.search(r"`my/env/taxi\.yaml`:\n\n```yaml\n(.*?)```", text, re.DOTALL)
    (folder / "env").mkdir()
    (folder / "env/taxi.yaml").write_text(found[1])
    return load(["env=taxi", "model.make=null", "model.path=a/b"], folder)


def test_the_documented_taxi_example_can_be_won(tmp_path):
    """Observations show everything that the goal mentions: the taxi, the passenger and the destination."""
    needs("gymnasium")
    experiment = documented_taxi(tmp_path)
    world = instantiate(experiment.env.make)
    env, task = world.env(), Task("a", seed=1)
    first = env.reset(task)
    marks = re.findall(r"\[(\w+) (.)\]", first.observation)
    assert marks == [("purple", "R"), ("yellow", " "), ("blue", "B")]
    assert all(colour in world.goal for colour, _ in marks)
    ways = ["east", "south", "south", "pickup", "north", "north", "west", "west", "west", "north", "north"]
    turns = [env.step(word) for word in [*ways, "dropoff"]]
    taken = next(turn for turn in turns if "[green" in turn.observation)
    assert "[yellow blue B]" in turns[2].observation or "[blue yellow B]" in turns[2].observation
    assert "blue" not in taken.observation and "[purple R]" in taken.observation
    assert "\x1b" not in "".join(turn.observation for turn in turns)
    assert (turns[-1].terminated, turns[-1].metrics["won"]) == (True, 1.0)


def test_an_example_without_its_library_or_a_policy_is_refused(tmp_path):
    """The error names the extra, or asks for a model, because these worlds have no expert."""
    needs("gymnasium")
    for words, folder in ((["env=frozen_lake"], None), (["env=taxi"], tmp_path)):
        if folder:
            documented_taxi(folder)
        with pytest.raises(ConfigError, match=r"model=NAME") as caught:
            preflight.open_checked_world(load(words, folder))
        assert caught.value.field == "model.make"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("aem_exp.envs.gymnasium.find_spec", lambda name: None)
            with pytest.raises(MissingResource, match=r"pip install .*\[gymnasium\]'"):
                preflight.open_checked_world(load([*words, "model.make=null", "model.path=a/b"], folder))


def test_an_unknown_action_changes_nothing():
    world = lake()
    env = world.env()
    before = env.reset(world.tasks("dev")[0])
    after = env.step("fly away")
    assert not after.valid and after.observation == before.observation
    assert (after.metrics["format_valid"], after.metrics["admissible"]) == (1, 0)
    lost = [env.step(word) for word in ("right", "down")][-1]
    assert lost.terminated and lost.metrics["won"] == 0


def test_the_seed_decides_all_random_events():
    world = lake(kwargs={"render_mode": "ansi", "is_slippery": True})
    walks = []
    for task in (Task("a", seed=5), Task("b", seed=5), Task("c", seed=6)):
        env = world.env()
        env.reset(task)
        walks.append([env.step(word).observation for word in ("right", "down", "left", "down", "right") * 2])
    assert walks[0] == walks[1] != walks[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "Taxi-v3"}, "env.make.id=Taxi-v3: .*deprecated"),
        ({"id": "NoLake-v1"}, "env.make.id=NoLake-v1: .*NoLake"),
        ({"kwargs": {"depth": 3}}, "env.make.id=FrozenLake-v1: .*depth"),
        ({"actions": {"left": 0, "up": 4}}, r"env.make.actions.up=4: .*Discrete\(4\)"),
        ({"actions": None}, r"env.make.actions=null: .*Discrete\(4\)"),
        ({"kwargs": {"render_mode": "rgb_array"}}, "env.make.kwargs.render_mode=rgb_array: .*ansi"),
        ({"goal": " "}, "env.make.goal"),
        ({"sizes": {"train": 0}}, "env.make.sizes.train"),
    ],
)
def test_a_wrong_keyword_of_gymnasium_is_refused(changes, message, recwarn):
    needs("gymnasium")
    recwarn.clear()
    with pytest.raises(ConfigError, match=message):
        lake(**changes)
    assert not recwarn.list  # the error is the only message


def test_an_environment_without_text_names_the_render_mode():
    world = lake(kwargs={"render_mode": None})
    reply = SerialExecutor(world).reset({0: world.tasks("dev")[0]})[0]
    assert "render_mode: ansi" in reply.error


def open_env(server, **changes):
    return instantiate(load(["env=openenv"]).env.make | {"base_url": server.url} | changes)


def test_the_household_is_played_on_a_server(server):
    world = open_env(server, goal="tidy up")
    env = world.env()
    first = env.reset(world.tasks("dev")[0])
    assert f"go to {re.search(r'you see a (.+? [0-9])', first.observation)[1]}" in first.actions  # from the server
    assert env.goal == "tidy up"
    place = re.search(r"you see a (\w+ \d)", first.observation)[1]
    assert env.step(f"go to {place}").observation.startswith(f"You arrive at {place}")
    named = open_env(server, actions=ACTIONS).env()
    assert named.reset(world.tasks("dev")[0]).observation == first.observation  # it depends only on the seed
    assert named.step("INVENTORY").observation == "You are not carrying anything."
    assert not named.step("sing").valid
    for one in (env, named):
        one.close()


def test_a_failed_session_ends_only_its_own_episode(server):
    make = load(["env=openenv"]).env.make | {"base_url": server.url}
    executor, tasks = WorkerPool(make, 2, 30.0), open_env(server).tasks("train")
    assert all(reply.turn for reply in executor.reset({0: tasks[0], 1: tasks[1]}).values())
    replies = executor.step({0: "break", 1: "look"})
    assert "the house burnt down" in replies[0].error and replies[1].turn
    assert executor.reset({0: tasks[2]})[0].turn
    executor.close()


def test_a_missing_server_or_field_is_named(server):
    with pytest.raises(MissingResource) as caught:
        open_env(server, base_url="http://127.0.0.1:9")
    assert (caught.value.field, caught.value.value) == ("env.make.base_url", "http://127.0.0.1:9")
    world = open_env(server, observation_field="words")
    error = SerialExecutor(world).reset({0: world.tasks("dev")[0]})[0].error
    assert "'words'" in error and "actions, metadata, text" in error
