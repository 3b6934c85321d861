"""Plays TextWorld's PDDL games faster than TextWorld's own class, with the same texts byte for byte.

Fast Downward translates a game (`translation`) and plays it (`library`). The texts come from the game's own `grammar`
(`text_generation`). Measured against TextWorld's class, only the time differs. Global state of the libraries stays isolated.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from aem_exp.envs.alfworld.facts import Fact, Facts, negate
from aem_exp.envs.alfworld.library import release_library, take_library
from aem_exp.envs.alfworld.text_generation import TextGenerator
from aem_exp.envs.alfworld.translation import load_game

NOTHING: Final = "Nothing happens."


class GameState(NamedTuple):
    """A game after a step: its text, its admissible commands, and whether its goal is reached."""

    text: str
    commands: tuple[str, ...]
    won: bool


class Engine:
    """Plays one game at a time, with its own copy of Fast Downward's library."""

    def __init__(self) -> None:
        self._library: Any = None

    def start(self, data: Mapping[str, Any]) -> GameState:
        """Start a game.

        Args:
            data: the content of the game file.

        Raises:
            ValueError: the game is malformed.
        """
        self.game = load_game(data)
        if self._library is None:
            self._library = take_library()
        self._library.load_sas(self.game.sas)
        self._facts = Facts(self.game.list_subtypes, [*self.game.initial, *self._read_facts()])
        if self.game.entities is None:
            self.game.entities = self._facts.entities()
        self._generator = TextGenerator(self.game, self._facts)
        self._command_cache = dict[str, str]()  # ground operator -> command, if no step changes the command
        return self._make_state(self._generator.write("#intro#", {}))

    def step(self, command: str) -> GameState:
        """Carry out a command. A command that is not admissible changes nothing."""
        operator = self._operator_by_command.get(command.strip())
        if operator is None:
            return self._state._replace(text=NOTHING)
        self._apply(operator)
        mapping = self.game.mapping(operator[1])
        return self._make_state(self._generator.write(self.game.grammar.feedback[operator[1].split()[0]], mapping))

    def matches_grammar(self, command: str) -> bool:
        """Whether a command has the form of a command of this game, admissible or not."""
        return self.game.grammar.command_pattern.fullmatch(command) is not None

    def close(self) -> None:
        if self._library is not None:
            release_library(self._library)
            self._library = None

    def _make_state(self, text: str) -> GameState:
        self._operator_by_command: dict[str, tuple[int, str, int]] = {}
        for operator in self._applicable_operators():
            self._operator_by_command.setdefault(self._word_command(operator[1]), operator)
        self._state = GameState(text, tuple(sorted(self._operator_by_command)), bool(self._library.check_goal()))
        return self._state

    def _word_command(self, ground: str) -> str:
        """The command for a ground operator."""
        command = self._command_cache.get(ground)
        if command is None:
            action = ground.split()[0]
            command = self._generator.write(self.game.grammar.command[action], self.game.mapping(ground))
            if action in self.game.fixed_wordings:
                self._command_cache[ground] = command
        return command

    def _applicable_operators(self) -> list[tuple[int, str, int]]:
        """Id, name and number of effects of each applicable operator; the first one of each name."""
        from fast_downward import Operator

        operators = (Operator * self._library.get_applicable_operators_count())()
        self._library.get_applicable_operators(operators)
        by_name: dict[str, tuple[int, str, int]] = {}
        for operator in operators:
            by_name.setdefault(name := operator.name, (operator.id, name, operator.nb_effect_atoms))
        return list(by_name.values())

    def _apply(self, operator: tuple[int, str, int]) -> None:
        from fast_downward import Atom

        effects = (Atom * operator[2])()
        self._library.apply_operator(operator[0], effects)
        for effect in effects:
            predicate, types, names = self.game.parse_atom(effect.name)
            self._facts.remove((negate(predicate), types, names))
            self._facts.add((predicate, types, names))

    def _read_facts(self) -> list[Fact]:
        """The true facts among those that can change."""
        from fast_downward import Atom

        atoms = (Atom * self._library.get_state_size())()
        self._library.get_state(atoms)
        return [self.game.parse_atom(name) for atom in atoms if not (name := atom.name).startswith("NegatedAtom")]
