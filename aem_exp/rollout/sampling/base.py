"""The interface of samplers: a sampler opens sessions, and a session samples responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Always explicit: a model's generation_config is never read."""

    temperature: float = 1.0
    top_p: float = 1.0
    """1: no such filter."""
    top_k: int = 0
    """0: no such filter."""
    min_p: float = 0.0
    """0: no such filter."""


@dataclass
class Sample:
    """One response: its tokens, and what the sampler knows of each."""

    ids: list[int]
    logps: list[float]
    """The log-prob of each token under the unfiltered distribution; empty where the sampler does not give it."""
    entropies: list[float]
    """The entropy of the unfiltered distribution at each token, in nats; empty where the sampler does not give it."""


class Session(Protocol):
    def generate(
        self, slots: Sequence[int], prompts: Sequence[list[int]], keys: Sequence[tuple], budgets: Sequence[int]
    ) -> list[Sample]:
        """Append `prompts[i]` to conversation `slots[i]` and sample up to `budgets[i]` tokens. Between calls, slots
        may disappear, and none is added."""


class Sampler(Protocol):
    def session(self) -> Session: ...


class IndependentSession(Session, Protocol):
    def ask(self, slot: int, prompt: list[int], key: tuple, budget: int) -> Sample:
        """What `generate` does, for one conversation. Several threads may call it at a time, each for its own."""


@runtime_checkable
class IndependentSampler(Protocol):
    """A sampler whose conversations need not wait for each other: while the environment of one is at work, others generate."""

    def session(self) -> IndependentSession: ...

    def cancel(self) -> None:
        """Make all calls that wait for an answer fail, now and from now on."""


def keyed_generator(key: tuple) -> np.random.Generator:
    """Random numbers that depend on the key alone: the same on any machine, in any order, after any resume."""
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))
