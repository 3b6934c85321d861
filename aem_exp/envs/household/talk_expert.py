"""The scripted player of `household_talk`: the reasonable actions of a state, and the sentences that say what it knows and needs.

A sentence follows from the state alone, and it is true. It does not say which of several reasonable actions comes next.
"""

from itertools import product
from typing import Final

from aem_exp.envs.household.rules import kind_of
from aem_exp.envs.household.talk_env import TalkEnv

# Two words of equal meaning for each of four positions in a sentence. With 2 ** k phrasings, the first k positions vary.
SYNONYMS: Final = (("Okay", "Right"), ("see", "know"), ("so", "thus"), ("should", "must"))
PHRASINGS: Final = tuple(2**k for k in range(len(SYNONYMS) + 1))
SENTENCE: Final = "{0}, I {1} that the {fact}, {2} I {3} {plan}."
# (fact, plan) of each stage of an errand. All sentences have the same number of words.
STAGES: Final = {
    "search": ("{object} is not found", "look in a free place"),
    "return": ("{thing} is on {place}", "go back to the {place}"),
    "take": ("{thing} is right here", "take it from the {place}"),
    "carry": ("{thing} is with me", "bring it to the {place}"),
    "put": ("{place} is right here", "put the {thing} on it"),
    "drop": ("{thing} is not needed", "put it on the {place}"),
}


def reasonable_actions(env: TalkEnv) -> list[str]:
    """The best actions in a state. They are equally good for a player that knows only what the episode has shown."""
    stage, thing, place = _read_stage(env)
    match stage:
        case "search":
            return [env.go_actions[place] for place in env.free_places()]
        case "return" | "carry":
            return [env.go_actions[place]]
        case "take":
            return [f"take {thing} from {place}"]
    return [f"move {thing} to {place}"]


def list_sentences(env: TalkEnv, phrasings: int) -> list[str]:
    """All phrasings of the thought in a state."""
    stage, thing, place = _read_stage(env)
    fact, plan = (text.format(object=env.errand.object, thing=thing, place=place) for text in STAGES[stage])
    varied = PHRASINGS.index(phrasings)
    words = [pair if i < varied else pair[:1] for i, pair in enumerate(SYNONYMS)]
    return [SENTENCE.format(*chosen, fact=fact, plan=plan) for chosen in product(*words)]


def _read_stage(env: TalkEnv) -> tuple[str, str, str]:
    """The stage of the errand, and the object and the receptacle that it is about ("" if none)."""
    held, here = env.held_object, env.location
    if held is not None and here is not None:
        if kind_of(held) != env.errand.object:
            return "drop", held, here
        target = env.targets[0]
        return ("put" if here == target else "carry"), held, target
    found = env.find_wanted()
    if found is None:
        return "search", "", ""
    thing = next(thing for thing in env.contents[found] if kind_of(thing) == env.errand.object)
    return ("take" if here == found else "return"), thing, found
