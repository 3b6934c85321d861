"""The environment of the household: carries out actions in one room and decides when its task is done."""

from collections.abc import Callable

from aem_exp.envs import Task, Turn
from aem_exp.envs.household.rules import (
    APPLIANCE,
    KITCHEN,
    LAMP,
    NOTHING,
    OPENABLE,
    PHRASES,
    STATE_AFTER,
    Errand,
    format_list,
    kind_of,
    parse_action,
)

Action = tuple[
    Callable[..., str], tuple[str, ...]
]  # a function that carries out an action, and its arguments after `env`


class HouseholdEnv:
    """One room. The agent carries at most one object."""

    def __init__(self, tags: bool = False, reward: float = 1.0) -> None:
        self.tags = tags
        self.reward = reward
        self.goal = ""

    def parse(self, response: str) -> str:
        return parse_action(response, self.tags)[0]

    def close(self) -> None:
        pass

    def reset(self, task: Task) -> Turn:
        room = task.payload
        self.errand = Errand(room["kind"], room["object"], room["target"])
        self.goal = self.errand.text
        self.contents: dict[str, list[str]] = {place: list(things) for place, things in room["layout"].items()}
        self.closed_places = {place for place in self.contents if kind_of(place) in OPENABLE}
        self.seen: set[str] = set()  # receptacles whose content an observation has shown
        self.location: str | None = None
        self.held_object: str | None = None
        self.state: dict[str, set[str]] = {}  # object -> clean, hot, cool
        self.lit = False
        self.won = False
        self.intro = f"{PHRASES[0]} {format_list(self.contents)}."
        self.go_actions = {place: f"go to {place}" for place in self.contents}
        self.targets = [place for place in self.contents if kind_of(place) == self.errand.target]
        self.admissible_actions = self._build_actions()
        return Turn(
            f"{self.intro} Your task is to: {self.goal}", actions=tuple(self.admissible_actions), metrics={"won": 0.0}
        )

    def step(self, response: str) -> Turn:
        action, valid = parse_action(response, self.tags)
        entry = self.admissible_actions.get(action) if not self.won else None
        observation = NOTHING
        if entry is not None:
            execute, arguments = entry
            observation = execute(self, *arguments)
            self.won = self._is_won()
            self.admissible_actions = self._build_actions()
        metrics = {"won": float(self.won), "format_valid": float(valid), "admissible": float(entry is not None)}
        reward = self.reward if self.won and entry is not None else 0.0
        return Turn(observation, reward, self.won, valid=valid, actions=tuple(self.admissible_actions), metrics=metrics)

    def _build_actions(self) -> dict[str, Action]:
        """Admissible action -> the function that carries it out."""
        location, held_object = self.location, self.held_object
        table: dict[str, Action] = {go: (_go, (place,)) for place, go in self.go_actions.items() if place != location}
        if location is not None:
            table[f"examine {location}"] = (_examine_place, (location,))
            if location in self.closed_places:
                table[f"open {location}"] = (_open, (location,))
            else:
                if kind_of(location) in OPENABLE:
                    table[f"close {location}"] = (_close, (location,))
                for thing in self.contents[location]:
                    if thing == LAMP:
                        table[f"use {LAMP}"] = (_use, ())
                    elif held_object is None:
                        table[f"take {thing} from {location}"] = (_take, (thing, location))
                if held_object is not None:
                    table[f"move {held_object} to {location}"] = (_move, (held_object, location))
            if held_object is not None:
                for verb, appliance in APPLIANCE.items():
                    if kind_of(location) == appliance and kind_of(held_object) in KITCHEN:
                        table[f"{verb} {held_object} with {location}"] = (_treat, (verb, held_object, location))
        if held_object is not None:
            table[f"examine {held_object}"] = (_examine_thing, (held_object,))
        table["inventory"] = (_inventory, ())
        table["look"] = (_look, ())
        return table

    def _is_won(self) -> bool:
        if self.errand.kind == "look_at_obj_in_light":
            at_lamp = self.location is not None and LAMP in self.contents[self.location]
            return (
                self.lit
                and at_lamp
                and self.held_object is not None
                and kind_of(self.held_object) == self.errand.object
            )
        done = sum(self.is_done(thing, place, self.errand) for place in self.targets for thing in self.contents[place])
        return done >= (2 if self.errand.kind == "pick_two_obj_and_place" else 1)

    def is_done(self, thing: str, place: str, errand: Errand) -> bool:
        """Whether this object is at the target of the errand, in the required state."""
        if kind_of(place) != errand.target or kind_of(thing) != errand.object:
            return False
        return errand.verb is None or STATE_AFTER[errand.verb] in self.state.get(thing, ())

    def look_at(self, place: str) -> str:
        """Describe a receptacle. If it is open, its content counts as seen."""
        if place in self.closed_places:
            return f"The {place} is closed."
        self.seen.add(place)
        things = format_list(self.contents[place])
        if kind_of(place) in OPENABLE:
            return f"The {place} is open. In it, you see {things}."
        return f"On the {place}, you see {things}."


def _go(env: HouseholdEnv, place: str) -> str:
    env.location = place
    return f"You arrive at {place}. {env.look_at(place)}"


def _open(env: HouseholdEnv, place: str) -> str:
    env.closed_places.discard(place)
    return f"You open the {place}. {env.look_at(place)}"


def _close(env: HouseholdEnv, place: str) -> str:
    env.closed_places.add(place)
    return f"You close the {place}."


def _take(env: HouseholdEnv, thing: str, place: str) -> str:
    env.contents[place].remove(thing)
    env.held_object = thing
    return f"You pick up the {thing} from the {place}."


def _move(env: HouseholdEnv, thing: str, place: str) -> str:
    env.contents[place].append(thing)
    env.held_object = None
    return f"You move the {thing} to the {place}."


def _treat(env: HouseholdEnv, verb: str, thing: str, place: str) -> str:
    states = env.state.setdefault(thing, set())
    if verb != "clean":
        states -= {"hot", "cool"}  # a thing is never both hot and cool
    states.add(STATE_AFTER[verb])
    return f"You {verb} the {thing} using the {place}."


def _use(env: HouseholdEnv) -> str:
    env.lit = True
    return f"You turn on the {LAMP}."


def _examine_place(env: HouseholdEnv, place: str) -> str:
    return env.look_at(place)


def _examine_thing(env: HouseholdEnv, thing: str) -> str:
    states = sorted(env.state.get(thing, ()))
    return f"This is a {' '.join(states)} {thing}." if states else f"There's nothing special about {thing}."


def _inventory(env: HouseholdEnv) -> str:
    return f"You are carrying: a {env.held_object}." if env.held_object else "You are not carrying anything."


def _look(env: HouseholdEnv) -> str:
    return f"You are facing the {env.location}. Next to it, you see nothing." if env.location else env.intro
