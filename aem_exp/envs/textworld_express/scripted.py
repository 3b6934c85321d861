"""The scripted player of TextWorldExpress.

In `coin`, `mapreader` and `twc` it explores, and recovers from any action, because the package's own solutions of these games
contain random walks, which differ between processes. In the other games it follows the package's solution. Its random actions
are then limited to those that change nothing.
"""

import functools
import json
import re
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aem_exp.envs.textworld_express.world import TextWorldExpressEnv

FREE: Final = ("look around", "inventory", "task")  # actions that change nothing
HARMLESS: Final = ("move ", "open door", "read map", *FREE)  # beginnings of actions that a shy player does not avoid
_ROOM: Final = re.compile(r"You are in the (.+?)\.")
_EXIT: Final = re.compile(r"[Tt]o the (North|South|East|West) you see the (.+?)\.")
_CLOSED: Final = re.compile(r"[Tt]o the (North|South|East|West) you see a closed")
_LINKS: Final = re.compile(r"The (.+?) connects to the (.+?)\.")
_HELD: Final = re.compile(r"^ *(?:an?|some) (.+?)\.?$", re.MULTILINE)
_TASK: Final = re.compile(r"located in the (.+?), .* found in the (.+?)\.")  # of the game mapreader


class Memory:
    """What an agent did and saw in an episode."""

    def __init__(self) -> None:
        self.taken: list[str] = []  # actions
        self.room = ""
        self.exits: dict[str, dict[str, str]] = {}  # visited room -> neighbour -> direction
        self.looks: dict[str, str] = {}  # visited room -> its last description
        self.map: dict[str, list[str]] = {}  # room -> its neighbours, from the map
        self.solution: list[str] | None = None

    def add(self, observation: str, look: str) -> None:
        """Note what was seen after an action."""
        for name, neighbours in _LINKS.findall(observation):
            self.map[name] = re.split(r", | and ", neighbours)
        if found := _ROOM.match(look):
            self.room = found[1]
            self.looks[self.room] = look
            self.exits[self.room] = {name: side.lower() for side, name in _EXIT.findall(look)}

    def way_to(self, wanted: set[str]) -> str | None:
        """The direction of the first step of a shortest way to one of the rooms; None if no way is known."""
        came_from = {self.room: ""}
        queue = [self.room]
        for room in queue:
            if room in wanted:
                while came_from[room] != self.room:
                    room = came_from[room]
                return self.exits[self.room].get(room)
            for name in sorted(self.exits.get(room) or self.map.get(room, [])):
                if name not in came_from:
                    came_from[name] = room
                    queue.append(name)
        return None


def next_action(env: "TextWorldExpressEnv", random: Random, noise: float, shyness: float) -> str:
    """The next action in the current state of a game."""
    play = _PLAYERS.get(env.task.kind)
    action, free = (play or _follow_solution)(env), [action for action in FREE if action in env.actions]
    if random.random() < noise:
        return random.choice(env.actions if play else free)
    avoided = not action.startswith(HARMLESS) and random.random() < shyness
    return random.choice(free) if avoided else action


def _follow_solution(env: "TextWorldExpressEnv") -> str:
    """The next action of the package's solution."""
    memory = env.memory
    if memory.solution is None:
        memory.solution = [action for action in env.solve() if action not in FREE]
    done = 0
    for action in memory.taken:
        if action in memory.solution[done:]:
            done = memory.solution.index(action, done) + 1
    # A solution also opens what is open already, which the game then does not list as an action.
    return next((action for action in memory.solution[done:] if action in env.actions), FREE[0])


def _play_coin(env: "TextWorldExpressEnv") -> str:
    return "take coin" if "take coin" in env.actions else _explore(env)


def _play_mapreader(env: "TextWorldExpressEnv") -> str:
    """Read the map, fetch the coin, and put it into the box."""
    found = _TASK.search(env.goal)
    assert found, env.goal
    holds_coin = "coin" in _HELD.findall(env.inventory)
    wanted, action = (found[2], "put coin in box") if holds_coin else (found[1], "take coin")
    if env.memory.room == wanted and action in env.actions:
        return action
    if not env.memory.map and "read map" in env.actions:
        return "read map"
    return _go_to({wanted}, env) or _explore(env)


def _play_twc(env: "TextWorldExpressEnv") -> str:
    """Open everything, take what belongs elsewhere, and put it where the package's table says that it belongs."""
    places = _usual_places()
    held = {name: places.get(name, []) for name in _HELD.findall(env.inventory.lower())}
    put = {f"put {name} {word} {place}": name for name in held for place in held[name] for word in ("in", "on")}
    for action in env.actions:
        name = action.removeprefix("take ")
        belongs_elsewhere = name in places and not any(f"put {name} " in taken for taken in env.memory.taken)
        if action in put or action.startswith("open ") or (action.startswith("take ") and belongs_elsewhere):
            return action
    wanted = [place for each in held.values() for place in each]
    rooms = {room for room, look in env.memory.looks.items() if any(f" {place}" in look.lower() for place in wanted)}
    return _go_to(rooms - {env.memory.room}, env) or _explore(env)


def _explore(env: "TextWorldExpressEnv") -> str:
    """Go to the nearest room that was not visited."""
    visited = env.memory.exits
    return _go_to({name for exits in visited.values() for name in exits} - visited.keys(), env) or FREE[0]


def _go_to(rooms: set[str], env: "TextWorldExpressEnv") -> str | None:
    """The next step to the nearest of these rooms: open what is closed, then move. None if no way is known."""
    if closed := _CLOSED.search(env.look):
        return f"open door to {closed[1].lower()}"
    action = f"move {env.memory.way_to(rooms)}"
    return action if action in env.actions else None


@functools.cache
def _usual_places() -> dict[str, list[str]]:
    """Object -> the places where it belongs, for the objects of all splits, in lower case."""
    import textworld_express

    table = json.loads((Path(textworld_express.__file__).parent / "twc_objects.folds.json").read_text())
    objects = {name.lower(): entry["locations"] for fold in table.values() for name, entry in fold.items()}
    return {name: [place.lower() for place in places] for name, places in objects.items()}


_PLAYERS: Final = {"coin": _play_coin, "mapreader": _play_mapreader, "twc": _play_twc}
