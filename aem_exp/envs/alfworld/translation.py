"""A game, translated once by Fast Downward, with all that its episodes share. The stock engine translates it every episode."""

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, Final

from aem_exp.envs.alfworld.facts import Entity, Fact, ListSubtypes, Var, negate, restore_case
from aem_exp.envs.alfworld.grammar import ANY_PREDICATE, split_goal
from aem_exp.envs.alfworld.library import isolate_globals

CACHED_GAMES: Final = 64  # translated games that a process keeps


class Game:
    """What all episodes of a game share.

    Attributes:
        sas: the planning task as Fast Downward plays it.
        initial: facts of the problem file.
        entities: everything that has a name; set when the game is first started.
        fixed_wordings: actions whose wording no step of the game changes.
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
        """'Atom in(a, b)' or 'NegatedAtom in(a, b)', as Fast Downward writes it."""
        sign, rest = atom.split(" ", 1)
        predicate, arguments = rest[:-1].split("(", 1)
        names = tuple(name for name in arguments.split(", ") if name)
        predicate = f"not_{predicate}" if sign == "NegatedAtom" else predicate
        return predicate, tuple(self.types[name] for name in names), tuple(restore_case(name) for name in names)

    def _mapping(self, ground: str) -> dict[Var, Var]:
        """Placeholder -> variable, of a ground operator."""
        action, *names = ground.split()
        pairs = zip(
            self.parameters[action], names, strict=False
        )  # the translator adds parameters that it does not show
        return {placeholder: (name, placeholder[1]) for placeholder, name in pairs}


def load_game(data: Mapping[str, Any]) -> Game:
    """The game of a file; the latest are cached.

    Raises:
        ValueError: it is not a game, or the engine refuses it.
    """
    parts = [data.get(key) for key in ("pddl_domain", "grammar", "pddl_problem")]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("not a game: it has no text for each of pddl_domain, grammar, pddl_problem")
    return _translate_game(*parts)


@lru_cache(CACHED_GAMES)
def _translate_game(domain: str, grammar: str, problem: str) -> Game:
    with isolate_globals():
        return Game(domain, grammar, problem)


def _translate(domain: str, problem: str) -> tuple[Any, str]:
    from fast_downward import pddl2sas

    try:
        return pddl2sas(domain, problem)
    except (SystemExit, Exception) as error:  # the translator exits on a bad game
        raise ValueError(f"Fast Downward refuses the game: {error}") from error


def _initial_facts(task: Any, types: Mapping[str, str]) -> list[Fact]:
    """The facts of the problem file, without equality, costs and distances."""
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
    """A function from types to all combinations of their subtypes, in TextWorld's own order."""
    from textworld.logic import Type, TypeHierarchy

    hierarchy = TypeHierarchy()
    for one in {type_.name: type_ for type_ in reversed(task.types)}.values():  # of two with one name, the first
        hierarchy.add(Type(one.name, one.supertype_names))

    @cache
    def list_subtypes(types: tuple[str, ...]) -> list[tuple[str, ...]]:
        combinations = hierarchy.multi_subtypes([hierarchy.get(name) for name in types])
        return [tuple(type_.name for type_ in combination) for combination in combinations]

    return list_subtypes
