"""A scripted player of ALFWorld who knows only what an episode has shown: it looks for the thing, treats it, brings it.

It reads the game's own words, of old data (`put .. in/on ..`) and new (`move .. to ..`) alike, and wins every kind of task.
"""

import re
from collections.abc import Sequence
from random import Random
from typing import Final

from aem_exp.envs.alfworld.games import Errand

TREATED: Final = {"clean": "clean", "heat": "hot", "cool": "cool"}
_SEEN: Final = re.compile(r"(?:On|The) (?:the )?([a-z]+ \d+)(?: is open. In it)?, you see (.*?)\.")
_SHUT: Final = re.compile(r"The ([a-z]+ \d+) is closed")
_HERE: Final = re.compile(r"You arrive at ([a-z]+ \d+)")
_TOOK: Final = re.compile(r"You pick up the ([a-z]+ \d+) from the ([a-z]+ \d+)")
_LEFT: Final = re.compile(r"You (?:move|put) the ([a-z]+ \d+) (?:to|in/on|in|on) the ([a-z]+ \d+)")
_TREAT: Final = re.compile(r"You (clean|heat|cool) the ([a-z]+ \d+) using")


class Memory:
    """What the words of an episode tell: where one stands, what one holds, what lies where, what was done to it."""

    def __init__(self, heard: Sequence[str], places: Sequence[str]):
        self.here, self.held = "", ""
        self.places = list(places)
        self.inside: dict[str, list[str]] = {}  # of receptacles that were looked into
        self.done: dict[str, set[str]] = {}  # thing -> clean, heat, cool
        for text in heard:
            self._hear(text)

    def _hear(self, text: str) -> None:
        if found := _HERE.search(text):
            self.here = found[1]
        if found := _TOOK.search(text):
            self.held = found[1]
            self.inside[found[2]].remove(found[1])
        if found := _LEFT.search(text):
            self.held = ""
            self.inside.setdefault(found[2], []).append(found[1])
        if found := _TREAT.search(text):
            states = self.done.setdefault(found[2], set())
            if found[1] != "clean":
                states -= {"heat", "cool"}  # a thing is never both
            states.add(found[1])
        for place, things in _SEEN.findall(text):
            if place in self.places:
                self.inside[place] = re.findall(r"\ba ([a-z]+ \d+)", things)

    def where(self, kind: str) -> list[tuple[str, str]]:
        """(thing, place) for all things of a type that were seen and lie somewhere."""
        return [(thing, place) for place, things in self.inside.items() for thing in things if kind_of(thing) == kind]


def kind_of(name: str) -> str:
    return name.rpartition(" ")[0]


def command(memory: Memory, commands: Sequence[str], errand: Errand, random: Random) -> str:
    """The next command of the errand, among those that are admissible."""
    wanted, target = errand.object.lower(), errand.target.lower()
    verb = next((verb for verb in TREATED if f"_{verb}_" in errand.kind), "")
    if memory.held and kind_of(memory.held) != wanted:  # picked up by mistake
        return _first(commands, f"move {memory.held} ", f"put {memory.held} ") or _wander(commands, random)
    if not memory.held:
        settled = _settled(memory, target, wanted) if errand.kind == "pick_two_obj_and_place" else []
        for thing, place in memory.where(wanted):
            if place not in settled and not (verb and kind_of(place) == target and verb in memory.done.get(thing, ())):
                return _first(commands, f"take {thing} from {place}") or _to(place, memory, commands, random)
        return _explore(memory, commands, random, last=target)
    if errand.kind == "look_at_obj_in_light":
        for lamp, place in memory.where(target):
            return _first(commands, f"use {lamp}") or _to(place, memory, commands, random)
        return _explore(memory, commands, random)
    if verb and verb not in memory.done.get(memory.held, ()):
        return _first(commands, f"{verb} {memory.held} with ") or _approach(APPLIANCE[verb], memory, commands, random)
    there = _settled(memory, target, wanted)  # the second of two goes where the first is
    if place := next(iter(there), memory.here if kind_of(memory.here) == target else ""):
        put = _first(commands, f"move {memory.held} ", f"put {memory.held} ") if memory.here == place else ""
        return put or _to(place, memory, commands, random)
    return _approach(target, memory, commands, random)


APPLIANCE: Final = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}


def _settled(memory: Memory, target: str, wanted: str) -> list[str]:
    """Receptacles of the target's type that hold the wanted thing already: the first of them, if any."""
    found = [place for _, place in memory.where(wanted) if kind_of(place) == target]
    return found[:1]


def _approach(kind: str, memory: Memory, commands: Sequence[str], random: Random) -> str:
    """Go to a receptacle of a type."""
    places = [place for place in memory.places if kind_of(place) == kind]
    return _to(random.choice(places), memory, commands, random) if places else _wander(commands, random)


def _to(place: str, memory: Memory, commands: Sequence[str], random: Random) -> str:
    """The next command towards standing before a receptacle, and having it open."""
    if memory.here == place:
        return _first(commands, f"open {place}") or _wander(commands, random)
    return _first(commands, f"go to {place}") or _first(commands, f"open {place}") or _wander(commands, random)


def _explore(memory: Memory, commands: Sequence[str], random: Random, last: str = "") -> str:
    """Open what is before one, else go where one has not been; the target last, for nothing wanted lies there."""
    unseen = [place for place in memory.places if place not in memory.inside]
    if memory.here in unseen and (opened := _first(commands, f"open {memory.here}")):
        return opened
    places = [place for place in unseen if place != memory.here]
    places = [place for place in places if kind_of(place) != last] or places or memory.places
    return _first(commands, f"go to {random.choice(places)}") or _wander(commands, random)


def _first(commands: Sequence[str], *starts: str) -> str:
    return next((one for start in starts for one in commands if one == start or one.startswith(start)), "")


def _wander(commands: Sequence[str], random: Random) -> str:
    return random.choice([one for one in commands if one.startswith("go to")] or list(commands))
