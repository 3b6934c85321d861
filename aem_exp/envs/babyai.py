"""BabyAI as text: instructions in small grid worlds (Chevalier-Boisvert et al., arXiv 1810.08272), from the package `minigrid`.

The package observes a grid of 7 x 7 cells in front of the agent. Here, the agent reads one sentence per visible object, with its
distance, and the distances to the walls. The package's own bot is the scripted player. Tasks are seeds.
"""

import io
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from random import Random
from typing import Any, Final

from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.core.extras import install_command
from aem_exp.envs import fingerprint_of, parsing
from aem_exp.envs.adapter import AdapterEnv, AdapterWorld

RULES_VERSION: Final = 1  # raise when the same task would read or play differently
ACTIONS: Final = {"turn left": 0, "turn right": 1, "go forward": 2, "pick up": 3, "drop": 4, "toggle": 5}
DECISIVE: Final = ("pick up", "drop", "toggle", "go forward")  # actions that a shy player avoids
VIEW: Final = 7  # width and depth of the visible part of the grid
KINDS: Final = ("door", "key", "ball", "box")
COLOURS: Final = ("red", "green", "blue", "purple", "yellow", "grey")
DOOR_STATES: Final = ("open", "closed", "locked")
WORDS: Final = """
    you see a an carry nothing wall step steps forward left right and to your in front of the on behind go get pick up put next
    open then after before turn drop toggle object there is no or
""".split()


class BabyAIEnv(AdapterEnv):
    """One level. It plays one mission at a time."""

    def __init__(self, world: "BabyAI"):
        super().__init__(world)
        self._game = _make_level(world.level)
        self._bot: Any = None

    def start_game(self, seed: int) -> str:
        with redirect_stdout(io.StringIO()):  # the package prints each rejected draw of a mission
            observation, _ = self._game.reset(seed=seed)
        self.goal, self._bot, self._last_action = str(observation["mission"]), None, None
        return describe_view(observation["image"], self._game.unwrapped.carrying)

    def apply_action(self, action: Any) -> tuple[str, float, bool, bool]:
        self._last_action = action
        observation, reward, terminated, truncated, _ = self._game.step(action)
        text = describe_view(observation["image"], self._game.unwrapped.carrying)
        return text, float(reward > 0), bool(terminated), bool(truncated)

    def close(self) -> None:
        self._game.close()

    def advise(self) -> str:
        """The action of the package's bot. It knows the part of the grid that it has seen since its first advice."""
        from minigrid.utils.baby_ai_bot import BabyAIBot

        if self._bot is None:
            self._bot, self._last_action = BabyAIBot(self._game.unwrapped), None
        names = list(ACTIONS)
        try:
            action = int(self._bot.replan(self._last_action))
        except Exception:  # of any type: the bot fails in some states, and is then of no use until the next mission
            self._bot = None
            return "go forward"
        return names[action] if action < len(names) else "toggle"


def describe_view(image: Any, carried: Any) -> str:
    """Describe a view.

    Args:
        image: (7, 7, 3) kind, colour and state of each cell; the agent is at (3, 6) and looks towards row 0.
        carried: the object that the agent carries, or None.
    """
    from minigrid.core.constants import IDX_TO_OBJECT

    middle, own = VIEW // 2, VIEW - 1
    seen = []
    for ahead in range(VIEW):
        for aside in sorted(range(-middle, middle + 1), key=abs):
            kind, colour, state = (int(one) for one in image[middle + aside, own - ahead])
            if IDX_TO_OBJECT[kind] in KINDS and (ahead or aside):
                name = f"{COLOURS[colour]} {IDX_TO_OBJECT[kind]}"
                door = f"{DOOR_STATES[state]} " if IDX_TO_OBJECT[kind] == "door" else ""
                seen.append(f"a {door}{name} {_place(ahead, aside)}")
    walls = [
        f"{distance} {word}"
        for word, cells in (
            ("forward", [(middle, own - i) for i in range(1, VIEW)]),
            ("left", [(middle - i, own) for i in range(1, middle + 1)]),
            ("right", [(middle + i, own) for i in range(1, middle + 1)]),
        )
        if (distance := _first_wall(image, cells))
    ]
    lines = [f"you see {seen[0]}", *seen[1:]] if seen else ["you see nothing"]
    lines += [f"wall {' and '.join(walls)}"] if walls else []
    lines += [f"you carry a {carried.color} {carried.type}"] if carried is not None else []
    return "\n".join(lines)


def _first_wall(image: Any, cells: list[tuple[int, int]]) -> int | None:
    """The distance to the first cell that is a wall; None if none is visible."""
    from minigrid.core.constants import OBJECT_TO_IDX

    return next((i for i, cell in enumerate(cells, 1) if int(image[cell][0]) == OBJECT_TO_IDX["wall"]), None)


def _place(ahead: int, aside: int) -> str:
    side = "left" if aside < 0 else "right"
    parts = [f"{ahead} forward"] if ahead else []
    return " and ".join(parts + ([f"{abs(aside)} {side}"] if aside else []))


class BabyAI(AdapterWorld):
    """Missions of one level of BabyAI.

    Args:
        level: name of the level without prefix and version, such as `GoToLocal`.
        tags: responses must be `<think>..</think><action>..</action>`.
        reward: paid for a completed mission.
        sizes: tasks per split.
    """

    def __init__(
        self, level: str = "GoToLocal", tags: bool = False, reward: float = 1.0, sizes: dict[str, int] | None = None
    ):
        super().__init__(dict(ACTIONS), "complete the mission", 1.0, tags, reward, sizes)
        if find_spec("minigrid") is None:
            raise MissingResource("env.make.level", level, f"needs minigrid: {install_command('babyai')}")
        if level not in (levels := list_levels()):
            raise ConfigError("env.make.level", level, choices=levels)
        self.level = level
        settings = [RULES_VERSION, level, tags, reward, version("minigrid")]
        self.fingerprint = fingerprint_of("babyai", settings)

    def env(self) -> BabyAIEnv:
        return BabyAIEnv(self)

    def words(self) -> list[str]:
        """Everything that a policy reads or writes in this world: words, and actions that are one token each."""
        tags = ["<think>", "</think>", "<action>", "</action>"] if self.tags else []
        return [*ACTIONS, *WORDS, *KINDS, *COLOURS, *DOOR_STATES, *map(str, range(VIEW + 1)), *tags]

    def expert(self, env: BabyAIEnv, random: Random, noise: float = 0.0, shyness: float = 0.0) -> str:
        """The response of the package's bot.

        With probability `noise` the action is random. With probability `shyness` the agent turns instead of a decisive action.
        """
        action = env.advise()
        if random.random() < noise:
            action = random.choice(list(ACTIONS))
        elif action in DECISIVE and random.random() < shyness:
            action = random.choice(["turn left", "turn right"])
        return parsing.write_response(action, self.tags)

    def oracle(self, env: BabyAIEnv) -> str:
        """The response of the bot."""
        return self.expert(env, Random(0))


def list_levels() -> list[str]:
    """The names of all levels."""
    import gymnasium
    import minigrid  # noqa: F401 -- registers the levels

    ids = [name for name in gymnasium.registry if name.startswith("BabyAI-")]
    return sorted(name.removeprefix("BabyAI-").removesuffix("-v0") for name in ids)


def _make_level(level: str) -> Any:
    import gymnasium
    import minigrid  # noqa: F401 -- registers the levels

    return gymnasium.make(f"BabyAI-{level}-v0", disable_env_checker=True)
