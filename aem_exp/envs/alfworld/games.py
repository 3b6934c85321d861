"""Generates ALFWorld games of all six kinds from a kind and a seed, with the domain and grammar of the installed package.

A generated game has the same fields as an official one. There are no sliced objects, and no two receptacles share a location.
"""

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any, Final, NamedTuple

from aem_exp.core.errors import ConfigError
from aem_exp.envs.alfworld import grammar
from aem_exp.envs.alfworld.facts import display_names
from aem_exp.envs.alfworld.library import check_installed

RULES_VERSION: Final = 1  # raise when the same kind and seed would give another game
ROOMS: Final = {  # room -> its receptacles, with their numbers
    "Kitchen": "Fridge Microwave SinkBasin CounterTop*3 Cabinet*10 Drawer*6 DiningTable GarbageCan CoffeeMachine Toaster "
    "StoveBurner*4 Shelf*3",
    "Bedroom": "Desk*2 Bed Dresser GarbageCan Safe LaundryHamper ArmChair Drawer*8 Shelf*6 SideTable*2 Cabinet*6",
    "LivingRoom": "Sofa CoffeeTable*2 SideTable*3 ArmChair*2 Drawer*8 Shelf*5 Cabinet*6 Dresser DiningTable GarbageCan Safe",
    "Bathroom": "SinkBasin*2 Toilet BathtubBasin CounterTop*2 Cabinet*8 Drawer*6 Shelf*4 GarbageCan HandTowelHolder*2 "
    "ToiletPaperHanger SideTable",
}
APPLIANCES: Final = {"Clean": "SinkBasin", "Heat": "Microwave", "Cool": "Fridge"}
KINDS: Final = {  # kind -> rooms, and the treatment of the object
    "pick_and_place_simple": (tuple(ROOMS), None),
    "look_at_obj_in_light": (("Bedroom", "LivingRoom"), None),
    "pick_clean_then_place_in_recep": (("Kitchen", "Bathroom"), "Clean"),
    "pick_heat_then_place_in_recep": (("Kitchen",), "Heat"),
    "pick_cool_then_place_in_recep": (("Kitchen",), "Cool"),
    "pick_two_obj_and_place": (tuple(ROOMS), None),
}
LAMP: Final = "DeskLamp"
LAMP_PLACES: Final = ("Desk", "SideTable", "CoffeeTable", "Dresser", "Shelf")  # receptacles that may have a lamp
MAX_RECEPTACLES: Final = min(
    len([0 for word in text.split() for _ in range(int(word.partition("*")[2] or 1))]) for text in ROOMS.values()
)


class GameErrand(NamedTuple):
    """The goal of a game. If the object must be examined in light, `target` is the type of the lamp."""

    kind: str
    object: str
    target: str


@dataclass(frozen=True)
class HouseFacts:
    """ALFWorld's facts about the things in a house, read from the files of its package."""

    domain: str
    """The domain, in PDDL."""
    grammar: str
    """The grammar, in TextWorld's format."""
    goals: Mapping[str, Mapping[str, Any]]
    """Kind of task -> its goal in PDDL, and sentence templates for it."""
    holds: Mapping[str, Sequence[str]]
    """Receptacle -> objects that fit into it."""
    takes: Mapping[str, Sequence[str]]
    """Property (Cleanable, Heatable, ...) -> objects that have it."""
    openable: Sequence[str]
    """Receptacles that can be opened."""
    movable: Sequence[str]
    """Objects that are also receptacles."""

    @property
    def fingerprint(self) -> str:
        text = json.dumps(
            [self.goals, self.holds, self.takes, self.openable, self.movable, KINDS, ROOMS], sort_keys=True
        )
        return hashlib.sha256(
            f"{RULES_VERSION} {grammar.fingerprint(self.domain, self.grammar)} {text}".encode()
        ).hexdigest()[:12]


@cache
def load_facts() -> HouseFacts:
    check_installed()
    spec = importlib.util.find_spec("alfworld")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    constants = _import_file(folder / "gen" / "constants.py")
    goals = _import_file(folder / "gen" / "goal_library.py").gdict
    unsliced = {
        place: sorted(o for o in things if "Sliced" not in o)
        for place, things in constants.VAL_RECEPTACLE_OBJECTS.items()
    }
    movable = sorted(constants.MOVABLE_RECEPTACLES)
    return HouseFacts(
        domain=(folder / "data" / "alfred.pddl").read_text(),
        grammar=(folder / "data" / "alfred.twl2").read_text(),
        goals={kind: goals[kind] for kind in KINDS},
        holds={place: things for place, things in sorted(unsliced.items()) if place not in movable},
        takes={verb: sorted(things) for verb, things in sorted(constants.VAL_ACTION_OBJECTS.items())},
        openable=sorted(constants.OPENABLE_CLASS_LIST),
        movable=movable,
    )


def _import_file(file: Path) -> ModuleType:
    """Import one file of the package. Importing the package itself would create folders in the user's home."""
    spec = importlib.util.spec_from_file_location(f"_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generate_game(kind: str, seed: str, receptacles: int, objects: int) -> tuple[dict[str, Any], GameErrand]:
    """A game of a kind, and its goal. The same arguments give the same game.

    Args:
        receptacles, objects: their numbers; an official game has up to 28 and 45.

    Raises:
        ConfigError: there are too few receptacles.
    """
    random = Random(f"{kind} {seed}")  # a string is the same seed on every machine and Python version
    for _ in range(1000):
        house = _GameBuilder(kind, random, receptacles, objects)
        if house.is_possible:
            return house.build_game(), house.errand
    raise ConfigError("env.make.receptacles", receptacles, f"too few for a game of {kind}")


class _GameBuilder:
    """Draws one room, its errand and its objects; `is_possible` says whether this draw has a solution."""

    def __init__(self, kind: str, random: Random, receptacles: int, objects: int):
        self.random, self.facts = random, load_facts()
        rooms, verb = KINDS[kind]
        stock = [place for word in ROOMS[random.choice(rooms)].split() for place in _repeat_place(word)]
        needed = [APPLIANCES[verb]] if verb else []
        needs_lamp = kind == "look_at_obj_in_light"
        treatable = (
            self.facts.takes[f"{verb}able"]
            if verb
            else sorted({thing for things in self.facts.holds.values() for thing in things})
        )
        target = random.choice(sorted(set(stock) & set(LAMP_PLACES) if needs_lamp else set(stock) - set(needed)))
        fitting = [
            thing for thing in treatable if thing != LAMP and (needs_lamp or thing in self.facts.holds.get(target, ()))
        ]
        wanted = random.choice(fitting or [""])
        needed.append(target)
        for place in needed:
            stock.remove(place)
        self.places = needed + random.sample(stock, max(0, receptacles - len(needed)))
        random.shuffle(self.places)
        self.errand = GameErrand(kind, wanted, LAMP if needs_lamp else target)
        self.things: list[tuple[str, int]] = []
        starts = self._find_places(wanted, avoid=None if needs_lamp else target)
        self.is_possible = bool(wanted and starts)
        if self.is_possible:
            self._place_objects(wanted, starts, objects, target if needs_lamp else None)
        self.sentence = random.choice(self.facts.goals[kind]["templates"]).format(
            obj=wanted.lower(), recep=target.lower(), toggle=LAMP.lower()
        )

    def _find_places(self, thing: str, avoid: str | None = None) -> list[int]:
        return [i for i, p in enumerate(self.places) if thing in self.facts.holds.get(p, ()) and p != avoid]

    def _place_objects(self, wanted: str, starts: list[int], objects: int, lamp_on: str | None) -> None:
        copies = 2 if self.errand.kind == "pick_two_obj_and_place" else 1
        self.things = [(wanted, self.random.choice(starts)) for _ in range(copies)]
        if lamp_on:
            self.things.append((LAMP, self.places.index(lamp_on)))
        others = sorted({o for place in self.places for o in self.facts.holds.get(place, ())} - {wanted, LAMP})
        while others and len(self.things) < objects:
            thing = self.random.choice(others)
            self.things.append((thing, self.random.choice(self._find_places(thing))))

    def build_game(self) -> dict[str, Any]:
        places = [_make_id(place, self.random) for place in self.places]
        things = [_make_id(thing, self.random) for thing, _ in self.things]
        return {
            "pddl_domain": self.facts.domain,
            "grammar": self.facts.grammar.replace("UNKNOWN GOAL", self.sentence),
            "pddl_problem": self._write_problem(places, things),
            "solvable": True,
            "walkthrough": self._walkthrough(places, things),
        }

    def _write_problem(self, places: list[str], things: list[str]) -> str:
        spots = [f"loc_bar_{i}_bar_1_bar_0_bar_30" for i in range(len(places))]
        start = "loc_bar_minus_1_bar_1_bar_0_bar_30"  # with no receptacle: "in the middle of a room"
        otypes, rtypes = sorted({thing for thing, _ in self.things}), list(self.facts.holds)
        declared = {
            "agent": ["agent1"],
            "object": things,
            "otype": [f"{one}Type" for one in otypes],
            "rtype": [f"{one}Type" for one in rtypes],
            "receptacle": places,
            "location": [*spots, start],
        }
        init = ["= (total-cost) 0", f"atLocation agent1 {start}"]
        for place, kind, spot in zip(places, self.places, spots, strict=True):
            init += [f"receptacleType {place} {kind}Type", f"receptacleAtLocation {place} {spot}"]
            init += [f"openable {place}"] if kind in self.facts.openable else []
        for thing, (kind, where) in zip(things, self.things, strict=True):
            init += [f"objectType {thing} {kind}Type", f"inReceptacle {thing} {places[where]}"]
            init += [f"objectAtLocation {thing} {spots[where]}"]
            init += [f"{'toggleable' if kind == LAMP else 'pickupable'} {thing}"]
            init += [f"isReceptacleObject {thing}"] if kind in self.facts.movable else []
            init += [
                f"{verb.lower()} {thing}" for verb, types in self.facts.takes.items() if kind in types and kind != LAMP
            ]
        init += [f"canContain {r}Type {o}Type" for r in rtypes for o in otypes if o in self.facts.holds[r]]
        objects = "\n".join(f"{one} - {kind}" for kind, ids in declared.items() for one in ids)
        facts_text = "\n".join(f"({fact})" for fact in init)
        goal = self.facts.goals[self.errand.kind]["pddl"].replace("#", "-")
        goal = goal.format(obj=self.errand.object, recep=self.errand.target, toggle=LAMP).rstrip()
        assert goal.endswith(")")  # closes the problem; the metric goes before it
        metric = "(:metric minimize (total-cost))"
        return f"(define (problem made)\n(:domain alfred)\n(:objects\n{objects})\n(:init\n{facts_text})\n{goal[:-1]}{metric})"

    def _walkthrough(self, places: list[str], things: list[str]) -> list[str]:
        """Commands that win the game."""
        names = display_names([one.lower() for one in (*places, *things)])
        place, thing = ([names[one.lower()] for one in ids] for ids in (places, things))
        verb, steps = KINDS[self.errand.kind][1], list[str]()
        location, opened = -1, set[int]()

        def go(target: int, look_in: bool = True) -> None:
            nonlocal location
            steps.extend([f"go to {place[target]}"] if target != location else [])
            location = target
            if look_in and self.places[target] in self.facts.openable and target not in opened:
                steps.append(f"open {place[target]}")
                opened.add(target)

        for i in range(2 if self.errand.kind == "pick_two_obj_and_place" else 1):
            go(self.things[i][1])
            steps.append(f"take {thing[i]} from {place[location]}")
            if self.errand.target == LAMP:
                go(self.things[1][1], look_in=False)
                return [*steps, f"use {thing[1]}"]
            if verb:
                go(self.places.index(APPLIANCES[verb]), look_in=False)
                steps.append(f"{verb.lower()} {thing[i]} with {place[location]}")
            go(self.places.index(self.errand.target))
            steps.append(f"move {thing[i]} to {place[location]}")
        return steps


def _repeat_place(word: str) -> list[str]:
    place, _, count = word.partition("*")
    return [place] * int(count or 1)


def _make_id(kind: str, random: Random) -> str:
    """An id as in ALFRED: a type and a position."""
    where = "_bar_".join(
        f"{random.choice(('_plus_', '_minus_'))}{random.randrange(10):02d}_dot_{random.randrange(100):02d}"
        for _ in range(3)
    )
    outer, basin, _ = kind.partition("Basin")
    return f"{outer}_bar_{where}_bar_{kind}" if basin else f"{kind}_bar_{where}"
