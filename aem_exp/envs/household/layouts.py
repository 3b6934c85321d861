"""Draws layouts (the receptacles of a room and the place of every object) and decides the split of each layout."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from aem_exp.envs.household.rules import APPLIANCE, LAMP, OPENABLE, RULES_VERSION, SURFACES, Errand, kind_of

SPLITS: Final = {"train": range(6), "dev": range(6, 8), "test": range(8, 10)}  # tenths of goals and of layouts


@dataclass(frozen=True)
class RoomSize:
    """The size of rooms, and the types in them. `Household` describes each field."""

    receptacles: int
    openable: int
    copies: int
    objects: int
    receptacle_types: Sequence[str]
    object_types: Sequence[str]


def digest(thing: Any) -> bytes:
    """A hash that is the same on every machine."""
    return hashlib.sha256(json.dumps([RULES_VERSION, thing], sort_keys=True).encode()).digest()


def split_of(layout: Mapping[str, Sequence[str]]) -> str:
    """The split of a layout. The order of the things in a receptacle does not matter."""
    tenth = digest({place: sorted(things) for place, things in layout.items()})[0] % 10
    return next(split for split, share in SPLITS.items() if tenth in share)


def draw_layout(errand: Errand, size: RoomSize, random: Random) -> dict[str, list[str]]:
    """A random layout in which the errand is possible and not yet done; empty if this draw has none."""
    places = _draw_places(errand, size, random)
    layout: dict[str, list[str]] = {place: [] for place in places}
    elsewhere = [place for place in places if kind_of(place) != errand.target]
    if not elsewhere:
        return {}  # the object would already be at its target
    wanted = [errand.object] * (2 if errand.kind == "pick_two_obj_and_place" else 1)
    other_types = [kind for kind in size.object_types if kind != errand.object]
    others = random.choices(other_types, k=size.objects - len(wanted)) if other_types else []
    for thing in _number_names([*wanted, *others]):
        layout[random.choice(elsewhere if kind_of(thing) == errand.object else places)].append(thing)
    if errand.kind == "look_at_obj_in_light":
        layout[random.choice(places)].append(LAMP)
    return layout


def _draw_places(errand: Errand, size: RoomSize, random: Random) -> list[str]:
    """The receptacles of a room: those that the errand needs, and random others."""
    kinds = [] if errand.kind == "look_at_obj_in_light" else [errand.target]
    kinds += [APPLIANCE[errand.verb]] if errand.verb else []
    for pool, count in ((OPENABLE, size.openable), (SURFACES, size.receptacles - size.openable)):
        spare = [kind for kind in size.receptacle_types if kind in pool] * size.copies
        for kind in kinds:
            if kind in spare:
                spare.remove(kind)
        missing = count - sum(kind in pool for kind in kinds)
        kinds = kinds + random.sample(spare, max(0, min(missing, size.receptacles - len(kinds))))
    random.shuffle(kinds)
    places = _number_names(kinds)
    random.shuffle(places)
    return places


def _number_names(kinds: Iterable[str]) -> list[str]:
    """Number the things of each type: mug 1, mug 2, book 1."""
    counts: dict[str, int] = {}
    names = []
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
        names.append(f"{kind} {counts[kind]}")
    return names
