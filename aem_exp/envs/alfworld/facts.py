"""The facts of a game, queries over them, and the display names of things."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aem_exp.envs.alfworld.grammar import Predicate

Var = tuple[str, str]  # name and type of a variable or a placeholder
Fact = tuple[str, tuple[str, ...], tuple[str, ...]]  # predicate, types, names
ListSubtypes = Callable[[tuple[str, ...]], list[tuple[str, ...]]]  # types -> all combinations of their subtypes


def negate(predicate: str) -> str:
    return predicate.removeprefix("not_") if predicate.startswith("not_") else f"not_{predicate}"


def restore_case(name: str) -> str:
    return name.upper() if name in ("i", "p") else name


class Entity(NamedTuple):
    """The attributes of a thing that a grammar can use."""

    id: str
    name: str
    definite: str = "the"
    indefinite: str = "a"


def display_names(ids: Sequence[str]) -> dict[str, str]:
    """Id -> name: `mug_bar__plus_01_dot_23_bar_...` becomes `mug 3`.

    The numbers are ALFWorld's own: they count down in the order of the ids. If the id of a sink contains its basin, so does
    the name.
    """
    kinds = {one: one.split("_bar_", 1)[0] + ("basin" if "basin" in one else "") for one in ids if "_bar_" in one}
    left: dict[str, int] = {}
    for kind in kinds.values():
        left[kind] = left.get(kind, 0) + 1
    names = {}
    for one in sorted(ids):
        if one in kinds:
            names[one] = f"{kinds[one]} {left[kinds[one]]}"
            left[kinds[one]] -= 1
        else:
            names[one] = f"{_unescape(one)} "
    return names


def _unescape(name: str) -> str:
    for word, sign in (("_minus_", "-"), ("_plus_", "+"), ("_dot_", "."), ("_comma_", ",")):
        name = name.replace(word, sign)
    return name


class Facts:
    """The facts that are true in a game."""

    def __init__(self, list_subtypes: ListSubtypes, facts: Sequence[Fact]):
        self._list_subtypes = list_subtypes
        self._true: dict[tuple[str, tuple[str, ...]], set[tuple[str, ...]]] = {}
        for fact in facts:
            self.add(fact)

    def add(self, fact: Fact) -> None:
        self._true.setdefault(fact[:2], set()).add(fact[2])

    def remove(self, fact: Fact) -> None:
        self._true.get(fact[:2], set()).discard(fact[2])

    def entities(self) -> dict[str, Entity]:
        things = dict.fromkeys(name for facts in self._true.values() for fact in facts for name in fact)
        return {one: Entity(one, name) for one, name in display_names(list(things)).items()}

    def find_mappings(self, query: "Sequence[Predicate]", mapping: dict[Var, Var]) -> Iterator[dict[Var, Var]]:
        """All mappings that make a query true, in TextWorld's order. Different placeholders are different things."""
        if not query:
            yield mapping
            return
        first, *rest = query
        for types in self._list_subtypes(tuple(type_ for _, type_ in first.placeholders)):
            for fact in sorted(self._true.get((first.name, types), ())):
                extended = _extend_mapping(first.placeholders, zip(fact, types, strict=True), mapping)
                if extended is not None:
                    yield from self.find_mappings(rest, extended)


def _extend_mapping(
    placeholders: Sequence[Var], values: Iterator[Var], mapping: dict[Var, Var]
) -> dict[Var, Var] | None:
    """The mapping with these placeholders bound to the values; None if one is already bound to another value."""
    extended, used = dict(mapping), set(mapping.values())
    for placeholder, value in zip(placeholders, values, strict=True):
        bound = extended.get(placeholder)
        if bound is None and value not in used:
            extended[placeholder] = value
            used.add(value)
        elif bound != value:
            return None
    return extended
