"""Compares an engine with the trainer on fixed prompts: do both have the same weights?

An engine that keeps old weights after an update answers as well as before. Only its log-probs show the error.

Shapes: P prompts, S tokens of the longest prompt, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from aem_exp.core.errors import RunError
from aem_exp.rollout.sampling.base import keyed_generator
from aem_exp.rollout.sampling.local import eval_mode, left_pad

# Prompts of random tokens. The long ones fill blocks of an engine's prefix cache, so a cache that was not cleared also shows.
PROMPT_TOKENS: Final = (24, 24, 24, 24, 160, 160)
TOP_TOKENS: Final = 20  # likely next tokens whose log-probs are compared; vLLM reports at most 20 by default
EXACT_GAP: Final = 1e-3  # nats: limit of the mean gap if trainer and engine compute in float32
FIRST_GAP: Final = 0.1  # nats: limit of the first mean gap in other data types

NextTokens = Sequence[Mapping[int, float]]  # for each prompt: token id -> log-prob in nats, of likely next tokens


@dataclass(frozen=True)
class Gap:
    """Absolute differences between log-probs of an engine and of the trainer, in nats."""

    mean: float
    maximum: float


class Agreement:
    """The trainer's log-probs of fixed prompts, and each engine's gap to them.

    Args:
        vocabulary: number of token ids.
        context_tokens: maximum number of tokens of a prompt with one response token.

    Attributes:
        prompts: token ids of the P prompts.
        limit: mean gap in nats above which `compare` raises.
        gaps: engine -> its gap to the newest weights.
    """

    def __init__(self, vocabulary: int, context_tokens: int):
        self.prompts = draw_prompts(vocabulary, context_tokens)
        self.limit = math.inf
        self.gaps: dict[str, Gap] = {}
        self._expected_PV = torch.zeros(len(self.prompts), vocabulary)

    def expect(self, logps_PV: Tensor) -> None:
        """Set the trainer's log-probs for the newest weights. Forgets all gaps to older weights."""
        self._expected_PV, self.gaps = logps_PV, {}

    def compare(self, engine: str, reported: NextTokens) -> None:
        """Record the gap of an engine.

        Raises:
            WeightsDiffer: the mean gap is above `limit`.
        """
        self.gaps[engine] = gap = measure_gap(self._expected_PV, reported)
        if not gap.mean <= self.limit:  # also refuses NaN
            raise WeightsDiffer(engine, gap, self.limit)


class WeightsDiffer(RunError):
    """An engine has other weights than the trainer, or computes in another data type."""

    def __init__(self, engine: str, gap: Gap, limit: float, cause: str = ""):
        cause = cause or "it has other weights, or it computes in another data type"
        problem = f"{engine} disagrees with the trainer by {gap.mean:.2g} nats on average (limit: {limit:.2g})"
        super().__init__(f"{problem}: {cause}", "config")


def draw_prompts(vocabulary: int, context_tokens: int) -> list[list[int]]:
    """Draw the fixed prompts; they depend on the two arguments only.

    They contain the upper half of the token ids, the rarer tokens. A change to the lower half of a tied embedding then changes
    only the head.
    """
    rng = keyed_generator(("agreement", vocabulary))
    lengths = [min(length, context_tokens - 1) for length in PROMPT_TOKENS]
    return [rng.integers(vocabulary // 2, vocabulary, size=length).tolist() for length in lengths]


@torch.no_grad()
def next_token_logps(model: Any, prompts: Sequence[list[int]], device: torch.device) -> Tensor:
    """Compute the log-probs (P, V) of the next token in float32 on the CPU, at temperature 1.

    If the weights are sharded, all processes must call this.
    """
    ids_PS, mask_PS = (tensor.to(device) for tensor in left_pad(prompts))
    positions_PS = (mask_PS.cumsum(1) - 1).clamp(min=0)
    with eval_mode(model):
        logits_P1V = model(
            input_ids=ids_PS, attention_mask=mask_PS, position_ids=positions_PS, use_cache=False, logits_to_keep=1
        ).logits
    return torch.log_softmax(logits_P1V[:, -1].float(), dim=-1).cpu()


def measure_gap(expected_PV: Tensor, reported: NextTokens) -> Gap:
    """Compare reported log-probs with those of the trainer (P, V).

    Raises:
        RunError: a prompt has no log-prob, or the engine has a larger vocabulary.
    """
    assert expected_PV.ndim == 2 and len(expected_PV) == len(reported), (expected_PV.shape, len(reported))
    if not all(reported) or max(max(tokens) for tokens in reported) >= expected_PV.shape[1]:
        raise RunError("the engine reports no log-probs, or token ids outside of the policy's vocabulary", "config")
    gaps = [
        abs(expected_PV[i, token].item() - logp) for i, tokens in enumerate(reported) for token, logp in tokens.items()
    ]
    return Gap(sum(gaps) / len(gaps), max(gaps))


def worst_gap(gaps: Iterable[Gap]) -> Gap | None:
    """The gap with the largest mean, None without gaps. NaN counts as the largest."""
    return max(gaps, key=lambda gap: math.inf if math.isnan(gap.mean) else gap.mean, default=None)
