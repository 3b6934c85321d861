"""Plays episodes with the scripted player of an environment, through the same code as the rollout of a policy.

A policy that imitates these episodes sees exactly the tokens of its later rollouts.
"""

import logging
from collections.abc import Sequence
from contextlib import closing
from random import Random
from typing import Any, Final, Protocol

from aem_exp.config import Env
from aem_exp.core.errors import RunError
from aem_exp.envs import TextEnv, World
from aem_exp.envs.executor import SerialExecutor
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.sampling.base import Sample
from aem_exp.rollout.types import Ending, Episode, Trajectory

log = logging.getLogger("aem_exp")
KEPT_TEXTS: Final = 256  # distinct responses that `play_scripted` returns


class ScriptedWorld(World, Protocol):
    """A world with a scripted player."""

    def expert(self, env: TextEnv, random: Random, noise: float = 0.0, shyness: float = 0.0) -> str:
        """The response of the scripted player in the current state of `env`.

        Args:
            noise: probability of a random action.
            shyness: probability that it avoids an action that it should take.
        """


class _ScriptedSampler:
    """The scripted player as a sampler: it reads the state of the environments and returns tokens."""

    def __init__(
        self, world: ScriptedWorld, executor: SerialExecutor, chat: Chat, random: Random, noise: float, shyness: float
    ) -> None:
        self.world, self.executor, self.chat, self.random = world, executor, chat, random
        self.noise, self.shyness = noise, shyness
        self.responses: dict[str, None] = {}  # the first distinct responses, in order

    def session(self) -> "_ScriptedSampler":
        return self

    def generate(self, slots: Sequence[int], *_: object) -> list[Sample]:
        envs = [self.executor.envs[slot] for slot in slots]
        responses = [self.world.expert(env, self.random, self.noise, self.shyness) for env in envs]
        if len(self.responses) < KEPT_TEXTS:
            self.responses |= dict.fromkeys(responses)
        encoded = self.chat.tokenizer(responses, add_special_tokens=False)["input_ids"]
        ended = [[*ids, self.chat.end_ids[0]] for ids in encoded]
        # The log-probs and entropies are placeholders; nothing reads them.
        return [Sample(ids, [0.0] * len(ids), [0.0] * len(ids)) for ids in ended]


def play_scripted(
    world: Any, env: Env, chat: Chat, episodes: Sequence[Episode], noise: float, shyness: float, random: Random
) -> tuple[list[Trajectory], list[str]]:
    """Play episodes with the scripted player.

    Args:
        world: a `ScriptedWorld`.
        random: draws the actions of the player.

    Returns:
        The trajectories that did not crash, and the first distinct responses as the player wrote them.

    Raises:
        RunError: no episode could be played.
    """
    executor = SerialExecutor(world, getattr(world, "rehearse", world.env))
    sampler = _ScriptedSampler(world, executor, chat, random, noise, shyness)
    with closing(executor):
        at_once = getattr(world, "episodes_at_once", 0)
        played = Rollout(executor, env, chat, at_once).play(episodes, sampler)
    usable = [t for t in played if t.responses and t.ended != Ending.CRASHED]
    _report_crashes(played, usable)
    return usable, list(sampler.responses)


def _report_crashes(played: Sequence[Trajectory], usable: Sequence[Trajectory]) -> None:
    """Warn about demonstrations that crashed, with the first error.

    Raises:
        RunError: no demonstration is usable.
    """
    crashed = next((t for t in played if t.ended == Ending.CRASHED), None)
    if not usable:
        first = crashed or played[0]
        remedy = "its first prompt does not fit into env.context_tokens"
        reason = f"no episode of the scripted player could be played; task {first.task.id}: {first.error or remedy}"
        raise RunError(reason, "env")
    if crashed:
        warning = "%d of %d episodes of the scripted player crashed and are not imitated; task %s: %s"
        log.warning(warning, len(played) - len(usable), len(played), crashed.task.id, crashed.error)
