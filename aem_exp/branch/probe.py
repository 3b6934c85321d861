"""Evaluates a policy before and after an update on the same responses at the same states.

Shapes: K responses of one state, T tokens (the longest response), P tokens of the prompt, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import psutil
import torch
from torch import Tensor

from aem_exp.branch.measures import StateChange, compare_policies
from aem_exp.core.errors import ConfigError
from aem_exp.rollout.sampling.local import eval_mode

MEMORY_SHARE: Final = 0.5  # of the available memory that the log-probs before the update may take


@dataclass(frozen=True)
class StateResponses:
    """The responses at one state, sampled by the policy before the update."""

    prompt: list[int]
    """ids of all tokens in front of the responses"""
    responses: list[list[int]]
    """token ids of the K responses"""

    @property
    def tokens(self) -> int:
        """Number of positions, with padding."""
        return len(self.responses) * max(map(len, self.responses))


class Probe:
    """Compares the policy with what it was when the probe was made.

    Args:
        temperature: divides the logits.

    Raises:
        ConfigError: the log-probs over the full vocabulary do not fit into memory.
    """

    def __init__(self, model: Any, states: Sequence[StateResponses], temperature: float):
        self.model, self.states, self.temperature = model, states, temperature
        need = 4 * sum(state.tokens for state in states) * model.config.get_text_config().vocab_size
        if need > (limit := int(MEMORY_SHARE * psutil.virtual_memory().available)):
            problem = f"the log-probs of these responses need {need / 1e9:.1f} GB, and {limit / 1e9:.1f} GB may be used"
            raise ConfigError("--states", len(states), f"{problem}; lower --states or --samples")
        self.before = [response_logps(model, state, temperature).cpu() for state in states]

    def measure(self) -> dict[str, float]:
        """Compare the policy now with the one before.

        Returns:
            Means over states, in nats: `kl`, `entropy` (change of the response entropy). `token_entropy`: change of the mean
            token entropy over all tokens. `effective_share`: the smallest one of all states.
        """
        changes = [self._compare(state, before) for state, before in zip(self.states, self.before, strict=True)]
        count = len(changes)
        return {
            "kl": sum(change.kl for change in changes) / count,
            "entropy": sum(change.entropy for change in changes) / count,
            "token_entropy": sum(c.token_entropies for c in changes) / sum(c.tokens for c in changes),
            "effective_share": min(change.effective_share for change in changes),
        }

    def _compare(self, state: StateResponses, before_KTV: Tensor) -> StateChange:
        after_KTV = response_logps(self.model, state, self.temperature).cpu()
        return compare_policies(before_KTV, after_KTV, *pad_responses(state.responses))


@torch.no_grad()
def response_logps(model: Any, state: StateResponses, temperature: float) -> Tensor:
    """(K, T, V) log-probs of all tokens at each position of the responses, float32. The prompt is computed once."""
    count, device = len(state.responses), model.device
    ids_KT = pad_responses(state.responses)[0].to(device)
    with eval_mode(model):
        prompt = model(input_ids=torch.tensor([state.prompt], device=device), use_cache=True, logits_to_keep=1)
        logits_KTV = prompt.logits[:, -1:].float().expand(count, -1, -1)
        if ids_KT.shape[1] > 1:
            cache = prompt.past_key_values
            cache.batch_repeat_interleave(count)
            # Padding is on the right, and attention is causal: it changes no token of a response.
            rest = model(input_ids=ids_KT[:, :-1], past_key_values=cache, use_cache=True)
            logits_KTV = torch.cat([logits_KTV, rest.logits.float()], dim=1)
    return torch.log_softmax(logits_KTV / temperature, dim=-1)


def pad_responses(responses: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids, padded with 0 on the right, and their mask; each (K, T)."""
    width = max(map(len, responses))
    ids_KT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in responses])
    mask_KT = torch.tensor([[True] * len(ids) + [False] * (width - len(ids)) for ids in responses])
    return ids_KT, mask_KT
