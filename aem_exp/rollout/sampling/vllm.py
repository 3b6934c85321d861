"""Samples from vLLM servers through their completions endpoint, with token ids in both directions and log-probs.

Each answer is checked; an invalid answer ends the run.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Final

from aem_exp.core.errors import RunError
from aem_exp.rollout.sampling.base import Sample, SamplingParams
from aem_exp.rollout.sampling.vllm_client import Servers

# vLLM reports -9999 for a probability of 0; log-probs may be slightly positive because of rounding.
MIN_LOGPROB, MAX_LOGPROB = -1e4, 1e-3
# Size limit of an answer: a base, plus bytes per token that may be generated (id, text twice, log-prob and offset), plus bytes
# per prompt token (the server may repeat the prompt's ids).
BASE_BYTES, BYTES_PER_TOKEN, BYTES_PER_PROMPT_TOKEN = 1 << 20, 1 << 10, 16
SHOWN_CHARACTERS: Final = 40  # characters of a server's value in an error message


class ServerSampler:
    """Samples from vLLM servers. It reports log-probs but no entropies.

    Args:
        end_ids: ids of the tokens that end a response.
        vocabulary: vocabulary size of the policy; valid token ids are 0 to `vocabulary` - 1.
        rank: rank of this process; it spreads the first requests of all ranks over the servers.
    """

    def __init__(
        self, servers: Servers, end_ids: Sequence[int], sampling: SamplingParams, *, vocabulary: int, rank: int = 0
    ):
        self.servers, self.end_ids, self.sampling, self.rank = servers, list(end_ids), sampling, rank
        self.vocabulary = vocabulary

    def session(self) -> "ServerSession":
        return ServerSession(self)

    def cancel(self) -> None:
        self.servers.cancel()


class ServerSession:
    """Conversations as exact token ids. Each turn sends the whole conversation; the server caches its prefix."""

    def __init__(self, sampler: ServerSampler):
        self._sampler = sampler
        self._ids: dict[int, list[int]] = {}

    def generate_one(self, slot: int, prompt: list[int], key: tuple, budget: int) -> Sample:
        return self.generate([slot], [prompt], [key], [budget])[0]

    def generate(
        self, slots: Sequence[int], prompts: Sequence[list[int]], keys: Sequence[tuple], budgets: Sequence[int]
    ) -> list[Sample]:
        sampler = self._sampler
        for slot, prompt in zip(slots, prompts, strict=True):
            self._ids[slot] = [*self._ids.get(slot, []), *prompt]
        requests = [
            self._build_request(self._ids[slot], key, budget)
            for slot, key, budget in zip(slots, keys, budgets, strict=True)
        ]
        preferred = [sampler.rank + slot for slot in slots]
        limits = [_max_answer_bytes(request) for request in requests]
        answers = sampler.servers.complete(requests, preferred, limits)
        samples = [
            _parse_sample(request, answer, sampler.vocabulary)
            for request, answer in zip(requests, answers, strict=True)
        ]
        for slot, sample in zip(slots, samples, strict=True):
            self._ids[slot] += sample.ids
        return samples

    def _build_request(self, ids: list[int], key: tuple, budget: int) -> dict[str, Any]:
        """Build a vLLM completions request. It names no model, because each server has only one."""
        sampling = self._sampler.sampling
        return {
            "prompt": list(ids),
            "max_tokens": budget,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed_from_key(key),
            "stop_token_ids": self._sampler.end_ids,
            "ignore_eos": True,  # only stop_token_ids end a response, not the EOS of a generation_config
            "logprobs": 0,  # log-probs of the sampled tokens only
            "return_token_ids": True,
        }


def seed_from_key(key: tuple) -> int:
    """A 63-bit seed, derived from the key of a response."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


def _max_answer_bytes(request: dict[str, Any]) -> int:
    """Size limit of the answer to a request."""
    return BASE_BYTES + BYTES_PER_TOKEN * int(request["max_tokens"]) + BYTES_PER_PROMPT_TOKEN * len(request["prompt"])


def _parse_sample(request: dict[str, Any], answer: dict[str, Any], vocabulary: int) -> Sample:
    """Read the tokens and log-probs of an answer.

    Raises:
        RunError: they are missing, or they do not match the request.
    """
    try:
        choice = answer["choices"][0]
        ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        assert isinstance(ids, list) and isinstance(logps, list)
    except (KeyError, IndexError, TypeError, AssertionError):
        raise _invalid_answer("it has no token ids or no log-probs (return_token_ids needs a vLLM server)") from None
    if choice.get("finish_reason") not in ("stop", "length"):  # for example "abort": the response is incomplete
        raise _invalid_answer(f"its finish_reason is {_shorten(choice.get('finish_reason'))}, not 'stop' or 'length'")
    if answer.get("prompt_token_ids", choice.get("prompt_token_ids")) not in (None, request["prompt"]):
        raise _invalid_answer("its prompt_token_ids differ from the prompt in the request")
    if not 0 < len(ids) <= request["max_tokens"]:
        raise _invalid_answer(f"it has {len(ids)} tokens, not 1 to {request['max_tokens']}")
    if len(logps) != len(ids):
        raise _invalid_answer(f"it has {len(ids)} tokens but {len(logps)} log-probs")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise _invalid_answer(f"token id {_shorten(token)} is not a whole number from 0 to {vocabulary - 1}")
    for logp in logps:
        if type(logp) not in (int, float) or not MIN_LOGPROB <= logp <= MAX_LOGPROB:  # also refuses NaN
            raise _invalid_answer(f"log-prob {_shorten(logp)} is not a number from {MIN_LOGPROB:g} to 0")
    if set(ids[:-1]) & set(request["stop_token_ids"]):
        raise _invalid_answer("it has tokens after an end token; the server ignores stop_token_ids")
    return Sample(ids, [float(p) for p in logps], [])


def _shorten(value: Any) -> str:
    """A value from a server as a few printable characters."""
    return ascii(value)[:SHOWN_CHARACTERS]


def _invalid_answer(reason: str) -> RunError:
    return RunError(f"invalid answer from a server: {reason}", "config")
