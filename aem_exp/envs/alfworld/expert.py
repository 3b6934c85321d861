"""A scripted ALFWorld expert: it searches for the object, treats it and brings it to the target.

It knows only the observations of its episode, and it reads both old games (`put .. in/on ..`) and new ones (`move .. to ..`).
"""

import re
from collections.abc import Sequence
from random import Random
from typing import Final

from aem_exp.envs.alfworld.games import GameErrand

TREATMENTS: Final = {"clean": "clean", "heat": "hot", "cool": "cool"}
_SEEN: Final = re.compile(r"(?:On|The) (?:the )?([a-z]+ \d+)(?: is open. In it)?, you see (.*?)\.")
_HERE: Final = re.compile(r"You arrive at ([a-z]+ \d+)")
_TOOK: Final = re.compile(r"You pick up the ([a-z]+ \d+) from the ([a-z]+ \d+)")
_LEFT: Final = re.compile(r"You (?:move|put) the ([a-z]+ \d+) (?:to|in/on|in|on) the ([a-z]+ \d+)")
_TREAT: Final = re.compile(r"You (clean|heat|cool) the ([a-z]+ \d+) using")


class EpisodeMemory:
    """What the observations of an episode have shown: the agent's place and object, contents of receptacles, and treatments."""

    def __init__(self, observations: Sequence[str], places: Sequence[str]):
        self.location, self.held_object = "", ""
        self.places = list(places)
        self.contents: dict[str, list[str]] = {}  # of receptacles that were seen open
        self.treatments: dict[str, set[str]] = {}  # thing -> clean, heat, cool
        for text in observations:
            self._read_observation(text)

    def _read_observation(self, text: str) -> None:
        if match := _HERE.search(text):
            self.location = match[1]
        if match := _TOOK.search(text):
            self.held_object = match[1]
            self.contents[match[2]].remove(match[1])
        if match := _LEFT.search(text):
            self.held_object = ""
            self.contents.setdefault(match[2], []).append(match[1])
        if match := _TREAT.search(text):
            states = self.treatments.setdefault(match[2], set())
            if match[1] != "clean":
                states -= {"heat", "cool"}  # a thing is never both hot and cool
            states.add(match[1])
        for place, things in _SEEN.findall(text):
            if place in self.places:
                self.contents[place] = re.findall(r"\ba ([a-z]+ \d+)", things)

    def find(self, kind: str) -> list[tuple[str, str]]:
        """(thing, place) for each thing of a type that was seen in a receptacle."""
        return [(thing, place) for place, things in self.contents.items() for thing in things if kind_of(thing) == kind]


def kind_of(name: str) -> str:
    return name.rpartition(" ")[0]


def next_command(memory: EpisodeMemory, commands: Sequence[str], errand: GameErrand, random: Random) -> str:
    """The next of the admissible commands towards the errand."""
    wanted, target = errand.object.lower(), errand.target.lower()
    verb = next((verb for verb in TREATMENTS if f"_{verb}_" in errand.kind), "")
    if memory.held_object and kind_of(memory.held_object) != wanted:  # picked up by mistake
        return _first_match(commands, f"move {memory.held_object} ", f"put {memory.held_object} ") or _wander(
            commands, random
        )
    if not memory.held_object:
        settled = _find_filled_target(memory, target, wanted) if errand.kind == "pick_two_obj_and_place" else []
        for thing, place in memory.find(wanted):
            if place not in settled and not (
                verb and kind_of(place) == target and verb in memory.treatments.get(thing, ())
            ):
                return _first_match(commands, f"take {thing} from {place}") or _go_to(place, memory, commands, random)
        return _explore(memory, commands, random, last=target)
    if errand.kind == "look_at_obj_in_light":
        for lamp, place in memory.find(target):
            return _first_match(commands, f"use {lamp}") or _go_to(place, memory, commands, random)
        return _explore(memory, commands, random)
    if verb and verb not in memory.treatments.get(memory.held_object, ()):
        return _first_match(commands, f"{verb} {memory.held_object} with ") or _go_to_kind(
            APPLIANCE[verb], memory, commands, random
        )
    filled = _find_filled_target(memory, target, wanted)  # the second of two objects goes to the place of the first
    if place := next(iter(filled), memory.location if kind_of(memory.location) == target else ""):
        put = (
            _first_match(commands, f"move {memory.held_object} ", f"put {memory.held_object} ")
            if memory.location == place
            else ""
        )
        return put or _go_to(place, memory, commands, random)
    return _go_to_kind(target, memory, commands, random)


APPLIANCE: Final = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}


def _find_filled_target(memory: EpisodeMemory, target: str, wanted: str) -> list[str]:
    """The first receptacle of the target's type that already contains a wanted object; empty if there is none."""
    filled = [place for _, place in memory.find(wanted) if kind_of(place) == target]
    return filled[:1]


def _go_to_kind(kind: str, memory: EpisodeMemory, commands: Sequence[str], random: Random) -> str:
    """The next command to go to any receptacle of a type."""
    places = [place for place in memory.places if kind_of(place) == kind]
    return _go_to(random.choice(places), memory, commands, random) if places else _wander(commands, random)


def _go_to(place: str, memory: EpisodeMemory, commands: Sequence[str], random: Random) -> str:
    """The next command to reach a receptacle and open it."""
    if memory.location == place:
        return _first_match(commands, f"open {place}") or _wander(commands, random)
    return (
        _first_match(commands, f"go to {place}") or _first_match(commands, f"open {place}") or _wander(commands, random)
    )


def _explore(memory: EpisodeMemory, commands: Sequence[str], random: Random, last: str = "") -> str:
    """Open the current receptacle, else go to an unseen one. Type `last` comes last: the wanted object is never there."""
    unseen = [place for place in memory.places if place not in memory.contents]
    if memory.location in unseen and (opened := _first_match(commands, f"open {memory.location}")):
        return opened
    places = [place for place in unseen if place != memory.location]
    places = [place for place in places if kind_of(place) != last] or places or memory.places
    return _first_match(commands, f"go to {random.choice(places)}") or _wander(commands, random)


def _first_match(commands: Sequence[str], *starts: str) -> str:
    return next((one for start in starts for one in commands if one == start or one.startswith(start)), "")


def _wander(commands: Sequence[str], random: Random) -> str:
    return random.choice([one for one in commands if one.startswith("go to")] or list(commands))
