"""The world of the household: its tasks, their split, and the vocabulary of a small policy.

Goals (kind, object, target) and layouts (the receptacles and the place of every object) are both disjoint between train, dev and
test. Success on held-out tasks is therefore success at new goals in new rooms.
"""

import hashlib
import json
from collections.abc import Sequence
from random import Random

from aem_exp.core.errors import ConfigError
from aem_exp.envs import LazyTasks, Task, parsing, split_sizes
from aem_exp.envs.household.env import HouseholdEnv
from aem_exp.envs.household.expert import expert_action
from aem_exp.envs.household.layouts import SPLITS, RoomSize, digest, draw_layout, split_of
from aem_exp.envs.household.rules import (
    APPLIANCE,
    GOALS,
    KITCHEN,
    LAMP,
    OBJECTS,
    OPENABLE,
    PHRASES,
    RULES_VERSION,
    SURFACES,
    WORDS,
    Errand,
    kind_of,
)

PANEL_DISTANCE = 10**6  # indices between the panels of two seeds; also their maximum size


class Household:
    """Rooms and household tasks. The arguments decide the difficulty.

    Args:
        kinds: the kinds of task, of ALFWorld's six; all are equally frequent.
        receptacles: number of receptacles in a room.
        openable: number of receptacles that must be opened first; the others are surfaces. A task may need more.
        copies: largest number of receptacles of one type in a room.
        objects: number of movable objects in a room.
        receptacle_types: types of receptacles in rooms; null: all.
        object_types: types of objects in rooms; null: all.
        tags: responses must be `<think>..</think><action>..</action>`; otherwise the whole response is the action.
        reward: paid once, on success.
        sizes: tasks per split.
        panel_seed: draws other tasks for the panels of held-out tasks, such as for a sweep that confirms an earlier one.
    """

    splits = tuple(SPLITS)

    def __init__(
        self,
        kinds: Sequence[str] = tuple(GOALS),
        receptacles: int = 8,
        openable: int = 4,
        copies: int = 2,
        objects: int = 6,
        receptacle_types: Sequence[str] | None = None,
        object_types: Sequence[str] | None = None,
        tags: bool = False,
        reward: float = 1.0,
        sizes: dict[str, int] | None = None,
        panel_seed: int = 0,
    ) -> None:
        self.kinds = list(kinds)
        self.receptacles, self.openable, self.copies, self.objects = receptacles, openable, copies, objects
        self.receptacle_types = list(receptacle_types or (*OPENABLE, *SURFACES))
        self.object_types = list(object_types or OBJECTS)
        self.tags, self.reward = tags, reward
        rules = vars(self) | ({"draw": "a kind, then a goal"} if len(self.kinds) > 1 else {})
        digest = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:12]
        self.fingerprint = f"household-{RULES_VERSION}-{digest}"
        self.sizes = split_sizes({"train": 4096, "dev": 128, "test": 128}, sizes)
        self.panel_seed = panel_seed
        self._check_settings()
        self.goals = {split: self._select_goals(split) for split in SPLITS}

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in SPLITS:
            raise ConfigError("split", split, choices=list(SPLITS))
        first = 0 if split == "train" else self.panel_seed * PANEL_DISTANCE
        return LazyTasks(self.sizes[split], lambda index: self._draw_task(split, first + index))

    def env(self) -> HouseholdEnv:
        return HouseholdEnv(tags=self.tags, reward=self.reward)

    def words(self) -> tuple[str, ...]:
        """Everything that a policy reads or writes in this world: words, and fixed phrases that may be one token each."""
        numbers = [str(n) for n in range(max(self.copies, self.objects) + 1)]
        tags = ["<think>", "</think>", "<action>", "</action>"] if self.tags else []
        kinds = dict.fromkeys([*self.receptacle_types, *self.object_types, *APPLIANCE.values(), kind_of(LAMP)])
        names = [f"{kind} {number}" for kind in kinds for number in numbers[1:]]
        return (*PHRASES, *WORDS, *kinds, *names, *numbers, *tags)

    def expert(self, env: HouseholdEnv, random: Random, noise: float = 0.0, shyness: float = 0.0) -> str:
        """The response of the scripted expert.

        With probability `noise` it takes a random action, which may be a mistake. With probability `shyness` it goes elsewhere
        instead of opening a receptacle.
        """
        action = expert_action(env, env.errand, random)
        if random.random() < noise:
            place, thing = random.choice(self.receptacle_types), random.choice(self.object_types)
            mistakes = [f"go to {place} 1", f"take {thing} 1 from {env.location or f'{place} 1'}"]
            action = random.choice([*env.admissible_actions, *mistakes])
        elif action.startswith("open") and random.random() < shyness:
            action = random.choice([go for place, go in env.go_actions.items() if place != env.location])
        return parsing.write_response(action, self.tags)

    def _select_goals(self, split: str) -> dict[str, list[Errand]]:
        """The errands of a split, for each kind. Their hash decides the split."""
        goals: dict[str, list[Errand]] = {}
        for kind in self.kinds:
            errands = sorted(self._list_errands(kind), key=digest)
            tenths = SPLITS[split]
            part = errands[len(errands) * tenths.start // 10 : len(errands) * tenths.stop // 10]
            if not part:
                remedy = f"too few types: {kind} has no goal for every split; give more types"
                raise ConfigError("env.make.object_types", self.object_types, remedy=remedy)
            goals[kind] = part
        return goals

    def _list_errands(self, kind: str) -> list[Errand]:
        verb = Errand(kind, "", "").verb
        objects = [thing for thing in self.object_types if verb is None or thing in KITCHEN]
        if kind == "look_at_obj_in_light":
            return [Errand(kind, thing, "desklamp") for thing in objects]
        targets = [place for place in self.receptacle_types if verb is None or place != APPLIANCE[verb]]
        return [Errand(kind, thing, target) for thing in objects for target in targets]

    def _draw_task(self, split: str, index: int) -> Task:
        """Task number `index` of a split: an errand, and the first drawn layout that belongs to this split.

        The kind is drawn first. Otherwise kinds with few goals would be rare.
        """
        random = Random(f"{split}-{index}")  # a string is the same seed on every machine and Python version
        kind, *others = self.kinds
        if others:  # with one kind, a choice would use up a random number
            kind = random.choice(self.kinds)
        errand = random.choice(self.goals[split][kind])
        for _ in range(1000):
            layout = self._draw_layout(errand, random)
            if layout and split_of(layout) == split:
                payload = {**errand._asdict(), "layout": layout}
                return Task(f"{split}-{index}", seed=index, kind=errand.kind, payload=payload)
        remedy = "too few different rooms for all splits; choose more receptacles, objects or types"
        raise ConfigError("env.make.receptacles", self.receptacles, remedy=remedy)

    def _draw_layout(self, errand: Errand, random: Random) -> dict[str, list[str]]:
        """A random layout for this errand; empty if this draw has none."""
        size = RoomSize(
            self.receptacles, self.openable, self.copies, self.objects, self.receptacle_types, self.object_types
        )
        return draw_layout(errand, size, random)

    def _check_settings(self) -> None:
        """Refuse settings that allow no room."""
        for field, given, choices in (
            ("kinds", self.kinds, list(GOALS)),
            ("receptacle_types", self.receptacle_types, [*OPENABLE, *SURFACES]),
            ("object_types", self.object_types, list(OBJECTS)),
        ):
            for value in given or [""]:  # an empty list is refused too
                if value not in choices:
                    raise ConfigError(f"env.make.{field}", value, choices=choices)
        if self.copies < 1:
            raise ConfigError("env.make.copies", self.copies, remedy="choose at least 1")
        openable = self.copies * sum(kind in OPENABLE for kind in self.receptacle_types)
        surfaces = self.copies * len(self.receptacle_types) - openable
        limits = {
            "receptacles": (self.receptacles, 3, openable + surfaces),
            "openable": (self.openable, max(0, self.receptacles - surfaces), min(openable, self.receptacles)),
            "panel_seed": (self.panel_seed, 0, PANEL_DISTANCE),
            "objects": (self.objects, 2 if "pick_two_obj_and_place" in self.kinds else 1, 99),
        }
        for field, (number, least, most) in limits.items():
            if not least <= number <= most:
                raise ConfigError(f"env.make.{field}", number, remedy=f"choose {least} to {most}")
