"""TextWorld's PDDL engine, contained and quick: it says what the stock class says, byte for byte.

Fast Downward translates a game and plays it, as ever. What is ours: a game is translated once, not four times an episode; its
grammar is compiled once, not parsed again for every command of every turn; and what a game file asks Python to evaluate is
read, not evaluated. The engine's habits stay in here: it writes sys.argv and sys.stdout, exits on a bad game, keeps its
parsers in globals, and needs a copy of its library for every environment, of which we copy the part that is loaded.
"""

import ast
import hashlib
import importlib.util
import re
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from aem_exp.core.errors import MissingResource
from aem_exp.core.extras import install_command

NOTHING: Final = "Nothing happens."
CACHED_GAMES: Final = 64  # translated games that a process keeps
COMPILER_NOTE: Final = "(it compiles two packages: a C++ compiler, make and cmake)"
PACKAGES: Final = ("alfworld", "textworld", "fast_downward")

GOAL_PLACEHOLDER: Final = "ERRAND7F3A"  # stands in a grammar for the errand of one game
ANY_PREDICATE: Final = "*"  # a predicate that stands for all
_GOAL_SENTENCE: Final = re.compile(r"(?<=Your task is to: )[\w ,.'-]+(?=\")")

Var = tuple[str, str]  # name and type, of a variable or of a placeholder
Fact = tuple[str, tuple[str, ...], tuple[str, ...]]  # predicate, types, names


def check_installed() -> None:
    """Refuse where the engine is missing, or cannot run; nothing is imported for it."""
    if sys.version_info >= (3, 13):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise MissingResource(
            "env.make", "alfworld", f"TextWorld's engine runs on Python 3.11 and 3.12, and this is {version}"
        )
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise MissingResource(
            "env.make", "alfworld", f"needs {', '.join(missing)}: {install_command('alfworld')} {COMPILER_NOTE}"
        )


class GameState(NamedTuple):
    """What a game says after a step: its text, the commands it takes now, whether its goal is reached."""

    text: str
    commands: tuple[str, ...]
    won: bool


class Engine:
    """One environment: a copy of Fast Downward's library, playing one game at a time."""

    def __init__(self) -> None:
        self._library: Any = None

    def start(self, data: Mapping[str, Any]) -> GameState:
        """Begin a game, as its file holds it.

        Raises:
            ValueError: the engine does not take the game.
        """
        self.game = load_game(data)
        if self._library is None:
            self._library = _IDLE_LIBRARIES.pop() if _IDLE_LIBRARIES else _load_library()
        self._library.load_sas(self.game.sas)
        self._facts = _Facts(self.game, [*self.game.initial, *self._read_facts()])
        if self.game.entities is None:
            self.game.entities = self._facts.entities()
        self._generator = _TextGenerator(self.game, self._facts)
        self._command_cache = dict[str, str]()  # ground operator -> command, where no step changes it
        return self._make_state(self._generator.write("#intro#", {}))

    def step(self, command: str) -> GameState:
        """Carry out a command; one that is not admissible changes nothing."""
        operator = self._operator_by_command.get(command.strip())
        if operator is None:
            return self._state._replace(text=NOTHING)
        self._apply(operator)
        mapping = self.game.mapping(operator[1])
        return self._make_state(self._generator.write(self.game.grammar.feedback[operator[1].split()[0]], mapping))

    def matches_grammar(self, command: str) -> bool:
        """Whether a command has the form of one of the game's, admissible or not."""
        return self.game.grammar.command_pattern.fullmatch(command) is not None

    def close(self) -> None:
        if self._library is not None:
            _IDLE_LIBRARIES.append(self._library)
            self._library = None

    def _make_state(self, text: str) -> GameState:
        self._operator_by_command: dict[str, tuple[int, str, int]] = {}
        for operator in self._applicable_operators():
            self._operator_by_command.setdefault(self._word_command(operator[1]), operator)
        self._state = GameState(text, tuple(sorted(self._operator_by_command)), bool(self._library.check_goal()))
        return self._state

    def _word_command(self, ground: str) -> str:
        """How a player words a ground operator."""
        found = self._command_cache.get(ground)
        if found is None:
            action = ground.split()[0]
            found = self._generator.write(self.game.grammar.command[action], self.game.mapping(ground))
            if action in self.game.fixed_wordings:
                self._command_cache[ground] = found
        return found

    def _applicable_operators(self) -> list[tuple[int, str, int]]:
        """Number, name and effects of what can be done; of several with one name, the first."""
        from fast_downward import Operator

        found = (Operator * self._library.get_applicable_operators_count())()
        self._library.get_applicable_operators(found)
        by_name: dict[str, tuple[int, str, int]] = {}
        for operator in found:
            by_name.setdefault(name := operator.name, (operator.id, name, operator.nb_effect_atoms))
        return list(by_name.values())

    def _apply(self, operator: tuple[int, str, int]) -> None:
        from fast_downward import Atom

        effects = (Atom * operator[2])()
        self._library.apply_operator(operator[0], effects)
        for effect in effects:
            predicate, types, names = self.game.parse_atom(effect.name)
            self._facts.remove((_negate(predicate), types, names))
            self._facts.add((predicate, types, names))

    def _read_facts(self) -> list[Fact]:
        """The facts that are true and may change."""
        from fast_downward import Atom

        atoms = (Atom * self._library.get_state_size())()
        self._library.get_state(atoms)
        return [self.game.parse_atom(name) for atom in atoms if not (name := atom.name).startswith("NegatedAtom")]


# A game, translated once.


class Game:
    """What every episode of a game begins with.

    Attributes:
        sas: the planning task as Fast Downward plays it.
        initial: facts of the problem file.
        entities: everything that has a name; known once the game has begun.
        fixed: actions whose wording no step of the game changes.
    """

    def __init__(self, domain: str, grammar: str, problem: str):
        task, sas = _translate(domain, problem)
        self.sas = sas.encode()
        self.types = {thing.name: thing.type_name for thing in task.objects}
        self.parameters = {
            action.name: [(one.name.strip("?"), one.type_name) for one in action.parameters] for action in task.actions
        }
        self.initial = _initial_facts(task, self.types)
        self.hierarchy = _hierarchy(task)
        self.grammar, self.goal_sentence = _split_goal(grammar)
        self.entities: dict[str, Entity] | None = None
        changed = {effect.literal.predicate for action in task.actions for effect in action.effects}
        changed |= {axiom.name for axiom in task.axioms} | {ANY_PREDICATE}
        changed |= {_negate(predicate) for predicate in changed}
        self.fixed_wordings = {
            action for action, asked in self.grammar.command_predicates.items() if not asked & changed
        }
        self.parse_atom = cache(self._parse_atom)
        self.mapping = cache(self._mapping)

    def _parse_atom(self, atom: str) -> Fact:
        """'Atom in(a, b)' or 'NegatedAtom in(a, b)', as Fast Downward writes it."""
        sign, rest = atom.split(" ", 1)
        predicate, arguments = rest[:-1].split("(", 1)
        names = tuple(name for name in arguments.split(", ") if name)
        predicate = f"not_{predicate}" if sign == "NegatedAtom" else predicate
        return predicate, tuple(self.types[name] for name in names), tuple(_restore_case(name) for name in names)

    def _mapping(self, ground: str) -> dict[Var, Var]:
        """Placeholder -> variable, of a ground operator."""
        action, *names = ground.split()
        pairs = zip(
            self.parameters[action], names, strict=False
        )  # the translator adds parameters that it does not show
        return {placeholder: (name, placeholder[1]) for placeholder, name in pairs}


def load_game(data: Mapping[str, Any]) -> Game:
    """The game that a file holds; the latest are kept.

    Raises:
        ValueError: it is not a game, or the engine does not take it.
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
    except (SystemExit, Exception) as error:  # to exit is the translator's way of saying no
        raise ValueError(f"Fast Downward refuses the game: {error}") from error


def _initial_facts(task: Any, types: Mapping[str, str]) -> list[Fact]:
    """What the problem file says, without equality, costs and distances."""
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


def _hierarchy(task: Any) -> Any:
    """Which types are kinds of which, in TextWorld's own order."""
    from textworld.logic import Type, TypeHierarchy

    hierarchy = TypeHierarchy()
    for one in {type_.name: type_ for type_ in reversed(task.types)}.values():  # of two with one name, the first
        hierarchy.add(Type(one.name, one.supertype_names))

    @cache
    def narrowed(types: tuple[str, ...]) -> list[tuple[str, ...]]:
        found = hierarchy.multi_subtypes([hierarchy.get(name) for name in types])
        return [tuple(type_.name for type_ in combination) for combination in found]

    return narrowed


def _negate(predicate: str) -> str:
    return predicate.removeprefix("not_") if predicate.startswith("not_") else f"not_{predicate}"


def _restore_case(name: str) -> str:
    return name.upper() if name in ("i", "p") else name


class Entity(NamedTuple):
    """What a grammar may say of a thing."""

    id: str
    name: str
    definite: str = "the"
    indefinite: str = "a"


def display_names(ids: Sequence[str]) -> dict[str, str]:
    """The name of each thing: `mug_bar__plus_01_dot_23_bar_...` is a numbered mug. ALFWorld's own numbering, from the last.

    A sink's id holds its basin, and the name says so.
    """
    kinds = {one: one.split("_bar_", 1)[0] + ("basin" if "basin" in one else "") for one in ids if "_bar_" in one}
    left: dict[str, int] = {}
    for kind in kinds.values():
        left[kind] = left.get(kind, 0) + 1
    found = {}
    for one in sorted(ids):
        if one in kinds:
            found[one] = f"{kinds[one]} {left[kinds[one]]}"
            left[kinds[one]] -= 1
        else:
            found[one] = f"{_unescape(one)} "
    return found


def _unescape(name: str) -> str:
    for word, sign in (("_minus_", "-"), ("_plus_", "+"), ("_dot_", "."), ("_comma_", ",")):
        name = name.replace(word, sign)
    return name


class _Facts:
    """What is true in a game."""

    def __init__(self, game: Game, facts: Sequence[Fact]):
        self._list_subtypes = game.hierarchy
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

    def find_mappings(self, query: Sequence["Predicate"], mapping: dict[Var, Var]) -> Iterator[dict[Var, Var]]:
        """All ways to make a query true, in TextWorld's order. Different placeholders are different things."""
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
    extended, used = dict(mapping), set(mapping.values())
    for placeholder, value in zip(placeholders, values, strict=True):
        known = extended.get(placeholder)
        if known is None and value not in used:
            extended[placeholder] = value
            used.add(value)
        elif known != value:
            return None
    return extended


# A grammar, compiled once.


class Predicate(NamedTuple):
    name: str
    placeholders: tuple[Var, ...]


Query = tuple[Predicate, ...]


@dataclass(frozen=True)
class _Rule:
    condition: Query
    symbols: tuple[Any, ...]


@dataclass(frozen=True)
class _Term:
    """An expression over named things: names, attributes, strings, `+` and `or`."""

    tree: ast.expr


@dataclass(frozen=True)
class _Nonterminal:
    name: str


@dataclass(frozen=True)
class _ForEach:
    """A term or nonterminal for every answer to a query; `listed`: as an enumeration, a, b, and c."""

    inner: "_Term | _Nonterminal"
    query: Query
    listed: bool = False


class Grammar:
    """The wording of a game: rules, and for each action its command and its feedback.

    Attributes:
        shapes: what a command of each action looks like.
        asked: predicates that the command of an action depends on.
    """

    def __init__(self, actions: Mapping[str, Any], rules: Mapping[str, Sequence[Any]]):
        self.rules = {
            name: [_Rule(_parse_query(rule.condition), _compile_symbols(rule.rhs)) for rule in alternatives]
            for name, alternatives in rules.items()
        }
        self.symbols = cache(self._symbols)
        self.command = {name: action.template for name, action in actions.items()}
        self.feedback = {name: action.feedback_rule for name, action in actions.items()}
        self.command_pattern = re.compile(
            "|".join(_command_regex(self.symbols(text)) for text in self.command.values())
        )
        self.command_predicates = {name: self._predicates(self.symbols(text)) for name, text in self.command.items()}

    def _symbols(self, text: str) -> tuple[Any, ...]:
        """A template, compiled."""
        from textworld.envs.pddl import textgen

        with isolate_globals():
            return _compile_symbols(textgen._parse_and_convert(text, rule_name="symbols"))

    def _predicates(self, symbols: Sequence[Any]) -> set[str]:
        found: set[str] = set()
        for symbol in symbols:
            if isinstance(symbol, _ForEach):
                found |= {predicate.name for predicate in symbol.query} | self._predicates([symbol.inner])
            elif isinstance(symbol, _Nonterminal):
                found.add(ANY_PREDICATE)
        return found


def _split_goal(text: str) -> tuple[Grammar, str]:
    """A grammar, and the errand that only this game has: games that differ in nothing else share the rest."""
    found = _GOAL_SENTENCE.search(text)
    if found is None or GOAL_PLACEHOLDER in text:
        return _parse_grammar(text), GOAL_PLACEHOLDER
    return _parse_grammar(text[: found.start()] + GOAL_PLACEHOLDER + text[found.end() :]), found[0]


@lru_cache(8)
def _parse_grammar(text: str) -> Grammar:
    from textworld.envs.pddl.logic import GameLogic

    logic = GameLogic("", text)
    return Grammar(logic.actions, logic.grammar._rules)


def _parse_query(text: str | None) -> Query:
    if not text:
        return ()
    from textworld.logic import Rule

    parsed = Rule.parse_conjunctive_query(text).preconditions
    return tuple(Predicate(p.name, tuple((one.name, one.type) for one in p.parameters)) for p in parsed)


def _compile_symbols(symbols: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_compile_symbol(symbol) for symbol in symbols)


def _compile_symbol(symbol: Any) -> Any:
    kind = type(symbol).__name__
    if kind == "TerminalSymbol":
        return str(symbol.symbol)
    if kind == "NonterminalSymbol":
        return _Nonterminal(str(symbol.symbol))
    if kind == "EvalSymbol":
        return _Term(_parse_expression(symbol.expression))
    if kind == "ConditionalSymbol":
        return _ForEach(_compile_symbol(symbol.expression), _parse_query(symbol.given))
    assert kind == "ListSymbol", kind
    each = _compile_symbol(symbol.symbol)
    return _ForEach(each.inner, each.query, listed=True)


def _command_regex(symbols: Sequence[Any]) -> str:
    return "".join(re.escape(symbol) if isinstance(symbol, str) else r"[\w-]+ \d+" for symbol in symbols)


def _parse_expression(text: str) -> ast.expr:
    """An expression that only names things and joins them. The stock engine evaluates whatever a game file says.

    Raises:
        ValueError: it would do anything else.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the game's grammar holds {text!r}, which is no expression") from error
    for node in ast.walk(tree):
        plain = isinstance(node, ast.Name | ast.BinOp | ast.Add | ast.BoolOp | ast.Or | ast.Load)
        if not (
            plain
            or (isinstance(node, ast.Constant) and isinstance(node.value, str))
            or (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in Entity._fields)
        ):
            raise ValueError(f"the game's grammar asks to evaluate {text!r}; only names and joined texts are read")
    return tree


class _TextGenerator:
    """Derives texts from a grammar and what is true."""

    def __init__(self, game: Game, facts: _Facts):
        assert game.entities is not None
        self._grammar, self._goal_sentence, self._entities, self._facts = (
            game.grammar,
            game.goal_sentence,
            game.entities,
            facts,
        )

    def write(self, template: str, mapping: dict[Var, Var]) -> str:
        return "".join(self._derive(self._grammar.symbols(template), mapping)).replace(
            GOAL_PLACEHOLDER, self._goal_sentence
        )

    def _derive(self, symbols: Sequence[Any], mapping: dict[Var, Var]) -> Iterator[str]:
        for symbol in symbols:
            if isinstance(symbol, str):
                yield symbol
            elif isinstance(symbol, _Nonterminal):
                yield from self._derive(self._select_rule(symbol.name, mapping), mapping)
            elif isinstance(symbol, _Term):
                yield str(self._evaluate(symbol.tree, mapping))
            else:
                yield from self._write_each(symbol, mapping)

    def _select_rule(self, name: str, mapping: dict[Var, Var]) -> tuple[Any, ...]:
        """The first rule of a name whose condition holds."""
        if name not in self._grammar.rules:
            raise ValueError(f"the game's grammar has no rule {name!r}")
        for rule in self._grammar.rules[name]:
            if not rule.condition or next(self._facts.find_mappings(rule.condition, mapping), None) is not None:
                return rule.symbols
        raise ValueError(f"no rule {name!r} of the game's grammar applies")

    def _write_each(self, symbol: _ForEach, mapping: dict[Var, Var]) -> Iterator[str]:
        answers = list(self._facts.find_mappings(symbol.query, mapping)) if symbol.query else [mapping]
        texts = ["".join(self._derive([symbol.inner], answer)) for answer in answers]
        if not symbol.listed:
            yield from texts
            return
        if not texts:
            yield from self._derive([_Nonterminal("list_empty")], mapping)
        for place, text in enumerate(texts):
            if place:
                last = place == len(texts) - 1
                yield from self._derive([_Nonterminal("list_last_separator" if last else "list_separator")], mapping)
            yield text

    def _evaluate(self, tree: ast.expr, mapping: dict[Var, Var]) -> Any:
        """What a checked expression stands for."""
        match tree:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._find_entity(name, mapping).name
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                return getattr(self._find_entity(name, mapping), attribute)
            case ast.BinOp(left=left, right=right):
                return self._evaluate(left, mapping) + self._evaluate(right, mapping)
            case ast.BoolOp(values=values):
                found = ""
                for found in (self._evaluate(value, mapping) for value in values):
                    if found:
                        break
                return found
        raise AssertionError(tree)

    def _find_entity(self, name: str, mapping: dict[Var, Var]) -> Entity:
        for (placeholder, _), (variable, _) in reversed(mapping.items()):
            if placeholder == name:
                return self._entities[variable]
        raise ValueError(f"the game's grammar names {name!r}, which nothing stands for")


# Containment.

_LOCK = threading.RLock()  # the engine's parsers and its translator's options are globals
_IDLE_LIBRARIES: list[Any] = []  # libraries for the next to come: a process that unloads several crashes at its end


@contextmanager
def isolate_globals() -> Iterator[None]:
    """One thread at a time, and sys.argv and sys.stdout as they were."""
    with _LOCK:
        argv, stdout = sys.argv, sys.stdout
        try:
            yield
        finally:
            sys.argv, sys.stdout = argv, stdout


def _load_library() -> Any:
    """A library of one's own: its state is global. Copied is what a loader reads, not 30 times as much debug information."""
    import fast_downward.interface as interface

    with tempfile.TemporaryDirectory() as folder, isolate_globals():
        whole, lean = interface.DOWNWARD_LIB_PATH, Path(folder) / "libdownward.so"
        lean.write_bytes(_read_loaded_segments(Path(whole)))
        interface.DOWNWARD_LIB_PATH = str(lean)
        try:
            return interface.load_lib()
        finally:
            interface.DOWNWARD_LIB_PATH = whole


@cache
def _read_loaded_segments(library: Path) -> bytes:
    """The bytes of a shared library up to the end of its last segment; all of it, where it is no 64-bit ELF."""
    data = library.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return data
    start, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    headers = (struct.unpack_from("<IIQQQQQQ", data, start + i * size) for i in range(count))
    end = max(offset + length for _, _, offset, _, _, length, _, _ in headers)
    return data[:end]


def fingerprint(domain: str, grammar: str) -> str:
    """Hash of the rules and the wording of a game, whatever its own errand is."""
    rules = re.sub(r'(Your task is to: )[^"]*', r"\1", grammar)
    return hashlib.sha256(f"{domain}\0{rules}".encode()).hexdigest()[:12]
