"""Episodes: a policy and environments go in, trajectories of exact tokens come out.

Both histories are played by the same loop. With `full` history a conversation grows: a later turn is a suffix to the exact
tokens so far, and the trajectory is one row. With `window` every turn asks afresh, showing the last few turns, and is a row
of its own. Only live episodes are generated.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from aem_exp.config import Env
from aem_exp.envs import Task, TextEnv, Turn, World
from aem_exp.render import Chat
from aem_exp.sample import Sample, Sampler, Session

CRASHED, CONTEXT, TURNS, OVER = "crashed", "context", "turns", "over"


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
    previous response with full history. `entropy` is the mean over its tokens, in nats; `advantage` (before modulation)
    and `alpha` are known once the step's credit is assigned.
    """

    prompt: list[int]
    sample: Sample
    observation: str
    text: str
    reward: float = 0.0
    valid: bool = True
    metrics: dict[str, float] = field(default_factory=dict)
    entropy: float = 0.0
    advantage: float | None = None
    alpha: float | None = None


@dataclass
class Trajectory:
    """An episode as it was played. `ended`: over (by the world), turns, context, or crashed (with `error`)."""

    task: Task
    draw: int
    member: int
    responses: list[Response] = field(default_factory=list)
    ended: str = ""
    error: str = ""

    @property
    def ret(self) -> float:
        """The episode's return: the sum of its rewards."""
        return sum(r.reward for r in self.responses)

    @property
    def won(self) -> float:
        return self.responses[-1].metrics.get("won", 0.0) if self.responses else 0.0

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
    """Seconds spent, by name: `with clock("generation"): ...`. `read` hands them out and starts afresh."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, {}
        return seconds


class Rollout:
    """Plays episodes of one world with one sampler. Environments are built once and reused."""

    def __init__(self, world: World, env: Env, chat: Chat):
        self.world, self.env, self.chat = world, env, chat
        self.clock = Clock()
        self._envs: list[TextEnv] = []

    def play(self, episodes: Sequence[Episode], sampler: Sampler) -> list[Trajectory]:
        """Play all episodes to their end, together."""
        self._envs += [self.world.env() for _ in range(len(episodes) - len(self._envs))]
        games = [_Game(episode, env, self.env, self.chat) for episode, env in zip(episodes, self._envs, strict=False)]
        session = sampler.session()
        with self.clock("environment"):
            live = [(slot, game) for slot, game in enumerate(games) if game.reset()]
        while live:
            with self.clock("generation"):
                if self.env.history == "window":
                    session = sampler.session()
                samples = _ask(session, live)
            with self.clock("environment"):
                live = [pair for pair, sample in zip(live, samples, strict=True) if pair[1].step(sample)]
        return [game.trajectory for game in games]

    def close(self) -> None:
        for env in self._envs:
            env.close()


def _ask(session: Session, live: Sequence[tuple[int, "_Game"]]) -> list[Sample]:
    return session.generate(
        [slot for slot, _ in live],
        [game.prompt for _, game in live],
        [(*game.episode.key, len(game.trajectory.responses)) for _, game in live],
        [game.budget for _, game in live],
    )


class _Game:
    """One episode in play: the environment, the trajectory so far, and the prompt of the next response."""

    def __init__(self, episode: Episode, env: TextEnv, rules: Env, chat: Chat):
        self.episode, self.env, self.rules, self.chat = episode, env, rules, chat
        self.trajectory = Trajectory(episode.task, episode.draw, episode.member)
        self.prompt: list[int] = []
        self.budget = 0
        self._used = 0  # tokens of the row so far (full history)
        self._pairs: list[tuple[str, str]] = []  # observation and parsed action of past turns (window)

    def reset(self) -> bool:
        """Start; False when there is nothing to generate."""
        turn = self._guard(lambda: self.env.reset(self.episode.task))
        return turn is not None and self._next(turn)

    def step(self, sample: Sample) -> bool:
        """Let the environment answer; False when the episode is over."""
        text = self.chat.decode(sample.ids)
        entropy = sum(sample.entropies) / len(sample.entropies) if sample.entropies else 0.0
        response = Response(self.prompt, sample, self._observation, text, entropy=entropy)
        self.trajectory.responses.append(response)
        self._used += len(self.prompt) + len(sample.ids)
        turn = self._guard(lambda: self.env.step(text))
        if turn is None:
            return False
        response.reward, response.valid, response.metrics = turn.reward, turn.valid, turn.metrics
        if turn.done:
            return self._end(OVER)
        if len(self.trajectory.responses) >= self.rules.max_turns:
            return self._end(TURNS)
        if self.rules.history == "window":
            self._pairs.append((self._observation, self.env.parse(text)))
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
            "task": self.env.goal,
            "observation": turn.observation,
            "actions": ", ".join(f"'{action}'" for action in turn.actions or ()),
            "step": len(self.trajectory.responses),
        }

    def _guard(self, call: Any) -> Turn | None:
        """A crash of the environment ends this episode and no other."""
        try:
            return call()
        except Exception as error:
            self.trajectory.error = f"{type(error).__name__}: {error}"
            self._end(CRASHED)
            return None

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
        row.logps = row.logps + [0.0 for _ in gap] + turn.logps
        row.entropies = row.entropies + [0.0 for _ in gap] + turn.entropies
    return row
