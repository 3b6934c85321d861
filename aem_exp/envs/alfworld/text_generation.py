"""Generates the texts of a game from its grammar and its facts."""

import ast
from collections.abc import Iterator, Sequence
from typing import Any

from aem_exp.envs.alfworld.facts import Entity, Facts, Var
from aem_exp.envs.alfworld.grammar import GOAL_PLACEHOLDER, ForEach, Nonterminal, Term
from aem_exp.envs.alfworld.translation import Game


class TextGenerator:
    """Derives texts from the grammar and the facts of a game."""

    def __init__(self, game: Game, facts: Facts):
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
            elif isinstance(symbol, Nonterminal):
                yield from self._derive(self._select_rule(symbol.name, mapping), mapping)
            elif isinstance(symbol, Term):
                yield str(self._evaluate(symbol.tree, mapping))
            else:
                yield from self._write_each(symbol, mapping)

    def _select_rule(self, name: str, mapping: dict[Var, Var]) -> tuple[Any, ...]:
        """The symbols of the first rule with this name whose condition is true."""
        if name not in self._grammar.rules:
            raise ValueError(f"the game's grammar has no rule named {name!r}")
        for rule in self._grammar.rules[name]:
            if not rule.condition or next(self._facts.find_mappings(rule.condition, mapping), None) is not None:
                return rule.symbols
        raise ValueError(f"no rule {name!r} of the game's grammar applies")

    def _write_each(self, symbol: ForEach, mapping: dict[Var, Var]) -> Iterator[str]:
        answers = list(self._facts.find_mappings(symbol.query, mapping)) if symbol.query else [mapping]
        texts = ["".join(self._derive([symbol.inner], answer)) for answer in answers]
        if not symbol.listed:
            yield from texts
            return
        if not texts:
            yield from self._derive([Nonterminal("list_empty")], mapping)
        for place, text in enumerate(texts):
            if place:
                last = place == len(texts) - 1
                yield from self._derive([Nonterminal("list_last_separator" if last else "list_separator")], mapping)
            yield text

    def _evaluate(self, tree: ast.expr, mapping: dict[Var, Var]) -> Any:
        """The value of a checked expression."""
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
                result = ""
                for result in (self._evaluate(value, mapping) for value in values):
                    if result:
                        break
                return result
        raise AssertionError(tree)

    def _find_entity(self, name: str, mapping: dict[Var, Var]) -> Entity:
        for (placeholder, _), (variable, _) in reversed(mapping.items()):
            if placeholder == name:
                return self._entities[variable]
        raise ValueError(f"the game's grammar uses the name {name!r}, which is not bound to a thing")
