"""Episodes: a policy and environments go in, trajectories of exact tokens come out.

Both histories are played by the same loop. With `full` history a conversation grows: a later turn is a suffix to the exact
tokens so far, and the trajectory is one row. With `window` every turn asks afresh, showing the last few turns, and is a row
of its own. Only live episodes are generated: all of them together, turn by turn; or each by itself, where the sampler's
conversations are independent.
"""

import math
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

from aem_exp import crew
from aem_exp.config import Env
from aem_exp.envs import Task, Turn
from aem_exp.envs.executor import Reply, Stage
from aem_exp.render import Chat
from aem_exp.sample import Independent, Sample, Sampler, Session

CRASHED, CONTEXT, TURNS, OVER, STOPPED = "crashed", "context", "turns", "over", "stopped"
OUTCOMES = ("won", "score")  # metrics of a turn that speak of the episode
HANDS: Final = 256  # episodes that go on by themselves at a time, at most: each has a thread


@dataclass(frozen=True)
class Episode:
    """One game to be played: `draw` names its group, `key` seeds its sampling."""

    task: Task
    draw: int
    member: int
    key: tuple


@dataclass
class Response:
    """What the policy said in one turn, and what came of it.

    `prompt` holds the tokens in front of it that are not in the row yet: all of them with a window, those since the
    previous response with full history. `entropy` is the mean over its tokens, in nats, where the sampler knows it;
    `advantage` (before modulation) and `alpha` are known once the step's credit is assigned.
    """

    prompt: list[int]
    sample: Sample
    observation: str
    text: str
    reward: float = 0.0
    valid: bool = True
    metrics: dict[str, float] = field(default_factory=dict)
    entropy: float | None = None
    advantage: float | None = None
    alpha: float | None = None


@dataclass
class Trajectory:
    """An episode as it was played. `ended`: over (by the rules), stopped (by the world, before that), turns, context, or
    crashed (with `error`).

    `goal` is what it asked for, as the world said at its start.
    """

    task: Task
    draw: int
    member: int
    responses: list[Response] = field(default_factory=list)
    ended: str = ""
    error: str = ""
    goal: str = ""

    @property
    def ret(self) -> float:
        """The episode's return: the sum of its rewards, rounded once; the same rewards in another order are the same return."""
        return math.fsum(r.reward for r in self.responses)

    @property
    def won(self) -> float:
        return self.responses[-1].metrics.get("won", 0.0) if self.responses else 0.0

    @property
    def score(self) -> float | None:
        """How well it went, from 0 to 1, in worlds that know more than won or lost."""
        return self.responses[-1].metrics.get("score") if self.responses else None

    @property
    def habits(self) -> dict[str, float]:
        """The world's other numbers, each the mean over the turns that have it."""
        told: dict[str, list[float]] = {}
        for response in self.responses:
            for name, value in response.metrics.items():
                if name not in OUTCOMES:
                    told.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in told.items()}

    @property
    def tokens(self) -> int:
        return sum(len(r.sample.ids) for r in self.responses)


@dataclass
class Row:
    """What the trainer sees: a prompt, then a completion in which `mask` is 1 on the tokens that the policy sampled.

    `trajectory` indexes the step's trajectories; `turns` are the turns whose responses the row holds, in order.
    """

    prompt: list[int]
    completion: list[int]
    mask: list[int]
    logps: list[float]
    entropies: list[float]
    trajectory: int
    turns: list[int]


class Clock:
    """Seconds spent, by name: `with clock("generation"): ...`. `read` hands them out and starts afresh.

    A moment counts once, however many threads are at work in it: for `first`, where somebody is at that.
    """

    def __init__(self, first: str = "") -> None:
        self.first = first
        self._seconds: dict[str, float] = {}
        self._at: dict[str, int] = {}  # how many are at what
        self._last = 0.0  # when somebody last began or ended something
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._change(name, 1)
        try:
            yield
        finally:
            self._change(name, -1)

    def read(self) -> dict[str, float]:
        with self._lock:
            seconds, self._seconds = self._seconds, {}
        return seconds

    def _change(self, name: str, by: int) -> None:
        with self._lock:
            now, going_on = time.perf_counter(), [name for name, count in self._at.items() if count]
            if going_on:
                counted = self.first if self.first in going_on else going_on[0]
                self._seconds[counted] = self._seconds.get(counted, 0.0) + now - self._last
            self._last = now
            self._at[name] = self._at.get(name, 0) + by


@runtime_checkable
class Watcher(Protocol):
    """Who is told how far the play is."""

    def turn(self, live: int) -> None:
        """So many episodes have played another turn, together; 0: all of them are over."""

    def token(self, count: int) -> None:
        """The turn that they are at has so many tokens by now, where they are sampled in this process."""

    def alone(self, slot: int, turn: int) -> None:
        """The episode in a slot has played this turn, by itself; after the first, whatever was in the slot before is over."""


class Rollout:
    """Plays episodes on a stage with one sampler.

    Args:
        stage: steps the environments.
        at_once: episodes that are live at a time, which bounds memory; 0: all.
        watcher: told of each turn.
    """

    def __init__(self, stage: Stage, env: Env, chat: Chat, at_once: int = 0, watcher: Watcher | None = None):
        self.stage, self.env, self.chat, self.at_once, self.watcher = stage, env, chat, at_once, watcher
        self.clock = Clock(first="generation")  # so what counts for environments is time without any

    def play(self, episodes: Sequence[Episode], sampler: Sampler) -> list[Trajectory]:
        """Play all episodes to their end, at most `at_once` at a time.

        What comes of an episode does not depend on the others, nor on whether it waited for them.
        """
        if isinstance(sampler, Independent):
            return list(self.flow(episodes, sampler))
        size = self.at_once or len(episodes)
        starts = range(0, len(episodes), size) if size else ()
        return [t for start in starts for t in self._play(episodes[start : start + size], sampler)]

    def flow(self, episodes: Sequence[Episode], sampler: Independent) -> Generator[Trajectory, None, None]:
        """The same, one by one and in order: those that come later are played meanwhile."""
        hands = min(self.at_once or len(episodes), HANDS)
        return crew.work(episodes, hands, partial(self._alone, sampler), sampler.hang_up)

    def _play(self, episodes: Sequence[Episode], sampler: Sampler) -> list[Trajectory]:
        games = {slot: _Game(episode, self.env, self.chat) for slot, episode in enumerate(episodes)}
        session = sampler.session()
        with self.clock("environment"):
            replies = self.stage.reset({slot: game.episode.task for slot, game in games.items()})
        live = {slot: game for slot, game in games.items() if game.begin(replies[slot])}
        while live:
            with self.clock("generation"):
                if self.env.history == "window":
                    session = sampler.session()
                samples = _ask(session, live)
            if self.watcher:
                self.watcher.turn(len(live))
            said = {slot: game.say(sample) for (slot, game), sample in zip(live.items(), samples, strict=True)}
            with self.clock("environment"):
                replies = self.stage.step(said)
            live = {slot: game for slot, game in live.items() if game.hear(replies[slot])}
        if self.watcher:
            self.watcher.turn(0)
        return [game.trajectory for game in games.values()]

    @contextmanager
    def under(self, rules: Env) -> Iterator[None]:
        """Play by other rules for a while."""
        usual, self.env = self.env, rules
        try:
            yield
        finally:
            self.env = usual

    def _alone(self, sampler: Independent, slot: int, episode: Episode) -> Trajectory:
        """Play one episode, whatever others are at."""
        game, session = _Game(episode, self.env, self.chat), sampler.session()
        with self.clock("environment"):
            reply = self.stage.reset({slot: episode.task})[slot]
        live = game.begin(reply)
        while live:
            if self.env.history == "window":
                session = sampler.session()
            with self.clock("generation"):
                sample = session.ask(slot, game.prompt, game.key, game.budget)
            if self.watcher:
                self.watcher.alone(slot, len(game.trajectory.responses) + 1)
            said = game.say(sample)
            with self.clock("environment"):
                reply = self.stage.step({slot: said})[slot]
            live = game.hear(reply)
        return game.trajectory

    def close(self) -> None:
        self.stage.close()


def _ask(session: Session, live: Mapping[int, "_Game"]) -> list[Sample]:
    return session.generate(
        list(live),
        [game.prompt for game in live.values()],
        [game.key for game in live.values()],
        [game.budget for game in live.values()],
    )


class _Game:
    """One episode in play: the trajectory so far, and the prompt of the next response."""

    def __init__(self, episode: Episode, rules: Env, chat: Chat):
        self.episode, self.rules, self.chat = episode, rules, chat
        self.trajectory = Trajectory(episode.task, episode.draw, episode.member)
        self.prompt: list[int] = []
        self.budget = 0
        self._used = 0  # tokens of the row so far (full history)
        self._pairs: list[tuple[str, str]] = []  # observation and parsed action of past turns (window)

    @property
    def key(self) -> tuple:
        """What seeds the next response."""
        return (*self.episode.key, len(self.trajectory.responses))

    def begin(self, reply: Reply) -> bool:
        """Start; False when there is nothing to generate."""
        self.goal = self.trajectory.goal = reply.goal
        return self._crashed(reply) if reply.turn is None else self._next(reply.turn)

    def say(self, sample: Sample) -> str:
        """Take a response into the trajectory; its text is for the environment."""
        text = self.chat.decode(sample.ids)
        entropy = sum(sample.entropies) / len(sample.entropies) if sample.entropies else None
        response = Response(self.prompt, sample, self._observation, text, entropy=entropy)
        self.trajectory.responses.append(response)
        self._used += len(self.prompt) + len(sample.ids)
        return text

    def hear(self, reply: Reply) -> bool:
        """Take the environment's answer; False when the episode is over."""
        turn, response = reply.turn, self.trajectory.responses[-1]
        if turn is None:
            return self._crashed(reply)
        self.goal = reply.goal
        response.reward, response.valid, response.metrics = turn.reward, turn.valid, turn.metrics
        if turn.done:
            return self._end(OVER if turn.terminated else STOPPED)
        if len(self.trajectory.responses) >= self.rules.max_turns:
            return self._end(TURNS)
        if self.rules.history == "window":
            self._pairs.append((self._observation, reply.action))
        return self._next(turn)

    def _next(self, turn: Turn) -> bool:
        """Render the prompt of the next response; False when it does not fit."""
        self._observation = turn.observation
        if self.rules.history == "window":
            self.prompt = next(
                (
                    ids
                    for ids in self._window_prompts(turn)
                    if len(ids) + self.rules.response_tokens <= self.rules.context_tokens
                ),
                [],
            )
            self.budget = self.rules.response_tokens
            return bool(self.prompt) or self._end(CONTEXT)
        message = _fill(self.rules.prompt, "next" if self.trajectory.responses else "first", self._words(turn))
        if self.trajectory.responses:
            self.prompt = self.chat.follow(message, self.trajectory.responses[-1].sample.ids[-1])
        else:
            self.prompt = self.chat.start(message)
        left = self.rules.context_tokens - self._used - len(self.prompt)
        self.budget = min(self.rules.response_tokens, left)
        return left > 0 or self._end(CONTEXT)

    def _window_prompts(self, turn: Turn) -> Iterator[list[int]]:
        """The prompt with as much history as allowed, then with less and less of it."""
        pairs = self._pairs[-self.rules.window :] if self.rules.window else []
        for dropped in range(len(pairs) + 1):
            shown = pairs[dropped:]
            first = len(self._pairs) - len(shown) + 1
            history = "\n".join(
                self.rules.prompt["pair"].format(n=first + i, observation=o, action=a) for i, (o, a) in enumerate(shown)
            )
            words = {**self._words(turn), "history": history, "length": len(shown)}
            yield self.chat.start(_fill(self.rules.prompt, "window" if self._pairs else "first", words))

    def _words(self, turn: Turn) -> dict[str, Any]:
        return {
            "task": self.goal,
            "observation": turn.observation,
            "actions": ", ".join(f"'{action}'" for action in turn.actions or ()),
            "step": len(self.trajectory.responses),
            "turn": len(self.trajectory.responses) + 1,
            "left": self.rules.max_turns - len(self.trajectory.responses),
        }

    def _crashed(self, reply: Reply) -> bool:
        """A crash of the environment ends this episode and no other."""
        self.trajectory.error = reply.error
        return self._end(CRASHED)

    def _end(self, how: str) -> bool:
        self.trajectory.ended = how
        return False


def _fill(templates: dict[str, str], name: str, words: dict[str, Any]) -> str:
    return templates[name].format(**words)


def rows(trajectories: Sequence[Trajectory], history: str) -> list[Row]:
    """The rows of a step, trajectory by trajectory and turn by turn."""
    out: list[Row] = []
    for index, trajectory in enumerate(trajectories):
        turns = [
            Row(r.prompt, r.sample.ids, [1] * len(r.sample.ids), r.sample.logps, r.sample.entropies, index, [turn])
            for turn, r in enumerate(trajectory.responses)
        ]
        out += [_joined(turns)] if history == "full" and turns else turns
    return out


def _joined(turns: list[Row]) -> Row:
    """One row of all turns: what stood between two responses becomes part of the completion, masked."""
    row = replace(turns[0], turns=[t.turns[0] for t in turns])
    for turn in turns[1:]:
        gap = [0] * len(turn.prompt)
        row.completion = row.completion + turn.prompt + turn.completion
        row.mask = row.mask + gap + turn.mask
        if turn.logps:
            row.logps = row.logps + [0.0 for _ in gap] + turn.logps
        if turn.entropies:
            row.entropies = row.entropies + [0.0 for _ in gap] + turn.entropies
    return row
