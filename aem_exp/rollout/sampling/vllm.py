"""Sampling with vLLM servers in other processes, over the completions endpoint: token ids go in, token ids and log-probs
come out.

Every answer is checked; an answer that is not exact ends the run.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Final

from aem_exp.core.errors import RunError
from aem_exp.rollout.sampling.base import Sample, SamplingParams
from aem_exp.rollout.sampling.vllm_client import Servers

COMPLETIONS_PATH = "/v1/completions"
MIN_LOGPROB, MAX_LOGPROB = (
    -1e4,
    1e-3,
)  # log-probs: vLLM writes -9999 for a probability of 0, and a sum of exponentials is rounded
# Bytes of an answer: for anything, for each token that may be generated (as an id, as text twice, with log-prob and offset), and
# for each of the prompt, whose ids may be repeated.
BASE_BYTES, BYTES_PER_TOKEN, BYTES_PER_PROMPT_TOKEN = 1 << 20, 1 << 10, 16
SHOWN_CHARACTERS: Final = 40  # characters of a value that is shown


class ServerSampler:
    """Samples from servers.

    Args:
        end_ids: tokens that end a response.
        vocabulary: tokens that the policy has; an id from there on is none.
        rank: of this process; where all begin with the same server, one would have all the work.
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
    """Conversations by their exact tokens; a server is handed all of them each turn, and keeps their prefixes."""

    def __init__(self, sampler: ServerSampler):
        self._sampler = sampler
        self._ids: dict[int, list[int]] = {}

    def ask(self, slot: int, prompt: list[int], key: tuple, budget: int) -> Sample:
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
        firsts = [sampler.rank + slot for slot in slots]
        answers = sampler.servers.ask(
            COMPLETIONS_PATH, requests, firsts, [_max_answer_bytes(request) for request in requests]
        )
        samples = [
            _parse_sample(request, answer, sampler.vocabulary)
            for request, answer in zip(requests, answers, strict=True)
        ]
        for slot, sample in zip(slots, samples, strict=True):
            self._ids[slot] += sample.ids
        return samples

    def _build_request(self, ids: list[int], key: tuple, budget: int) -> dict[str, Any]:
        """A request of vLLM's protocol. It names no model: each of these servers has one."""
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
            "ignore_eos": True,  # the end tokens are those above, and not also those of a generation_config
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
        }


def seed_from_key(key: tuple) -> int:
    """63 bits that follow from a response's key."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


def _max_answer_bytes(request: dict[str, Any]) -> int:
    """Bytes that an answer may have."""
    return BASE_BYTES + BYTES_PER_TOKEN * int(request["max_tokens"]) + BYTES_PER_PROMPT_TOKEN * len(request["prompt"])


def _parse_sample(request: dict[str, Any], answer: dict[str, Any], vocabulary: int) -> Sample:
    """The tokens of an answer.

    Raises:
        RunError: they are missing, or not what was asked for.
    """
    try:
        choice = answer["choices"][0]
        ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        assert isinstance(ids, list) and isinstance(logps, list)
    except (KeyError, IndexError, TypeError, AssertionError):
        raise _invalid_answer("has no token ids or no log-probs: it must know return_token_ids, as vLLM does") from None
    if choice.get("finish_reason") not in ("stop", "length"):  # aborted, say: half a response is none
        raise _invalid_answer(
            f"ended by {_shorten(choice.get('finish_reason'))}, and not by an end token or the budget"
        )
    if answer.get("prompt_token_ids", choice.get("prompt_token_ids")) not in (None, request["prompt"]):
        raise _invalid_answer("is to another prompt than was sent: the server changed its tokens")
    if not 0 < len(ids) <= request["max_tokens"]:
        raise _invalid_answer(f"has {len(ids)} tokens, and 1 to {request['max_tokens']} were asked for")
    if len(logps) != len(ids):
        raise _invalid_answer(f"has {len(ids)} tokens and {len(logps)} log-probs")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise _invalid_answer(
                f"has the token id {_shorten(token)}: it must be a whole number from 0 to {vocabulary - 1}"
            )
    for logp in logps:
        if type(logp) not in (int, float) or not MIN_LOGPROB <= logp <= MAX_LOGPROB:  # nor is NaN in between
            raise _invalid_answer(f"has the log-prob {_shorten(logp)}: it must be a number from {MIN_LOGPROB:g} to 0")
    if set(ids[:-1]) & set(request["stop_token_ids"]):
        raise _invalid_answer("goes on after an end token: the server does not know stop_token_ids")
    return Sample(ids, [float(p) for p in logps], [])


def _shorten(value: Any) -> str:
    """A value of a server's, in a few printable characters."""
    return ascii(value)[:SHOWN_CHARACTERS]


def _invalid_answer(why: str) -> RunError:
    return RunError(f"an answer of a server {why}", "config")
