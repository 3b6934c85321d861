"""Compiles the grammar of a game once. TextWorld's own engine parses it again for every command of every turn.

Expressions in a game file are parsed and checked here, and never evaluated as Python.
"""

import ast
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple

from aem_exp.envs.alfworld.facts import Entity, Var
from aem_exp.envs.alfworld.library import isolate_globals

GOAL_PLACEHOLDER: Final = "ERRAND7F3A"  # replaces the goal of a game in its grammar
ANY_PREDICATE: Final = "*"  # all predicates
_GOAL_SENTENCE: Final = re.compile(r"(?<=Your task is to: )[\w ,.'-]+(?=\")")


class Predicate(NamedTuple):
    name: str
    placeholders: tuple[Var, ...]


Query = tuple[Predicate, ...]


@dataclass(frozen=True)
class Rule:
    condition: Query
    symbols: tuple[Any, ...]


@dataclass(frozen=True)
class Term:
    """An expression over things: names, attributes, strings, `+` and `or`."""

    tree: ast.expr


@dataclass(frozen=True)
class Nonterminal:
    name: str


@dataclass(frozen=True)
class ForEach:
    """A term or nonterminal for every answer to a query; `listed`: as an enumeration (a, b, and c)."""

    inner: Term | Nonterminal
    query: Query
    listed: bool = False


class Grammar:
    """The wording of a game: rules, and for each action its command and its feedback.

    Attributes:
        command_pattern: matches the commands of all actions, admissible or not.
        command_predicates: the predicates that the command of an action depends on.
    """

    def __init__(self, actions: Mapping[str, Any], rules: Mapping[str, Sequence[Any]]):
        self.rules = {
            name: [Rule(_parse_query(rule.condition), _compile_symbols(rule.rhs)) for rule in alternatives]
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
        """The compiled symbols of a template."""
        from textworld.envs.pddl import textgen

        with isolate_globals():
            return _compile_symbols(textgen._parse_and_convert(text, rule_name="symbols"))

    def _predicates(self, symbols: Sequence[Any]) -> set[str]:
        predicates: set[str] = set()
        for symbol in symbols:
            if isinstance(symbol, ForEach):
                predicates |= {predicate.name for predicate in symbol.query} | self._predicates([symbol.inner])
            elif isinstance(symbol, Nonterminal):
                predicates.add(ANY_PREDICATE)
        return predicates


def split_goal(text: str) -> tuple[Grammar, str]:
    """The grammar with a placeholder for the goal, and the goal. Games that differ only in the goal share one grammar."""
    match = _GOAL_SENTENCE.search(text)
    if match is None or GOAL_PLACEHOLDER in text:
        return _parse_grammar(text), GOAL_PLACEHOLDER
    return _parse_grammar(text[: match.start()] + GOAL_PLACEHOLDER + text[match.end() :]), match[0]


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
        return Nonterminal(str(symbol.symbol))
    if kind == "EvalSymbol":
        return Term(_parse_expression(symbol.expression))
    if kind == "ConditionalSymbol":
        return ForEach(_compile_symbol(symbol.expression), _parse_query(symbol.given))
    assert kind == "ListSymbol", kind
    each = _compile_symbol(symbol.symbol)
    return ForEach(each.inner, each.query, listed=True)


def _command_regex(symbols: Sequence[Any]) -> str:
    return "".join(re.escape(symbol) if isinstance(symbol, str) else r"[\w-]+ \d+" for symbol in symbols)


def _parse_expression(text: str) -> ast.expr:
    """Parse an expression that only names things and joins texts. (TextWorld's own engine evaluates any expression.)

    Raises:
        ValueError: the expression does anything else.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the game's grammar contains {text!r}, which is not an expression") from error
    for node in ast.walk(tree):
        plain = isinstance(node, ast.Name | ast.BinOp | ast.Add | ast.BoolOp | ast.Or | ast.Load)
        if not (
            plain
            or (isinstance(node, ast.Constant) and isinstance(node.value, str))
            or (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in Entity._fields)
        ):
            raise ValueError(
                f"the game's grammar contains the expression {text!r}; only names and joined texts are allowed"
            )
    return tree


def fingerprint(domain: str, grammar: str) -> str:
    """A hash of the rules and the wording of a game, without its goal."""
    rules = re.sub(r'(Your task is to: )[^"]*', r"\1", grammar)
    return hashlib.sha256(f"{domain}\0{rules}".encode()).hexdigest()[:12]
