"""The vocabulary of a small policy for the generated games."""

from typing import Final

from aem_exp.envs.alfworld import games
from aem_exp.envs.household import rules as household

PHRASES: Final = (  # phrases of the engine that the household does not have
    "-= Welcome to TextWorld, ALFRED! =-",
    "Your task is to:",
    "You are facing the",
    ". Next to it, you see",
    "you see nothing.",
    "This is a normal",
    "put some",
    "put a clean",
    "put a hot",
    "put a cool",
    "and put it in",
    "and put them in",
    "find two",
    "clean some",
    "heat some",
    "cool some",
    "look at",
    "examine the",
    "with the",
    "some",
    "them",
    "put",
    "use",
    "slice",
    "Next",
    "some",
    "find",
)


def words(receptacles: int) -> tuple[str, ...]:
    """All words, and the phrases that may be one token each. Names are numbered up to the number of receptacles."""
    facts = games.load_facts()
    places = [place.lower() for place in facts.holds]
    things = [thing.lower() for thing in sorted({thing for fitting in facts.holds.values() for thing in fitting})]
    numbers = [str(n) for n in range(receptacles + 1)]
    names = [f"{kind} {number}" for kind in (*places, *things, games.LAMP.lower()) for number in numbers[1:]]
    return (*PHRASES, *household.PHRASES, *household.WORDS, *places, *things, *names, *numbers)
