"""Translates a game with Fast Downward, once for all of its episodes. TextWorld's own engine does it in every episode."""

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, Final

from aem_exp.envs.alfworld.facts import Entity, Fact, ListSubtypes, Var, negate, restore_case
from aem_exp.envs.alfworld.grammar import ANY_PREDICATE, split_goal
from aem_exp.envs.alfworld.library import isolate_globals

CACHED_GAMES: Final = 64  # translated games in the cache of a process


class Game:
    """The data that all episodes of a game share.

    Attributes:
        sas: the planning task in Fast Downward's format.
        initial: the facts of the problem file.
        entities: all things with a name, by id; set at the first start of the game.
        fixed_wordings: actions whose command never changes during a game.
    """

    def __init__(self, domain: str, grammar: str, problem: str):
        task, sas = _translate(domain, problem)
        self.sas = sas.encode()
        self.types = {thing.name: thing.type_name for thing in task.objects}
        self.parameters = {
            action.name: [(one.name.strip("?"), one.type_name) for one in action.parameters] for action in task.actions
        }
        self.initial = _initial_facts(task, self.types)
        self.list_subtypes = _subtype_lister(task)
        self.grammar, self.goal_sentence = split_goal(grammar)
        self.entities: dict[str, Entity] | None = None
        changing = {effect.literal.predicate for action in task.actions for effect in action.effects}
        changing |= {axiom.name for axiom in task.axioms} | {ANY_PREDICATE}
        changing |= {negate(predicate) for predicate in changing}
        self.fixed_wordings = {
            action for action, predicates in self.grammar.command_predicates.items() if not predicates & changing
        }
        self.parse_atom = cache(self._parse_atom)
        self.mapping = cache(self._mapping)

    def _parse_atom(self, atom: str) -> Fact:
        """The fact of an atom as Fast Downward writes it: 'Atom in(a, b)' or 'NegatedAtom in(a, b)'."""
        sign, rest = atom.split(" ", 1)
        predicate, arguments = rest[:-1].split("(", 1)
        names = tuple(name for name in arguments.split(", ") if name)
        predicate = f"not_{predicate}" if sign == "NegatedAtom" else predicate
        return predicate, tuple(self.types[name] for name in names), tuple(restore_case(name) for name in names)

    def _mapping(self, ground: str) -> dict[Var, Var]:
        """Placeholder -> variable of a ground operator."""
        action, *names = ground.split()
        pairs = zip(self.parameters[action], names, strict=False)  # the translator adds hidden parameters
        return {placeholder: (name, placeholder[1]) for placeholder, name in pairs}


def load_game(data: Mapping[str, Any]) -> Game:
    """The game of a game file. The latest games are cached.

    Raises:
        ValueError: the file is not a game, or Fast Downward cannot translate it.
    """
    parts = [data.get(key) for key in ("pddl_domain", "grammar", "pddl_problem")]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("not a game: pddl_domain, grammar and pddl_problem must all be texts")
    return _translate_game(*parts)


@lru_cache(CACHED_GAMES)
def _translate_game(domain: str, grammar: str, problem: str) -> Game:
    with isolate_globals():
        return Game(domain, grammar, problem)


def _translate(domain: str, problem: str) -> tuple[Any, str]:
    from fast_downward import pddl2sas

    try:
        return pddl2sas(domain, problem)
    except (SystemExit, Exception) as error:  # the translator calls sys.exit on a malformed game
        raise ValueError(f"Fast Downward cannot translate the game: {error}") from error


def _initial_facts(task: Any, types: Mapping[str, str]) -> list[Fact]:
    """The facts of the problem file, without equalities, costs and distances."""
    facts = []
    for atom in task.init:
        if hasattr(atom, "predicate"):
            name, names = atom.predicate, atom.args
        else:
            name, names = str(atom.expression.value), atom.fluent.args
            if atom.fluent.symbol == "total-cost" or name.isdigit():
                continue
        if name != "=":
            facts.append((name, tuple(types[one] for one in names), tuple(names)))
    return facts


def _subtype_lister(task: Any) -> ListSubtypes:
    """A function from types to all combinations of their subtypes, in TextWorld's order."""
    from textworld.logic import Type, TypeHierarchy

    hierarchy = TypeHierarchy()
    for one in {type_.name: type_ for type_ in reversed(task.types)}.values():  # the first type of each name
        hierarchy.add(Type(one.name, one.supertype_names))

    @cache
    def list_subtypes(types: tuple[str, ...]) -> list[tuple[str, ...]]:
        combinations = hierarchy.multi_subtypes([hierarchy.get(name) for name in types])
        return [tuple(type_.name for type_ in combination) for combination in combinations]

    return list_subtypes
