"""The environment of `household_talk`: the agent says one sentence, then acts. Every observation describes the whole state."""

from typing import Final

from aem_exp.envs import Task, Turn, parsing
from aem_exp.envs.household.env import Action, HouseholdEnv
from aem_exp.envs.household.rules import MAX_ACTION_CHARACTERS, format_list, kind_of

GOAL, FREE, BUSY, SEEN, FOUND = STATUSES = ("goal", "free", "busy", "seen", "found")
START: Final = "door"  # the location at the start; it is not a receptacle
VERBS: Final = ("go", "take", "move")


class TalkEnv(HouseholdEnv):
    """One room of surfaces, in which the wanted object lies on one of the receptacles that are not the target.

    The agent looks for the object. A receptacle that it has not seen is `free` or `busy`, and it cannot go to a busy one. The
    first `choices` unseen receptacles of the task's order are free. So each look makes the next one free, and the object is
    equally likely in every unseen receptacle, free or busy.

    Args:
        choices: number of unseen receptacles that are free at the same time.
        thought_required: an action without a sentence in front of it is invalid.
        reward: paid once, on success.
    """

    def __init__(self, choices: int = 1, thought_required: bool = False, reward: float = 1.0) -> None:
        super().__init__(tags=True, reward=reward)
        self.choices, self.thought_required = choices, thought_required

    def parse(self, response: str) -> str:
        return parsing.parse_spoken(response, MAX_ACTION_CHARACTERS)[1]

    def reset(self, task: Task) -> Turn:
        self.order: list[str] = task.payload["order"]
        turn = super().reset(task)
        return Turn(self.describe(), actions=turn.actions, metrics=turn.metrics)

    def step(self, response: str) -> Turn:
        thought, action, tagged = parsing.parse_spoken(response, MAX_ACTION_CHARACTERS)
        entry = self.admissible_actions.get(action) if not self.won else None
        if entry is not None:
            execute, arguments = entry
            execute(self, *arguments)
            self.won = self._is_won()
            self.admissible_actions = self._build_actions()
        valid = tagged and (bool(thought) or not self.thought_required)
        reward = self.reward if self.won and entry is not None else 0.0
        metrics = {
            "won": float(self.won),
            "format_valid": float(valid),
            "admissible": float(entry is not None),
            "thought": float(bool(thought)),
        }
        return Turn(
            self.describe(), reward, self.won, valid=valid, actions=tuple(self.admissible_actions), metrics=metrics
        )

    def free_places(self) -> list[str]:
        """The unseen receptacles to which the agent can go."""
        return [place for place in self.order if place not in self.seen][: self.choices]

    def find_wanted(self) -> str | None:
        """The seen receptacle with the wanted object; None if the agent has not seen it, or holds it."""
        for place in self.order:
            if place in self.seen and any(kind_of(thing) == self.errand.object for thing in self.contents[place]):
                return place
        return None

    def describe(self) -> str:
        """The state in one text. Each receptacle has a status of one word, so the length does not depend on `choices`."""
        place = self.location
        things = format_list(self.contents[place]) if place else "nothing"
        held = f"a {self.held_object}" if self.held_object else "nothing"
        free, found = self.free_places(), self.find_wanted()
        statuses = ", ".join(f"{place} {self._status(place, free, found)}" for place in self.contents)
        return f"You are at the {place or START} and see {things}. You hold {held}. Places: {statuses}."

    def _status(self, place: str, free: list[str], found: str | None) -> str:
        if place in self.targets:
            return GOAL
        if place in self.seen:
            return FOUND if place == found else SEEN
        return FREE if place in free else BUSY

    def _build_actions(self) -> dict[str, Action]:
        """Admissible action -> the function that carries it out. Going to a busy receptacle changes nothing."""
        free = self.free_places()
        table = {action: entry for action, entry in super()._build_actions().items() if action.split()[0] in VERBS}
        for place in self.order:
            if place not in self.seen and place not in free:
                table[self.go_actions[place]] = (_wait, ())
        return table


def _wait(env: HouseholdEnv) -> str:
    return env.intro
