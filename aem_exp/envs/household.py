"""The household: ALFWorld's text style and its six kinds of task, in pure Python.

Decided here: the rules, the wording, which tasks exist and how they are split, and how a scripted player plays. A room
is a handful of receptacles with objects in them; an episode asks for one errand ("put a clean mug in cabinet"). Goals
(kind, object, target) and layouts (which receptacles there are and where every object lies) are both disjoint between
train, dev and test, so held-out success is success at errands never asked in rooms never seen.

Left out of ALFWorld: what fits where (any object goes into any receptacle) and slicing.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, Final, NamedTuple

from aem_exp.core.errors import ConfigError
from aem_exp.envs import LazyTasks, Task, Turn, parsing, split_sizes

RULES_VERSION: Final = (
    3  # raise when the same task would play differently; it enters the fingerprint, and draws new splits
)
OPENABLE: Final = ("cabinet", "drawer", "fridge", "safe", "microwave")
SURFACES: Final = (
    *("shelf", "countertop", "desk", "sofa", "sinkbasin", "diningtable", "sidetable", "coffeetable"),
    *("dresser", "bed", "armchair", "garbagecan"),
)
KITCHEN: Final = ("mug", "plate", "bowl", "cup", "apple", "tomato", "potato", "bread", "egg", "lettuce")
OBJECTS: Final = (*KITCHEN, "book", "cd", "pen", "watch", "keychain", "pillow", "vase", "newspaper")
APPLIANCE: Final = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
STATE_AFTER: Final = {"clean": "clean", "heat": "hot", "cool": "cool"}
GOALS: Final = {
    "pick_and_place": "put a {object} in {target}.",
    "look_at_obj_in_light": "look at {object} under the desklamp.",
    "pick_clean_then_place": "put a clean {object} in {target}.",
    "pick_heat_then_place": "put a hot {object} in {target}.",
    "pick_cool_then_place": "put a cool {object} in {target}.",
    "pick_two_obj_and_place": "put two {object} in {target}.",
}
SPLITS: Final = {"train": range(6), "dev": range(6, 8), "test": range(8, 10)}  # tenths of goals and of layouts
LAMP: Final = "desklamp 1"
MAX_ACTION_CHARACTERS: Final = 100  # characters; what later prompts quote of a response stays this short

# Wordings that never vary. A word-level tokenizer may take each as one token: shorter rows, same text.
PHRASES: Final = (
    "You are in the middle of a room. Looking quickly around you, you see",
    ". Your task is to:",
    "You arrive at",
    "You are facing the",
    ". Next to it, you see nothing.",
    ", you see",
    ", you see nothing.",
    "is open. In it, you see",
    "is open. In it, you see nothing.",
    "is closed.",
    "You open the",
    "You close the",
    "You pick up the",
    "You move the",
    "You turn on the",
    "You are carrying: a",
    "You are not carrying anything.",
    "There's nothing special about",
    "This is a",
    "Nothing happens.",
    ". On the",
    ". The",
    ", a",
    ", and a",
    "from the",
    "to the",
    "go to",
    "put a",
    "put two",
    "look at",
    "under the desklamp.",
)
NOTHING: Final = "Nothing happens."
WORDS: Final = (
    *("the", "a", "and", "in", "on", "it", "with", "from", "to", "is", "at", "under", "using", "nothing", "two", "hot"),
    *("go", "open", "close", "take", "move", "use", "put", "look", "inventory", "examine", "clean", "heat", "cool"),
    *("You", "On", "The", "This", ",", ".", ":", "'"),
)
_NAME = r"[a-z]+ \d+"
_GRAMMAR = re.compile(
    rf"look|inventory|(?:go to|open|close|examine|use) {_NAME}|take {_NAME} from {_NAME}"
    rf"|move {_NAME} to {_NAME}|(?:clean|heat|cool) {_NAME} with {_NAME}"
)


class Errand(NamedTuple):
    """What an episode asks for."""

    kind: str
    object: str
    target: str

    @property
    def text(self) -> str:
        return GOALS[self.kind].format(object=self.object, target=self.target)

    @property
    def verb(self) -> str | None:
        """What must be done to the object before it is placed: clean, heat, cool or nothing."""
        verb = self.kind.split("_")[1]
        return verb if verb in APPLIANCE else None


def kind_of(name: str) -> str:
    """The type of a numbered thing: 'mug 1' is a 'mug'."""
    return name.rsplit(" ", 1)[0]


def format_list(things: Iterable[str]) -> str:
    """ALFWorld's list: 'a mug 1, and a book 1', or 'nothing'."""
    names = [f"a {thing}" for thing in things]
    if len(names) > 1:
        names[-1] = f"and {names[-1]}"
    return ", ".join(names) or "nothing"


def parse_action(response: str, tags: bool) -> tuple[str, bool]:
    """What a response asks for, and whether it could be read."""
    if tags:
        return parsing.parse_tagged(response, MAX_ACTION_CHARACTERS)
    action, short = parsing.parse_bare(response, MAX_ACTION_CHARACTERS)
    return action, short and _GRAMMAR.fullmatch(action) is not None


class HouseholdEnv:
    """One room, played by one agent who carries at most one object."""

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
        self.seen: set[str] = set()  # receptacles whose content the agent has been shown
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
        move = self.admissible_actions.get(action) if not self.won else None
        observation = NOTHING
        if move is not None:
            verb, things = move
            observation = verb(self, *things)
            self.won = self._is_won()
            self.admissible_actions = self._build_actions()
        metrics = {"won": float(self.won), "format_valid": float(valid), "admissible": float(move is not None)}
        reward = self.reward if self.won and move is not None else 0.0
        return Turn(observation, reward, self.won, valid=valid, actions=tuple(self.admissible_actions), metrics=metrics)

    def _build_actions(self) -> dict[str, tuple[Callable[..., str], tuple[str, ...]]]:
        """Every action that would be answered, with what carries it out."""
        here, held = self.location, self.held_object
        table: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
            journey: (_go, (place,)) for place, journey in self.go_actions.items() if place != here
        }
        if here is not None:
            table[f"examine {here}"] = (_examine_place, (here,))
            if here in self.closed_places:
                table[f"open {here}"] = (_open, (here,))
            else:
                if kind_of(here) in OPENABLE:
                    table[f"close {here}"] = (_close, (here,))
                for thing in self.contents[here]:
                    if thing == LAMP:
                        table[f"use {LAMP}"] = (_use, ())
                    elif held is None:
                        table[f"take {thing} from {here}"] = (_take, (thing, here))
                if held is not None:
                    table[f"move {held} to {here}"] = (_move, (held, here))
            if held is not None:
                for verb, appliance in APPLIANCE.items():
                    if kind_of(here) == appliance and kind_of(held) in KITCHEN:
                        table[f"{verb} {held} with {here}"] = (_treat, (verb, held, here))
        if held is not None:
            table[f"examine {held}"] = (_examine_thing, (held,))
        table["inventory"] = (_inventory, ())
        table["look"] = (_look, ())
        return table

    def _is_won(self) -> bool:
        if self.errand.kind == "look_at_obj_in_light":
            lamp_here = self.location is not None and LAMP in self.contents[self.location]
            return (
                self.lit
                and lamp_here
                and self.held_object is not None
                and kind_of(self.held_object) == self.errand.object
            )
        there = sum(self.is_done(thing, place, self.errand) for place in self.targets for thing in self.contents[place])
        return there >= (2 if self.errand.kind == "pick_two_obj_and_place" else 1)

    def is_done(self, thing: str, place: str, errand: Errand) -> bool:
        """Whether this object lies where the errand wants it, in the state it wants."""
        if kind_of(place) != errand.target or kind_of(thing) != errand.object:
            return False
        return errand.verb is None or STATE_AFTER[errand.verb] in self.state.get(thing, ())

    def look_at(self, place: str) -> str:
        """What one sees of a receptacle, and remember that it was seen."""
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
        states -= {"hot", "cool"}  # a thing is never both
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


def expert_action(env: HouseholdEnv, errand: Errand, random: Random) -> str:
    """The next action of a player who runs this errand and knows only what the episode has shown."""
    if env.held_object is None:
        for place in (place for place in env.contents if place in env.seen):  # in an order that hashing does not decide
            for thing in env.contents[place]:
                if kind_of(thing) == errand.object and not env.is_done(thing, place, errand):
                    return _approach(env, place) or f"take {thing} from {place}"
        return _explore(env, errand, random)
    if kind_of(env.held_object) != errand.object:  # picked up by mistake
        place = env.location or random.choice(list(env.contents))
        return _approach(env, place) or f"move {env.held_object} to {place}"
    if errand.kind == "look_at_obj_in_light":
        lamps = [place for place in env.seen if LAMP in env.contents[place]]
        return (_approach(env, lamps[0]) or f"use {LAMP}") if lamps else _explore(env, errand, random)
    if errand.verb and STATE_AFTER[errand.verb] not in env.state.get(env.held_object, ()):
        place = _choose_place(env, APPLIANCE[errand.verb], random)
        return f"{errand.verb} {env.held_object} with {place}" if env.location == place else f"go to {place}"
    place = _choose_place(env, errand.target, random)
    return _approach(env, place) or f"move {env.held_object} to {place}"


def _choose_place(env: HouseholdEnv, kind: str, random: Random) -> str:
    places = [place for place in env.contents if kind_of(place) == kind]
    return env.location if env.location in places else random.choice(places)


def _approach(env: HouseholdEnv, place: str) -> str | None:
    """The next step towards standing before an open receptacle; None when there."""
    if env.location != place:
        return f"go to {place}"
    return f"open {place}" if place in env.closed_places else None


def _explore(env: HouseholdEnv, errand: Errand, random: Random) -> str:
    """Open what is before one, else go where one has not been; the target last, for nothing wanted lies there."""
    unseen = [place for place in env.contents if place not in env.seen]
    if env.location in unseen:
        return f"open {env.location}"
    elsewhere = [place for place in unseen if kind_of(place) != errand.target]
    return f"go to {random.choice(elsewhere or unseen or list(env.contents))}"


def _digest(thing: Any) -> bytes:
    """A hash that is the same on every machine."""
    return hashlib.sha256(json.dumps([RULES_VERSION, thing], sort_keys=True).encode()).digest()


def split_of(layout: dict[str, list[str]]) -> str:
    """The one split that a room belongs to; the order in which its things are listed does not matter."""
    tenth = _digest({place: sorted(things) for place, things in layout.items()})[0] % 10
    return next(split for split, share in SPLITS.items() if tenth in share)


class Household:
    """A world of rooms and errands; the keywords are its difficulty.

    Args:
        kinds: which of ALFWorld's six kinds of task are asked for, each as often as any other.
        receptacles: how many a room has.
        openable: how many of them must be opened first (more where the errand itself needs more); the rest are surfaces.
        copies: how many receptacles of one type a room may have.
        objects: how many movable objects lie in it.
        receptacle_types, object_types: what rooms are made of; null: everything.
        tags: responses are `<think>..</think><action>..</action>`; otherwise the whole response is the action.
        reward: paid once, on success.
        sizes: tasks per split.
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
        self._check_settings()
        self.goals = {split: self._select_goals(split) for split in SPLITS}

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in SPLITS:
            raise ConfigError("split", split, choices=list(SPLITS))
        return LazyTasks(self.sizes[split], lambda index: self._draw_task(split, index))

    def env(self) -> HouseholdEnv:
        return HouseholdEnv(tags=self.tags, reward=self.reward)

    def words(self) -> tuple[str, ...]:
        """Everything a policy of this world reads or writes: words, and fixed wordings that may be one token."""
        numbers = [str(n) for n in range(max(self.copies, self.objects) + 1)]
        tags = ["<think>", "</think>", "<action>", "</action>"] if self.tags else []
        kinds = dict.fromkeys([*self.receptacle_types, *self.object_types, *APPLIANCE.values(), kind_of(LAMP)])
        names = [f"{kind} {number}" for kind in kinds for number in numbers[1:]]
        return (*PHRASES, *WORDS, *kinds, *names, *numbers, *tags)

    def expert(self, env: HouseholdEnv, random: Random, noise: float = 0.0, shyness: float = 0.0) -> str:
        """The response of the scripted player.

        With probability `noise` it does anything, blunders included; and what it ought to open it walks past with
        probability `shyness`, to anywhere else.
        """
        action = expert_action(env, env.errand, random)
        if random.random() < noise:
            strange, missing = random.choice(self.receptacle_types), random.choice(self.object_types)
            blunders = [f"go to {strange} 1", f"take {missing} 1 from {env.location or f'{strange} 1'}"]
            action = random.choice([*env.admissible_actions, *blunders])
        elif action.startswith("open") and random.random() < shyness:
            action = random.choice([journey for place, journey in env.go_actions.items() if place != env.location])
        return f"<think></think><action>{action}</action>" if self.tags else action

    def _select_goals(self, split: str) -> dict[str, list[Errand]]:
        """This split's share of the errands of each kind, in an order that only their hash decides."""
        mine: dict[str, list[Errand]] = {}
        for kind in self.kinds:
            errands = sorted(self._list_errands(kind), key=_digest)
            share = SPLITS[split]
            part = errands[len(errands) * share.start // 10 : len(errands) * share.stop // 10]
            if not part:
                remedy = f"{kind} needs more types, so that every split gets a goal"
                raise ConfigError("env.make.object_types", self.object_types, remedy=remedy)
            mine[kind] = part
        return mine

    def _list_errands(self, kind: str) -> list[Errand]:
        verb = Errand(kind, "", "").verb
        objects = [thing for thing in self.object_types if verb is None or thing in KITCHEN]
        if kind == "look_at_obj_in_light":
            return [Errand(kind, thing, "desklamp") for thing in objects]
        targets = [place for place in self.receptacle_types if verb is None or place != APPLIANCE[verb]]
        return [Errand(kind, thing, target) for thing in objects for target in targets]

    def _draw_task(self, split: str, index: int) -> Task:
        """Task number `index` of a split: its errand, and the first layout drawn that belongs to this split.

        The kind comes first: kinds differ widely in how many goals they have, and the rare are not to be drawn rarely.
        """
        random = Random(f"{split}-{index}")  # a string seeds alike on every machine and version
        kind, *others = self.kinds
        if others:  # a choice among one would use up a draw
            kind = random.choice(self.kinds)
        errand = random.choice(self.goals[split][kind])
        for _ in range(1000):
            layout = self._draw_layout(errand, random)
            if layout and split_of(layout) == split:
                payload = {**errand._asdict(), "layout": layout}
                return Task(f"{split}-{index}", seed=index, kind=errand.kind, payload=payload)
        remedy = "too few different rooms to split; choose more receptacles, objects or types"
        raise ConfigError("env.make.receptacles", self.receptacles, remedy=remedy)

    def _draw_layout(self, errand: Errand, random: Random) -> dict[str, list[str]]:
        """A room in which the errand can be run and is not yet done."""
        light = errand.kind == "look_at_obj_in_light"
        kinds = ([] if light else [errand.target]) + ([APPLIANCE[errand.verb]] if errand.verb else [])
        for pool, wanted in ((OPENABLE, self.openable), (SURFACES, self.receptacles - self.openable)):
            spare = [kind for kind in self.receptacle_types if kind in pool] * self.copies
            for kind in kinds:
                if kind in spare:
                    spare.remove(kind)
            missing = wanted - sum(kind in pool for kind in kinds)
            kinds = kinds + random.sample(spare, max(0, min(missing, self.receptacles - len(kinds))))
        random.shuffle(kinds)
        places = _number_names(kinds)
        random.shuffle(places)
        layout: dict[str, list[str]] = {place: [] for place in places}
        elsewhere = [place for place in places if kind_of(place) != errand.target]
        if not elsewhere:
            return {}  # the object would lie where it is wanted
        own = [errand.object] * (2 if errand.kind == "pick_two_obj_and_place" else 1)
        others = [kind for kind in self.object_types if kind != errand.object]
        strangers = random.choices(others, k=self.objects - len(own)) if others else []
        for thing in _number_names([*own, *strangers]):
            layout[random.choice(elsewhere if kind_of(thing) == errand.object else places)].append(thing)
        if light:
            layout[random.choice(places)].append(LAMP)
        return layout

    def _check_settings(self) -> None:
        """Refuse knobs that make no room, before any room is made."""
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
            "objects": (self.objects, 2 if "pick_two_obj_and_place" in self.kinds else 1, 99),
        }
        for field, (number, least, most) in limits.items():
            if not least <= number <= most:
                raise ConfigError(f"env.make.{field}", number, remedy=f"choose {least} to {most}")


def _number_names(kinds: Iterable[str]) -> list[str]:
    """Give each thing its number within its type: mug 1, mug 2, book 1."""
    count: dict[str, int] = {}
    names = []
    for kind in kinds:
        count[kind] = count.get(kind, 0) + 1
        names.append(f"{kind} {count[kind]}")
    return names
