"""Samples with TRL's own generation code: Hugging Face `generate`, or vLLM in this process.

The trainer measures token entropies and old log-probs in its own scoring pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch

from aem_exp.rollout.sampling.base import Sample, SamplingParams

# The attributes of TRL's VLLMGeneration that are set for each turn.
VLLM_FIELDS = ("temperature", "top_p", "top_k", "min_p", "max_completion_length", "generation_kwargs")


class EngineSampler:
    """Samples with the engine of a TRL trainer."""

    def __init__(self, trainer: Any, end_ids: Sequence[int], sampling: SamplingParams):
        self.trainer, self.end_ids, self.sampling = trainer, list(end_ids), sampling

    def session(self) -> "EngineSession":
        return EngineSession(self)


class EngineSession:
    """Conversations as exact token ids. Each turn sends the whole conversation to the engine (vLLM caches prefixes)."""

    def __init__(self, sampler: EngineSampler):
        self._sampler = sampler
        self._ids: dict[int, list[int]] = {}

    def generate(
        self, slots: Sequence[int], prompts: Sequence[list[int]], keys: Sequence[tuple], budgets: Sequence[int]
    ) -> list[Sample]:
        for slot, prompt in zip(slots, prompts, strict=True):
            self._ids[slot] = [*self._ids.get(slot, []), *prompt]
        trainer, rng = self._sampler.trainer, torch.get_rng_state()
        with _configure_engine(trainer, self._sampler, max(budgets)):
            torch.manual_seed(int.from_bytes(blake2b(repr(list(keys)).encode(), digest_size=8).digest()) >> 1)
            ids, logps = trainer._generate_single_turn([self._ids[slot] for slot in slots], None, {}, 1)
        torch.set_rng_state(rng)
        logps = logps or [[] for _ in slots]
        samples = [Sample(list(i[:n]), list(p[:n]), []) for i, p, n in zip(ids, logps, budgets, strict=True)]
        for slot, sample in zip(slots, samples, strict=True):
            self._ids[slot] += sample.ids
        return samples


@contextmanager
def _configure_engine(trainer: Any, sampler: EngineSampler, budget: int) -> Iterator[None]:
    """Set the sampling parameters of the engine for one turn; its own are fixed when it is built."""
    sampling, end_ids = sampler.sampling, sampler.end_ids
    params = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
    }
    if trainer.use_vllm:
        kwargs = {**(trainer.vllm_generation.generation_kwargs or {}), "stop_token_ids": end_ids}
        settings = {**params, "max_completion_length": budget, "generation_kwargs": kwargs}
        with override_attributes(trainer.vllm_generation, settings):
            yield
        return
    settings = {**params, "min_p": sampling.min_p or None, "max_new_tokens": budget, "eos_token_id": end_ids}
    kwargs = {**trainer.generation_kwargs, **settings}
    with (
        override_attributes(trainer.generation_config, settings),
        override_attributes(trainer, {"eos_token_ids": end_ids, "generation_kwargs": kwargs}),
    ):
        yield


@contextmanager
def override_attributes(target: Any, values: dict[str, Any]) -> Iterator[None]:
    """Set attributes within the context."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
