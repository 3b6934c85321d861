"""The rules of the household: its things, its six kinds of task, its wording, and the parsing of responses."""

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from aem_exp.envs import parsing

RULES_VERSION: Final = 3  # raise when the same task would play differently; changes the fingerprint and the splits
OPENABLE: Final = ("cabinet", "drawer", "fridge", "safe", "microwave")
SURFACES: Final = (
    *("shelf", "countertop", "desk", "sofa", "sinkbasin", "diningtable", "sidetable", "coffeetable"),
    *("dresser", "bed", "armchair", "garbagecan"),
)
KITCHEN: Final = ("mug", "plate", "bowl", "cup", "apple", "tomato", "potato", "bread", "egg", "lettuce")
OBJECTS: Final = (*KITCHEN, "book", "cd", "pen", "watch", "keychain", "pillow", "vase", "newspaper")
APPLIANCE: Final = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
STATE_AFTER: Final = {"clean": "clean", "heat": "hot", "cool": "cool"}
GOALS: Final = {
    "pick_and_place": "put a {object} in {target}.",
    "look_at_obj_in_light": "look at {object} under the desklamp.",
    "pick_clean_then_place": "put a clean {object} in {target}.",
    "pick_heat_then_place": "put a hot {object} in {target}.",
    "pick_cool_then_place": "put a cool {object} in {target}.",
    "pick_two_obj_and_place": "put two {object} in {target}.",
}
LAMP: Final = "desklamp 1"
MAX_ACTION_CHARACTERS: Final = 100  # longest action; later prompts quote it

# Phrases that never vary. A word-level tokenizer may encode each as one token, which makes rows shorter.
PHRASES: Final = (
    "You are in the middle of a room. Looking quickly around you, you see",
    ". Your task is to:",
    "You arrive at",
    "You are facing the",
    ". Next to it, you see nothing.",
    ", you see",
    ", you see nothing.",
    "is open. In it, you see",
    "is open. In it, you see nothing.",
    "is closed.",
    "You open the",
    "You close the",
    "You pick up the",
    "You move the",
    "You turn on the",
    "You are carrying: a",
    "You are not carrying anything.",
    "There's nothing special about",
    "This is a",
    "Nothing happens.",
    ". On the",
    ". The",
    ", a",
    ", and a",
    "from the",
    "to the",
    "go to",
    "put a",
    "put two",
    "look at",
    "under the desklamp.",
)
NOTHING: Final = "Nothing happens."
WORDS: Final = (
    *("the", "a", "and", "in", "on", "it", "with", "from", "to", "is", "at", "under", "using", "nothing", "two", "hot"),
    *("go", "open", "close", "take", "move", "use", "put", "look", "inventory", "examine", "clean", "heat", "cool"),
    *("You", "On", "The", "This", ",", ".", ":", "'"),
)
_NAME = r"[a-z]+ \d+"
_GRAMMAR = re.compile(
    rf"look|inventory|(?:go to|open|close|examine|use) {_NAME}|take {_NAME} from {_NAME}"
    rf"|move {_NAME} to {_NAME}|(?:clean|heat|cool) {_NAME} with {_NAME}"
)


class Errand(NamedTuple):
    """The goal of an episode."""

    kind: str
    object: str
    target: str

    @property
    def text(self) -> str:
        return GOALS[self.kind].format(object=self.object, target=self.target)

    @property
    def verb(self) -> str | None:
        """The treatment of the object before it is placed: clean, heat, cool or None."""
        verb = self.kind.split("_")[1]
        return verb if verb in APPLIANCE else None


def kind_of(name: str) -> str:
    """The type of a numbered thing: 'mug 1' is a 'mug'."""
    return name.rsplit(" ", 1)[0]


def format_list(things: Iterable[str]) -> str:
    """A list as ALFWorld writes it: 'a mug 1, and a book 1', or 'nothing'."""
    names = [f"a {thing}" for thing in things]
    if len(names) > 1:
        names[-1] = f"and {names[-1]}"
    return ", ".join(names) or "nothing"


def parse_action(response: str, tags: bool) -> tuple[str, bool]:
    """The action in a response, and whether the response has the form of an action."""
    if tags:
        return parsing.parse_tagged(response, MAX_ACTION_CHARACTERS)
    action, short = parsing.parse_bare(response, MAX_ACTION_CHARACTERS)
    return action, short and _GRAMMAR.fullmatch(action) is not None
