"""The household: held-out goals and rooms are disjoint, every errand is possible, and the listed actions are admissible."""

import copy
import itertools
import re
import signal
from collections import Counter
from functools import cache
from random import Random

import pytest

from aem_exp.config import instantiate, load
from aem_exp.core.errors import ConfigError
from aem_exp.envs.household import Household
from aem_exp.envs.household.rules import APPLIANCE, GOALS, KITCHEN, LAMP, NOTHING, OPENABLE, Errand, kind_of
from aem_exp.envs.panel import build_panel

TURNS = 80  # generous: a room has eight receptacles
TREATED = [kind for kind in GOALS if Errand(kind, "", "").verb]
THING = r"[a-z]+ \d+"
LIST = rf"(?:nothing|a {THING}|a {THING}(?:, a {THING})*, and a {THING})"
INTRO = rf"You are in the middle of a room\. Looking quickly around you, you see {LIST}\."
SHOWN = rf"(?:The {THING} is closed\.|The {THING} is open\. In it, you see {LIST}\.|On the {THING}, you see {LIST}\.)"
ANSWERS = {
    "go": rf"You arrive at {THING}\. {SHOWN}",
    "open": rf"You open the {THING}\. {SHOWN}",
    "close": rf"You close the {THING}\.",
    "take": rf"You pick up the {THING} from the {THING}\.",
    "move": rf"You move the {THING} to the {THING}\.",
    "clean": rf"You clean the {THING} using the {THING}\.",
    "heat": rf"You heat the {THING} using the {THING}\.",
    "cool": rf"You cool the {THING} using the {THING}\.",
    "use": rf"You turn on the {LAMP}\.",
    "examine": rf"{SHOWN}|There's nothing special about {THING}\.|This is a (?:(?:clean|hot|cool) )+{THING}\.",
    "inventory": rf"You are carrying: a {THING}\.|You are not carrying anything\.",
    "look": rf"You are facing the {THING}\. Next to it, you see nothing\.|{INTRO}",
}


@cache
def default():
    return load(["env=household"]).env


@cache
def world(which="roomy"):
    return instantiate(default().make) if which == "default" else Household()


def play_expert(made, task, **keywords):
    """The turns of an episode of the expert."""
    env, random, turns = made.env(), Random(task.id), []
    env.reset(task)
    while len(turns) < TURNS and not (turns and turns[-1].done):
        turns.append(env.step(made.expert(env, random, **keywords)))
    return turns


def random_states(count, seed=0):
    """`count` environments of each kind of task, after a random number of turns, half of them random."""
    random = Random(seed)
    for made, i in itertools.product([Household(kinds=[kind]) for kind in GOALS], range(count)):
        task, env = made.tasks("train")[i], made.env()
        turn = env.reset(task)
        for _ in range(random.randrange(30)):
            is_random = random.random() < 0.5
            after = env.step(random.choice(turn.actions) if is_random else made.expert(env, random))
            turn = env.reset(task) if after.done else after
        yield env, turn


def goal(task):
    return task.kind, task.payload["object"], task.payload["target"]


def layout(task):
    return frozenset((place, tuple(sorted(things))) for place, things in task.payload["layout"].items())


# Splits.


@pytest.mark.slow
@pytest.mark.parametrize("which", ["default", "roomy"])
def test_goals_and_rooms_of_splits_are_disjoint(which):
    splits = {split: list(world(which).tasks(split)) for split in ("train", "dev", "test")}
    assert len(splits["train"]) >= 2000
    assert min(len(splits["dev"]), len(splits["test"])) >= 100
    for trait in (goal, layout):
        seen = {split: {trait(task) for task in tasks} for split, tasks in splits.items()}
        assert not seen["train"] & (seen["dev"] | seen["test"])
        assert not seen["dev"] & seen["test"]
    assert all({task.kind for task in tasks} == set(world(which).kinds) for tasks in splits.values())


@pytest.mark.slow
def test_every_kind_is_equally_frequent():
    """A sixth of the tasks each, up to four standard deviations, even if a kind has few goals."""
    for split in ("train", "dev", "test"):
        tasks = world().tasks(split)
        counts = Counter(task.kind for task in tasks)
        slack = 4 * (len(tasks) * 5 / 36) ** 0.5
        assert {kind: pytest.approx(len(tasks) / 6, abs=slack) for kind in GOALS} == counts


PANELS = {  # fingerprint, hashes of dev and test
    "default": ("household-3-0bc6e6e3b45c", "6ed69e4783bf", "78347b47a5cf"),  # published numbers depend on these
    "roomy": ("household-3-c6d3c006cd3f", "a61b0ce47429", "1450809d78dc"),
}


@pytest.mark.parametrize("which", PANELS)
def test_fingerprint_and_panels_do_not_change(which):
    """If the tasks change, the fingerprint must change, too."""
    made = world(which)
    assert (made.fingerprint, build_panel(made, "dev").hash, build_panel(made, "test").hash) == PANELS[which]


def test_a_goal_is_not_reached_at_the_start():
    for task in world().tasks("train")[:300]:
        env = world().env()
        env.reset(task)
        assert env.step("look").metrics["won"] == 0  # changes nothing, and checks the goal
        things = [thing for place in task.payload["layout"].values() for thing in place]
        assert sum(kind_of(thing) == task.payload["object"] for thing in things) >= 1 + ("two" in task.kind)


# Errands.


@pytest.mark.parametrize("kind", GOALS)
@pytest.mark.parametrize("tags", [False, True], ids=["plain", "tags"])
def test_the_expert_completes_every_errand(kind, tags):
    made = Household(kinds=[kind], tags=tags)
    for task in made.tasks("test")[:20]:
        turns = play_expert(made, task)
        assert turns[-1].terminated
        assert turns[-1].metrics["won"] == 1
        assert [turn.metrics["won"] for turn in turns[:-1]] == [0] * (len(turns) - 1)
        assert all(turn.valid and turn.metrics["admissible"] for turn in turns)


@pytest.mark.parametrize("words", ["env=household", "env=household_chat", "+experiment=household_long"])
def test_the_expert_needs_at_most_the_configured_turns(words):
    rules = load([words]).env
    made = instantiate(rules.make)
    for split in ("dev", "test"):
        for task in made.tasks(split):
            turns = play_expert(made, task)
            assert turns[-1].metrics["won"] == 1
            assert len(turns) <= rules.max_turns


def test_a_noisy_expert_usually_wins():
    tasks = world().tasks("train")[:50]
    assert sum(play_expert(world(), task, noise=0.3)[-1].done for task in tasks) >= 45


def test_the_reward_is_paid_once():
    made = Household(reward=10.0)
    task = made.tasks("dev")[0]
    env, random, rewards = made.env(), Random(0), []
    env.reset(task)
    while not env.won:
        rewards.append(env.step(made.expert(env, random)).reward)
    assert rewards == [0.0] * (len(rewards) - 1) + [10.0]
    after = env.step("look")
    assert (after.reward, after.terminated, after.observation) == (0.0, True, NOTHING)


# Actions.


@pytest.mark.slow
def test_exactly_the_listed_actions_are_admissible():
    """Listed actions are answered in ALFWorld's words. All other actions of the grammar change nothing."""
    answered, refused = set(), set()
    for env, turn in random_states(40):
        assert len(set(turn.actions)) == len(turn.actions)
        for action in turn.actions:
            after = copy.deepcopy(env).step(action)
            verb = action.split()[0]
            answered.add(verb)
            assert after.valid
            assert after.metrics["admissible"] == 1
            assert re.fullmatch(ANSWERS[verb], after.observation), (action, after.observation)
        for action in grammar(env) - set(turn.actions):
            after = env.step(action)
            refused.add(action.split()[0])
            assert (after.observation, after.valid, after.reward, after.done) == (NOTHING, True, 0.0, False)
            assert after.metrics["admissible"] == 0
            assert after.actions == turn.actions
    assert answered == set(ANSWERS)
    assert refused == set(ANSWERS) - {"look", "inventory"}


def grammar(env):
    """All actions of the grammar about this room, and about a place and a thing that do not exist."""
    places = [*env.contents, "attic 1"]
    things = (
        [thing for inside in env.contents.values() for thing in inside]
        + ([env.held_object] if env.held_object else [])
        + ["yak 1"]
    )
    actions = {f"{verb} {name}" for verb in ("open", "close", "examine", "use") for name in [*places, *things]}
    actions |= {f"go to {place}" for place in [*places, *things]}
    for thing in things:
        for place in places:
            actions |= {f"take {thing} from {place}", f"move {thing} to {place}"}
            actions |= {f"{verb} {thing} with {place}" for verb in APPLIANCE}
    return actions | {"look", "inventory"}


@pytest.mark.parametrize("response", ["", "dance", "go to", "go to cabinet", "take mug 1", "look look", "look " * 200])
def test_other_responses_are_invalid(response):
    env = world().env()
    before = env.reset(world().tasks("dev")[0])
    after = env.step(response)
    assert (after.observation, after.valid, after.reward) == (NOTHING, False, 0.0)
    assert (after.metrics["format_valid"], after.metrics["admissible"]) == (0, 0)
    assert after.actions == before.actions


@pytest.mark.parametrize("response", ["LOOK", "  look\n", "Look"])
def test_case_and_space_do_not_matter(response):
    env = world().env()
    env.reset(world().tasks("dev")[0])
    assert env.parse(response) == "look"
    assert env.step(response).observation == env.intro


def test_no_thing_is_lost_and_at_most_one_is_carried():
    for env, turn in random_states(8, seed=1):
        placed = [thing for things in env.contents.values() for thing in things]
        assert len(set(placed)) == len(placed)
        assert len(placed) + (env.held_object is not None) == world().objects + (LAMP in placed)
        if env.held_object:
            assert not any(action.startswith("take") for action in turn.actions)
        if env.location in env.closed_places:
            assert not any(action.startswith(("take", "move", "close")) for action in turn.actions)


def test_a_closed_receptacle_hides_its_content():
    for task in world().tasks("train")[:50]:
        env = world().env()
        env.reset(task)
        for place, things in task.payload["layout"].items():
            observation = env.step(f"go to {place}").observation
            if kind_of(place) in OPENABLE:
                assert observation == f"You arrive at {place}. The {place} is closed."
                observation = env.step(f"open {place}").observation
            assert all(thing in observation for thing in things)


@pytest.mark.parametrize("kind", TREATED)
def test_an_object_must_be_treated_first(kind):
    """An untreated object at the target does not win."""
    made = Household(kinds=[kind])
    task = made.tasks("train")[0]
    env, random = made.env(), Random(0)
    env.reset(task)
    plain = Errand("pick_and_place", task.payload["object"], task.payload["target"])
    env.errand = plain
    while not env.won:
        turn = env.step(made.expert(env, random))
    env.errand, env.won = Errand(kind, plain.object, plain.target), False
    assert turn.done
    assert env.step("look").metrics["won"] == 0  # changes nothing, and checks the goal
    assert plain.object in KITCHEN


def test_hot_and_cool_exclude_each_other():
    env = world().env()
    room = {"microwave 1": ["mug 1"], "fridge 1": [], "sinkbasin 1": [], "shelf 1": []}
    payload = {"kind": "pick_heat_then_place", "object": "mug", "target": "shelf", "layout": room}
    task = copy.copy(world().tasks("dev")[0])
    object.__setattr__(task, "payload", payload)
    env.reset(task)
    script = ["go to microwave 1", "open microwave 1", "take mug 1 from microwave 1", "heat mug 1 with microwave 1"]
    script += ["go to sinkbasin 1", "clean mug 1 with sinkbasin 1", "examine mug 1"]
    assert [env.step(action) for action in script][-1].observation == "This is a clean hot mug 1."
    for action in ("go to fridge 1", "cool mug 1 with fridge 1", "go to shelf 1"):
        env.step(action)
    assert not env.step("move mug 1 to shelf 1").done
    assert env.step("take mug 1 from shelf 1").observation == "You pick up the mug 1 from the shelf 1."
    assert env.step("examine mug 1").observation == "This is a clean cool mug 1."
    for action in ("go to microwave 1", "heat mug 1 with microwave 1", "go to shelf 1"):
        env.step(action)
    assert env.step("move mug 1 to shelf 1").metrics["won"] == 1


# Texts.


@pytest.mark.parametrize("which", ["default", "roomy"])
def test_an_episode_begins_as_in_alfworld(which):
    for task in world(which).tasks("dev")[:40]:
        env = world(which).env()
        turn = env.reset(task)
        assert re.fullmatch(rf"{INTRO} Your task is to: [^.]*\.", turn.observation)
        assert turn.observation.endswith(f" Your task is to: {env.goal}")
        assert env.goal == GOALS[task.kind].format(object=task.payload["object"], target=task.payload["target"])
        named = re.findall(THING, turn.observation.partition(" Your task")[0])
        assert named == list(task.payload["layout"])


TAGGED = [
    ("<think>hm</think><action>look</action>", "look", True),
    ("<think>hm</think>\n<action> LOOK\n</action> then", "look", True),
    ("<think>hm</think><action>dance</action>", "dance", True),  # valid as in verl-agent, because it has the tags
    ("<action>look</action>", "look", False),
    ("<think>hm<action>look</action>", "look", False),
    ("<think>嗯</think><action>look</action>", "look", False),
    ("look", "look", False),
    ("<think>hm</think>" + "x" * 50 + "look", "x" * 26 + "look", False),
]


@pytest.mark.parametrize(("response", "action", "valid"), TAGGED)
def test_tagged_responses(response, action, valid):
    made = Household(tags=True)
    env = made.env()
    env.reset(made.tasks("dev")[0])
    assert env.parse(response) == action
    turn = env.step(response)
    assert turn.valid is valid
    assert turn.metrics["admissible"] == (action == "look")


def test_without_tags_the_whole_response_is_the_action():
    env = world().env()
    env.reset(world().tasks("dev")[0])
    turn = env.step("<think>hm</think><action>look</action>")
    assert (turn.valid, turn.observation) == (False, NOTHING)


# Settings.


@pytest.mark.parametrize(
    ("field", "keywords"),
    [
        ("kinds", {"kinds": ["juggle"]}),
        ("kinds", {"kinds": []}),
        ("receptacle_types", {"receptacle_types": ["attic"]}),
        ("object_types", {"object_types": ["yak"]}),
        ("object_types", {"object_types": ["book", "pen"], "kinds": ["pick_heat_then_place"]}),
        ("receptacles", {"receptacles": 0}),
        ("receptacles", {"receptacles": 1000}),
        ("copies", {"copies": 0}),
        ("sizes.dve", {"sizes": {"dve": 3}}),
        ("sizes.dev", {"sizes": {"dev": -3}}),
        ("openable", {"openable": -1}),
        ("openable", {"openable": 9}),
        ("openable", {"openable": 0, "receptacle_types": [*OPENABLE, "shelf"]}),
        ("objects", {"objects": 0}),
        ("objects", {"objects": 1}),  # a kind of task needs two
        ("objects", {"objects": 1000}),
    ],
)
def test_a_wrong_setting_is_named(field, keywords):
    with pytest.raises(ConfigError) as caught:
        Household(**keywords)
    assert caught.value.field == f"env.make.{field}"
    assert caught.value.choices or caught.value.remedy


ROOMLESS = {"kinds": ["pick_and_place"], "receptacles": 3, "objects": 1}
CRAMPED = {
    "two types": {"receptacle_types": ["shelf", "desk"], "openable": 0, "copies": 3},
    "one type": {"receptacle_types": ["cabinet"], "openable": 3, "copies": 4},
    "one room": {"receptacle_types": ["shelf", "desk", "sofa"], "openable": 0, "copies": 1},
}


@pytest.fixture
def time_limit():
    def out_of_time(*_):
        raise TimeoutError("the search for a layout does not end")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize("keywords", CRAMPED.values(), ids=CRAMPED)
def test_a_world_with_few_rooms_is_refused_or_has_all_its_tasks(keywords):
    """There is no endless search for a layout."""
    try:
        tasks = Household(**ROOMLESS, **keywords).tasks("dev")
        assert len(list(tasks)) == len(tasks)
    except ConfigError as error:
        assert error.field.startswith("env.make.")


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError):
        world().tasks("trian")


def test_a_list_of_tasks_is_a_sequence():
    tasks = world().tasks("dev")
    assert tasks[-1] == tasks[len(tasks) - 1]
    assert tasks[2:4] == [tasks[2], tasks[3]]
    with pytest.raises(IndexError):
        tasks[len(tasks)]
    assert len(Household(sizes={"dev": 7}).tasks("dev")) == 7
    assert Household(sizes={"dev": 7}).tasks("dev")[:7] == tasks[:7]


def test_settings_decide_the_size_of_rooms():
    made = Household(receptacles=5, openable=2, copies=1, objects=3, kinds=["pick_and_place"])
    for task in made.tasks("train")[:100]:
        places = task.payload["layout"]
        assert len(places) == 5
        assert len({kind_of(place) for place in places}) == 5
        assert sum(kind_of(place) in OPENABLE for place in places) == 2
        assert sum(map(len, places.values())) == 3
