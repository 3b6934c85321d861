"""Plays episodes: samples responses, steps the environments, and builds trajectories of exact tokens.

The same loop serves both histories: `full` (one row per trajectory) and `window` (one row per turn). Episodes advance in
lockstep, or each in its own thread if the sampler allows it. Responses are generated for live episodes only.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

from aem_exp.config import Env
from aem_exp.envs import Turn
from aem_exp.envs.executor import EnvExecutor, Reply
from aem_exp.rollout import threads
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.clock import Clock
from aem_exp.rollout.sampling.base import IndependentSampler, Sample, Sampler, Session
from aem_exp.rollout.types import Ending, Episode, Response, Trajectory

MAX_THREADS: Final = 256  # limit of episodes that run independently at the same time: each needs a thread


@runtime_checkable
class Watcher(Protocol):
    """Receives the progress of a rollout."""

    def turn(self, live: int) -> None:
        """`live` episodes have generated one more turn in lockstep; 0: all episodes of the batch have ended."""

    def token(self, count: int) -> None:
        """The current turn has `count` tokens so far; called only when the policy is sampled in this process."""

    def slot_turn(self, slot: int, turn: int) -> None:
        """The episode in `slot` runs independently and has generated turn `turn` (from 1). Turn 1 means that the previous
        episode of this slot has ended."""


class Rollout:
    """Plays episodes.

    Args:
        executor: steps the environments.
        env: the rules: history, prompts, and limits of turns and tokens.
        chat: renders prompts as tokens.
        at_once: maximum number of live episodes, which bounds memory; 0: no limit.
        watcher: receives the progress.
    """

    def __init__(self, executor: EnvExecutor, env: Env, chat: Chat, at_once: int = 0, watcher: Watcher | None = None):
        self.executor, self.env, self.chat, self.at_once, self.watcher = executor, env, chat, at_once, watcher
        self.clock = Clock(first="generation")  # so "environment" counts only the time without generation

    def play(self, episodes: Sequence[Episode], sampler: Sampler) -> list[Trajectory]:
        """Play all episodes to their end, at most `at_once` at a time; return their trajectories in order.

        The trajectory of an episode depends neither on the other episodes nor on the number of live episodes.
        """
        if isinstance(sampler, IndependentSampler):
            return list(self.stream(episodes, sampler))
        size = self.at_once or len(episodes)
        starts = range(0, len(episodes), size) if size else ()
        return [t for start in starts for t in self._play_batch(episodes[start : start + size], sampler)]

    def stream(self, episodes: Sequence[Episode], sampler: IndependentSampler) -> Generator[Trajectory, None, None]:
        """Play episodes independently and yield their trajectories one by one, in order. Later episodes are played meanwhile."""
        max_threads = min(self.at_once or len(episodes), MAX_THREADS)
        return threads.map_ordered(episodes, max_threads, partial(self._play_one, sampler), sampler.cancel)

    def _play_batch(self, episodes: Sequence[Episode], sampler: Sampler) -> list[Trajectory]:
        """Play all these episodes in lockstep."""
        started = {slot: _LiveEpisode(episode, self.env, self.chat) for slot, episode in enumerate(episodes)}
        session = sampler.session()
        with self.clock("environment"):
            replies = self.executor.reset({slot: episode.task for slot, episode in enumerate(episodes)})
        live = {slot: current for slot, current in started.items() if current.start(replies[slot])}
        while live:
            with self.clock("generation"):
                if self.env.history == "window":
                    session = sampler.session()
                samples = _generate(session, live)
            if self.watcher:
                self.watcher.turn(len(live))
            texts = {
                slot: current.add_response(sample)
                for (slot, current), sample in zip(live.items(), samples, strict=True)
            }
            with self.clock("environment"):
                replies = self.executor.step(texts)
            live = {slot: current for slot, current in live.items() if current.add_reply(replies[slot])}
        if self.watcher:
            self.watcher.turn(0)
        return [current.trajectory for current in started.values()]

    @contextmanager
    def override_rules(self, rules: Env) -> Iterator[None]:
        """Use other rules within the context."""
        before, self.env = self.env, rules
        try:
            yield
        finally:
            self.env = before

    def _play_one(self, sampler: IndependentSampler, slot: int, episode: Episode) -> Trajectory:
        """Play one episode independently of the others."""
        current, session = _LiveEpisode(episode, self.env, self.chat), sampler.session()
        with self.clock("environment"):
            reply = self.executor.reset({slot: episode.task})[slot]
        live = current.start(reply)
        while live:
            if self.env.history == "window":
                session = sampler.session()
            with self.clock("generation"):
                sample = session.generate_one(slot, current.prompt, current.key, current.budget)
            if self.watcher:
                self.watcher.slot_turn(slot, len(current.trajectory.responses) + 1)
            text = current.add_response(sample)
            with self.clock("environment"):
                reply = self.executor.step({slot: text})[slot]
            live = current.add_reply(reply)
        return current.trajectory

    def close(self) -> None:
        """Stop the environments."""
        self.executor.close()


def _generate(session: Session, live: Mapping[int, "_LiveEpisode"]) -> list[Sample]:
    return session.generate(
        list(live),
        [current.prompt for current in live.values()],
        [current.key for current in live.values()],
        [current.budget for current in live.values()],
    )


class _LiveEpisode:
    """The state of one episode: its trajectory so far, and the prompt and token budget of its next response."""

    def __init__(self, episode: Episode, rules: Env, chat: Chat):
        self.episode, self.rules, self.chat = episode, rules, chat
        self.trajectory = Trajectory(episode.task, episode.draw, episode.member)
        self.prompt: list[int] = []
        self.budget = 0
        self._used = 0  # number of tokens in the row so far (full history)
        self._pairs: list[tuple[str, str]] = []  # observation and parsed action of each past turn (window)

    @property
    def key(self) -> tuple:
        """Seeds the sampling of the next response."""
        return (*self.episode.key, len(self.trajectory.responses))

    def start(self, reply: Reply) -> bool:
        """Start the episode from the reply to its reset; False if no response can be generated."""
        self.goal = self.trajectory.goal = reply.goal
        return self._end_crashed(reply) if reply.turn is None else self._render_prompt(reply.turn)

    def add_response(self, sample: Sample) -> str:
        """Add a response to the trajectory; return its text for the environment."""
        text = self.chat.decode(sample.ids)
        entropy = sum(sample.entropies) / len(sample.entropies) if sample.entropies else None
        response = Response(self.prompt, sample, self._observation, text, entropy=entropy)
        self.trajectory.responses.append(response)
        self._used += len(self.prompt) + len(sample.ids)
        return text

    def add_reply(self, reply: Reply) -> bool:
        """Add the environment's reply; False if the episode has ended."""
        turn, response = reply.turn, self.trajectory.responses[-1]
        if turn is None:
            return self._end_crashed(reply)
        self.goal = reply.goal
        response.reward, response.valid, response.metrics = turn.reward, turn.valid, turn.metrics
        if turn.done:
            return self._end(Ending.OVER if turn.terminated else Ending.STOPPED)
        if len(self.trajectory.responses) >= self.rules.max_turns:
            return self._end(Ending.TURNS)
        if self.rules.history == "window":
            self._pairs.append((self._observation, reply.action))
        return self._render_prompt(turn)

    def _render_prompt(self, turn: Turn) -> bool:
        """Render the prompt of the next response; False if it does not fit into the context."""
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
            return bool(self.prompt) or self._end(Ending.CONTEXT)
        message = _fill_template(
            self.rules.prompt, "next" if self.trajectory.responses else "first", self._prompt_fields(turn)
        )
        if self.trajectory.responses:
            self.prompt = self.chat.next_prompt(message, self.trajectory.responses[-1].sample.ids[-1])
        else:
            self.prompt = self.chat.first_prompt(message)
        left = self.rules.context_tokens - self._used - len(self.prompt)
        self.budget = min(self.rules.response_tokens, left)
        return left > 0 or self._end(Ending.CONTEXT)

    def _window_prompts(self, turn: Turn) -> Iterator[list[int]]:
        """Yield the prompt with the whole window of past turns, then with one turn less each time."""
        pairs = self._pairs[-self.rules.window :] if self.rules.window else []
        for dropped in range(len(pairs) + 1):
            kept = pairs[dropped:]
            first = len(self._pairs) - len(kept) + 1
            history = "\n".join(
                self.rules.prompt["pair"].format(n=first + i, observation=o, action=a) for i, (o, a) in enumerate(kept)
            )
            fields = {**self._prompt_fields(turn), "history": history, "length": len(kept)}
            yield self.chat.first_prompt(
                _fill_template(self.rules.prompt, "window" if self._pairs else "first", fields)
            )

    def _prompt_fields(self, turn: Turn) -> dict[str, Any]:
        return {
            "task": self.goal,
            "observation": turn.observation,
            "actions": ", ".join(f"'{action}'" for action in turn.actions or ()),
            "step": len(self.trajectory.responses),
            "turn": len(self.trajectory.responses) + 1,
            "left": self.rules.max_turns - len(self.trajectory.responses),
        }

    def _end_crashed(self, reply: Reply) -> bool:
        """End this episode because its environment crashed."""
        self.trajectory.error = reply.error
        return self._end(Ending.CRASHED)

    def _end(self, ending: Ending) -> bool:
        self.trajectory.ended = ending
        return False


def _fill_template(templates: dict[str, str], name: str, fields: dict[str, Any]) -> str:
    return templates[name].format(**fields)
