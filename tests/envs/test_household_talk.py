"""The world of `household_talk`: two knobs, each of which sets one entropy of the scripted player and nothing else."""

import copy
import itertools
import re
from collections import Counter
from functools import cache
from math import log
from random import Random
from statistics import mean

import pytest

from aem_exp import tiny
from aem_exp.config import instantiate, load
from aem_exp.core.errors import ConfigError
from aem_exp.demonstrations import play_scripted
from aem_exp.envs.household import HouseholdTalk
from aem_exp.envs.household.talk_env import STATUSES
from aem_exp.envs.household.talk_expert import PHRASINGS, list_sentences, reasonable_actions
from aem_exp.envs.panel import build_panel
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.types import Episode

CHOICES = (1, 2, 3, 4)
KNOBS = list(itertools.product(PHRASINGS, CHOICES))


@cache
def rules():
    return load(["env=household_talk"]).env


@cache
def world(phrasings=4, choices=2, **changes):
    return instantiate(rules().make | {"phrasings": phrasings, "choices": choices} | changes)


@cache
def tokenizer():
    return tiny.make_tokenizer(world().words(), rules(), whole_lines=True)


def play_expert(made, task, seed=0, **keywords):
    """The environment before each response of the scripted player, the responses, and the turns."""
    env, random = made.env(), Random(f"{task.id}-{seed}")
    states, responses, turns = [], [], [env.reset(task)]
    while not turns[-1].done and len(responses) < 40:
        states.append(copy.deepcopy(env))
        responses.append(made.expert(env, random, **keywords))
        turns.append(env.step(responses[-1]))
    return states, responses, turns


# The two entropies.


def entropy(probabilities):
    return -sum(p * log(p) for p in probabilities if p)


def marginal(distribution, part):
    """Entropy of one part of a response: 0 for the sentence, 1 for the action."""
    total = Counter()
    for response, share in distribution.items():
        total[response.split(" <action>")[part]] += share
    return entropy(total.values())


def entropies(made, task):
    """The exact expected entropies of sentences and actions in an episode, summed over turns, and the number of turns.

    They are computed from the distribution of the scripted player, over all episodes that it can play.
    """

    def visit(env, probability):
        if env.won:
            return
        distribution = made.responses(env)
        sentence, action = marginal(distribution, 0), marginal(distribution, 1)
        assert entropy(distribution.values()) == pytest.approx(sentence + action)  # the parts are independent
        sums["turns"] += probability
        sums["sentence"] += probability * sentence
        sums["action"] += probability * action
        sentences = list_sentences(env, made.phrasings)
        for action in reasonable_actions(env):
            after = copy.deepcopy(env)
            after.step(f"{sentences[0]} <action>{action}</action>")
            visit(after, probability * sum(p for r, p in distribution.items() if f"<action>{action}<" in r))

    env, sums = made.env(), Counter()
    env.reset(task)
    visit(env, 1.0)
    return sums


TASKS = range(12)


@cache
def mean_entropies(phrasings, choices):
    """Mean over a few tasks; for the actions: only over the first turn, and over the episode."""
    made = world(phrasings, choices)
    sums = [entropies(made, made.tasks("dev")[i]) for i in TASKS]
    return {key: mean(one[key] for one in sums) for key in ("turns", "sentence", "action")}


@pytest.mark.parametrize("choices", CHOICES)
def test_phrasings_set_the_entropy_of_sentences_only(choices):
    for phrasings in PHRASINGS:
        found = mean_entropies(phrasings, choices)
        assert found["sentence"] / found["turns"] == pytest.approx(log(phrasings), abs=1e-12)
        assert found["action"] == pytest.approx(mean_entropies(1, choices)["action"], abs=1e-12)
        assert found["turns"] == pytest.approx(mean_entropies(1, choices)["turns"], abs=1e-12)


def test_choices_set_the_entropy_of_actions_only():
    for choices in CHOICES:
        made = world(1, choices)
        env = made.env()
        env.reset(made.tasks("dev")[0])
        assert marginal(made.responses(env), 1) == pytest.approx(log(choices))
        assert marginal(world(16, choices).responses(env), 0) == pytest.approx(log(16))
    found = [mean_entropies(1, choices)["action"] for choices in CHOICES]
    assert found[0] == 0
    assert found == sorted(set(found))


def test_the_player_draws_from_its_distribution():
    """The observed frequencies in one state agree, up to five standard deviations."""
    made, random = world(4, 3), Random(0)
    env = made.env()
    env.reset(made.tasks("dev")[0])
    distribution = made.responses(env)
    assert len(distribution) == 12
    assert sum(distribution.values()) == pytest.approx(1)
    drawn = Counter(made.expert(env, random) for _ in range(6000))
    assert set(drawn) == set(distribution)
    assert all(abs(count - 500) < 5 * (500 * 11 / 12) ** 0.5 for count in drawn.values())


@pytest.mark.parametrize("choices", CHOICES)
def test_the_wanted_object_is_equally_likely_in_every_free_place(choices):
    """Before the first turn, the position of the object in the order is uniform, so the player knows nothing about it."""
    made = world(1, choices)
    tasks = made.tasks("train")[:1200]
    found = Counter(
        next(
            i
            for i, place in enumerate(task.payload["order"])
            if task.payload["object"] in task.payload["layout"][place]
        )
        for task in tasks
    )
    assert all(abs(found[i] - 300) < 5 * (300 * 3 / 4) ** 0.5 for i in range(4))


# Matched lengths.


@cache
def lengths(phrasings, choices):
    """Mean number of tokens of prompts and of responses, and of turns, over episodes of the scripted player."""
    made, tok = world(phrasings, choices), tokenizer()
    episodes = [Episode(task, i, 0, ()) for i, task in enumerate(made.tasks("train")[:400])]
    played, _ = play_scripted(made, rules(), Chat(tok), episodes, 0.0, 0.0, Random(0))
    rows = [response for trajectory in played for response in trajectory.responses]
    assert all(tok.unk_token_id not in (*row.prompt, *row.sample.ids) for row in rows)
    return {
        "prompt": mean(len(row.prompt) for row in rows),
        "response": mean(len(row.sample.ids) for row in rows),
        "turns": mean(len(trajectory.responses) for trajectory in played),
        "first prompt": mean(len(trajectory.responses[0].prompt) for trajectory in played),
    }


@pytest.mark.slow
def test_no_knob_changes_a_length():
    """Phrasings change nothing. Choices change the turns in which the object is found, but not their distribution."""
    for choices in CHOICES:
        assert all(lengths(phrasings, choices) == lengths(1, choices) for phrasings in (4, 16))
        assert lengths(1, choices)["first prompt"] == lengths(1, 1)["first prompt"]
        for key, share in {"prompt": 0.01, "response": 0.01, "turns": 0.04}.items():
            assert lengths(1, choices)[key] == pytest.approx(lengths(1, 1)[key], rel=share), key
    assert 20 <= lengths(1, 1)["response"] <= 60


@pytest.mark.parametrize("phrasings", PHRASINGS)
def test_all_sentences_have_the_same_number_of_words(phrasings):
    made = world(phrasings, 2)
    counts = Counter()
    for task in made.tasks("train")[:60]:
        for env in play_expert(made, task, noise=0.3)[0]:
            sentences = list_sentences(env, phrasings)
            assert len(set(sentences)) == phrasings
            counts.update(len(re.findall(r"\w+|[.,]", sentence)) for sentence in sentences)
    assert len(counts) == 1


def test_the_player_acts_equally_with_every_number_of_phrasings():
    for task in world().tasks("train")[:40]:
        played = [play_expert(world(phrasings, 3), task, noise=0.2, shyness=0.2)[1] for phrasings in PHRASINGS]
        actions = [[response.split(" <action>")[1] for response in responses] for responses in played]
        assert all(one == actions[0] for one in actions)


def test_tasks_do_not_depend_on_the_knobs():
    panels = {build_panel(world(phrasings, choices), "dev").hash for phrasings, choices in KNOBS}
    assert len(panels) == 1
    assert len({world(phrasings, choices).fingerprint for phrasings, choices in KNOBS}) == len(KNOBS)


# The player and its thoughts.


@pytest.mark.parametrize("choices", CHOICES)
def test_the_player_wins_within_the_turns(choices):
    for split in ("dev", "test"):
        for task in world(4, choices).tasks(split):
            _, _, turns = play_expert(world(4, choices), task)
            assert turns[-1].metrics["won"] == 1
            assert len(turns) - 1 <= 7 < rules().max_turns
            assert all(turn.valid and turn.metrics["admissible"] and turn.metrics["thought"] for turn in turns[1:])


def test_a_sentence_is_true():
    """Also if the player makes mistakes."""
    seen = Counter()
    for task in world().tasks("train")[:150]:
        states, responses, _ = play_expert(world(), task, noise=0.4, shyness=0.3)
        for env, response in zip(states, responses, strict=True):
            here, held = env.contents.get(env.location, []), env.held_object
            fact = re.search(r"that the (.*?), ", response)[1]
            subject, claim = re.fullmatch(r"(\w+) (is .*)", fact).groups()
            seen[claim.split(" on ")[0]] += 1
            match claim.split():
                case ["is", "not", "found"]:
                    assert subject == env.errand.object
                    assert held is None
                    assert not any(subject in env.contents[place] for place in env.seen)
                case ["is", "right", "here"]:
                    assert subject in here or subject == env.location == env.errand.target
                case ["is", "with", "me"]:
                    assert subject == held == env.errand.object
                case ["is", "not", "needed"]:
                    assert subject == held != env.errand.object
                case ["is", "on", place]:
                    assert subject in env.contents[place]
    assert set(seen) == {"is not found", "is right here", "is with me", "is not needed", "is"}


def test_a_shy_player_does_not_take_the_object():
    for task in world().tasks("train")[:20]:
        _, responses, turns = play_expert(world(), task, shyness=1.0)
        assert not turns[-1].done
        assert not any("<action>take" in response for response in responses)


# The environment.


def open_env(choices=2, **changes):
    made = world(1, choices, **changes)
    env = made.env()
    return env, env.reset(made.tasks("dev")[0])


STATE = r"You are at the \w+ and see [a-z, ]+\. You hold (?:nothing|a \w+)\. Places: (?:\w+ (?:{})(?:, |\.$)){{5}}"


@pytest.mark.parametrize("choices", CHOICES)
def test_an_observation_describes_the_state(choices):
    made = world(1, choices)
    for task in made.tasks("train")[:40]:
        states, _, turns = play_expert(made, task, noise=0.4)
        for env, turn in zip(states, turns, strict=False):
            assert re.fullmatch(STATE.format("|".join(STATUSES)), turn.observation)
            found = Counter(re.findall(rf"\b({'|'.join(STATUSES)})\b", turn.observation.partition("Places")[2]))
            unseen = sum(place not in env.seen for place in env.order)
            assert found["goal"] == 1
            assert found["free"] == min(choices, unseen)
            assert found["free"] + found["busy"] == unseen
            assert env.describe() == turn.observation


def test_a_busy_place_cannot_be_visited():
    env, turn = open_env(choices=1)
    free, busy = env.order[:2]
    assert f"{free} free" in turn.observation
    assert f"{busy} busy" in turn.observation
    after = env.step(f"<action>go to {busy}</action>")
    assert after.observation == turn.observation
    assert after.metrics["admissible"] == 1
    after = env.step(f"<action>go to {free}</action>")
    assert f"You are at the {free}" in after.observation
    assert f"{busy} free" in after.observation


def test_a_place_where_the_object_was_seen_is_found():
    env, _ = open_env()
    env.step(f"<action>go to {env.targets[0]}</action>")
    while env.find_wanted() is None:
        turn = env.step(f"<action>go to {env.free_places()[0]}</action>")
    place = env.location
    assert f"{place} found" in turn.observation
    assert f"{place} found" in env.step(f"<action>go to {env.targets[0]}</action>").observation
    env.step(f"<action>go to {place}</action>")
    turn = env.step(f"<action>take {env.errand.object} from {place}</action>")
    assert f"{place} seen" in turn.observation
    assert f"You hold a {env.errand.object}" in turn.observation


RESPONSES = [  # response, action, has a thought, is valid, is valid if a thought is required
    ("<action>go to {0}</action>", "go to {0}", False, True, False),
    ("I look. <action>go to {0}</action>", "go to {0}", True, True, True),
    ("<think>I look.</think> <action> GO to\n{0} </action>", "go to {0}", True, True, True),
    ("<think></think><action>go to {0}</action>", "go to {0}", False, True, False),
    ("I look. <action>go to {0}</action><action>x</action>", "go to {0}", True, True, True),
    ("I look. <action>dance</action>", "dance", True, True, True),
    ("I look. go to {0}", "i look. go to {0}", False, False, False),
    ("I look. <action>go to {0}", "ook. <action>go to {0}", True, False, False),
    ("去 <action>go to {0}</action>", "go to {0}", True, False, False),
]


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(("text", "action", "thought", "valid", "strict"), RESPONSES)
def test_responses(text, action, thought, valid, strict, required):
    env, _ = open_env(thought_required=required)
    place = env.free_places()[0]
    response = text.format(place)
    assert env.parse(response).endswith(action.format(place)[-20:])
    turn = env.step(response)
    assert turn.valid == (strict if required else valid)
    assert turn.metrics["thought"] == thought
    assert turn.metrics["admissible"] == (action == "go to {0}")


def test_fingerprint_and_panels_do_not_change():
    """If the tasks change, the fingerprint must change, too."""
    made = world()
    assert (made.fingerprint, build_panel(made, "dev").hash, build_panel(made, "test").hash) == PANELS


PANELS = ("household-talk-1-b654e68a2459", "3d4f1d3c6614", "fb27a15f801b")


@pytest.mark.slow
def test_goals_and_rooms_of_splits_are_disjoint():
    splits = {split: list(world().tasks(split)) for split in ("train", "dev", "test")}
    for trait in (
        lambda task: (task.payload["object"], task.payload["target"]),
        lambda task: frozenset((place, tuple(sorted(things))) for place, things in task.payload["layout"].items()),
    ):
        seen = {split: {trait(task) for task in tasks} for split, tasks in splits.items()}
        assert not seen["train"] & (seen["dev"] | seen["test"])
        assert not seen["dev"] & seen["test"]


@pytest.mark.parametrize(
    ("field", "keywords"),
    [
        ("phrasings", {"phrasings": 3}),
        ("phrasings", {"phrasings": 32}),
        ("choices", {"choices": 0}),
        ("choices", {"choices": 5}),
        ("receptacle_types", {"receptacle_types": ["shelf", "desk", "bed", "cabinet", "sofa"]}),
        ("receptacle_types", {"receptacle_types": ["attic"]}),
        ("receptacles", {"receptacles": 2}),
        ("objects", {"objects": 5, "object_types": ["book", "pen", "cup", "mug"]}),
        ("sizes.dve", {"sizes": {"dve": 3}}),
    ],
)
def test_a_wrong_setting_is_named(field, keywords):
    with pytest.raises(ConfigError) as caught:
        HouseholdTalk(**keywords)
    assert caught.value.field == f"env.make.{field}"
    assert caught.value.choices or caught.value.remedy
