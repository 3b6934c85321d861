"""The interface of samplers: a sampler opens a session, and a session samples the responses of its conversations."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class SamplingParams:
    """Settings of token sampling. They are always explicit: a model's generation_config is never read."""

    temperature: float = 1.0
    """divides the logits"""
    top_p: float = 1.0
    """nucleus filter; 1: off"""
    top_k: int = 0
    """keep the k most likely tokens; 0: off"""
    min_p: float = 0.0
    """drop tokens below this share of the largest probability; 0: off"""


@dataclass
class Sample:
    """The T tokens of one response, with the sampler's measurements."""

    ids: list[int]
    """token ids, length T; the last one is an end token unless the budget was reached"""
    logps: list[float]
    """log-prob of each token under the unfiltered distribution, length T; empty if the sampler does not report it"""
    entropies: list[float]
    """entropy of the unfiltered distribution at each token in nats, length T; empty if the sampler does not report it"""


class Session(Protocol):
    """A set of conversations, one per slot."""

    def generate(
        self, slots: Sequence[int], prompts: Sequence[list[int]], keys: Sequence[tuple], budgets: Sequence[int]
    ) -> list[Sample]:
        """Append `prompts[i]` to conversation `slots[i]` and sample up to `budgets[i]` tokens, seeded by `keys[i]`.

        From one call to the next, slots may be dropped, but none may be added.
        """


class Sampler(Protocol):
    """Opens sessions."""

    def session(self) -> Session: ...


class IndependentSession(Session, Protocol):
    """A session whose conversations can be continued one at a time."""

    def generate_one(self, slot: int, prompt: list[int], key: tuple, budget: int) -> Sample:
        """Do the same as `generate` for one conversation. Several threads may call it at once, each for another slot."""


@runtime_checkable
class IndependentSampler(Protocol):
    """A sampler whose conversations advance independently: some generate while the environments of others work."""

    def session(self) -> IndependentSession: ...

    def cancel(self) -> None:
        """Make all waiting calls fail, and all later calls too."""


def keyed_generator(key: tuple) -> np.random.Generator:
    """A random number generator that is seeded by the key alone: equal on every machine, in any order, after any resume."""
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))
