"""Samples from the policy in this process; the KV cache is kept across the turns of an episode.

Shapes: B conversations, S new columns of a call, L columns of the cache, T sampled tokens, V vocabulary, E end tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aem_exp.rollout.sampling.base import Sample, SamplingParams, keyed_generator


class LocalSampler:
    """Samples from a transformers causal LM on the device of the model.

    Args:
        end_ids: ids of the tokens that end a response.
        watch: receives the number of tokens of the current turn after each token.

    Attributes:
        share_prompts: compute equal first prompts of a session once. The samples are then equal up to rounding.
    """

    def __init__(
        self, model: Any, end_ids: Sequence[int], sampling: SamplingParams, watch: Callable[[int], None] | None = None
    ):
        self.model, self.end_ids, self.sampling, self.watch = model, list(end_ids), sampling, watch
        self.share_prompts = False

    def session(self) -> "LocalSession":
        return LocalSession(self)


class LocalSession:
    """Conversations that share one rectangular KV cache.

    New tokens are left-padded and appended as columns for all conversations at once; padding is masked. The last token of a
    response is fed only with the next turn, because many conversations end with it.
    """

    def __init__(self, sampler: LocalSampler):
        self._sampler = sampler
        self._slots: list[int] = []
        self._pending: dict[int, int] = {}
        self._cache: Any = None
        self._mask_BL = torch.zeros(0, 0, dtype=torch.long)

    @torch.no_grad()
    def generate(
        self, slots: Sequence[int], prompts: Sequence[list[int]], keys: Sequence[tuple], budgets: Sequence[int]
    ) -> list[Sample]:
        with eval_mode(self._sampler.model):
            self._select_slots(list(slots))
            fed = [
                [self._pending.pop(slot), *prompt] if slot in self._pending else prompt
                for slot, prompt in zip(slots, prompts, strict=True)
            ]
            is_shared = self._sampler.share_prompts and self._cache is None
            scores_BV = self._append_once(fed) if is_shared else self._append(*left_pad(fed))
            samples = self._decode(scores_BV, keys, budgets)
            self._pending.update({slot: sample.ids[-1] for slot, sample in zip(slots, samples, strict=True)})
        return samples

    def _decode(self, scores_BV: Tensor, keys: Sequence[tuple], budgets: Sequence[int]) -> list[Sample]:
        longest, device = max(budgets), scores_BV.device
        draws_BT = torch.from_numpy(np.stack([keyed_generator(key).random(longest) for key in keys])).to(device)
        budget_B = torch.tensor(budgets, device=device)
        end_E = torch.tensor(self._sampler.end_ids, device=device)
        live_B = torch.ones(len(keys), dtype=torch.bool, device=device)
        columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for t in range(longest):
            token_B, logp_B, entropy_B = sample_tokens(scores_BV, draws_BT[:, t], self._sampler.sampling)
            columns.append((token_B, logp_B, entropy_B, live_B))
            if self._sampler.watch:
                self._sampler.watch(t + 1)
            live_B = live_B & ~torch.isin(token_B, end_E) & (t + 1 < budget_B)
            if not live_B.any():
                break
            scores_BV = self._append(token_B[:, None], live_B[:, None].long())
        token_BT, logp_BT, entropy_BT, live_BT = (torch.stack(c, dim=1).cpu() for c in zip(*columns, strict=True))
        lengths = live_BT.sum(1).tolist()
        return [
            Sample(token_BT[i, :n].tolist(), logp_BT[i, :n].tolist(), entropy_BT[i, :n].tolist())
            for i, n in enumerate(lengths)
        ]

    def _append_once(self, prompts: list[list[int]]) -> Tensor:
        """Feed the first prompts, equal ones once; return the logits (B, V) after each."""
        different = {tuple(prompt): i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self._mask_BL = self._mask_BL[: len(different)]
        scores_BV = self._append(*left_pad([list(prompt) for prompt in different]))
        index = torch.tensor([different[tuple(prompt)] for prompt in prompts], device=self._mask_BL.device)
        self._cache.batch_select_indices(index)
        self._mask_BL = self._mask_BL[index]
        return scores_BV[index]

    def _append(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Feed new columns; return the logits (B, V) in float32 after the last one."""
        device = self._sampler.model.device
        ids_BS, mask_BS = ids_BS.to(device), mask_BS.to(device)
        seen_B = self._mask_BL.sum(1, keepdim=True)
        self._mask_BL = torch.cat([self._mask_BL, mask_BS], dim=1)
        out = self._sampler.model(
            input_ids=ids_BS,
            attention_mask=self._mask_BL,
            position_ids=(seen_B + mask_BS.cumsum(1) - 1).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = out.past_key_values
        return out.logits[:, -1].float()

    def _select_slots(self, slots: list[int]) -> None:
        """Drop the conversations that have ended from the cache."""
        if self._cache is None:
            self._mask_BL = torch.zeros(len(slots), 0, dtype=torch.long, device=self._sampler.model.device)
        elif slots != self._slots:
            index = torch.tensor([self._slots.index(slot) for slot in slots], device=self._mask_BL.device)
            self._cache.batch_select_indices(index)
            self._mask_BL = self._mask_BL[index]
        self._slots = slots


def sample_tokens(scores_BV: Tensor, draw_B: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token per conversation by inverse CDF: one uniform number each, so the batch does not change the draw.

    Returns:
        token_B, and under the unfiltered distribution at `temperature`: its log-prob logp_B, and entropy_B in nats.
    """
    assert scores_BV.ndim == 2 and draw_B.shape == scores_BV.shape[:1], (scores_BV.shape, draw_B.shape)
    logp_BV = torch.log_softmax(scores_BV / sampling.temperature, dim=-1)
    prob_BV = logp_BV.exp()
    entropy_B = -(prob_BV * logp_BV).nan_to_num().sum(-1)  # 0 * -inf is 0
    kept_BV = filter_probabilities(prob_BV, sampling).double().cumsum(-1)
    token_B = torch.searchsorted(kept_BV, draw_B[:, None] * kept_BV[:, -1:], right=True).squeeze(1)
    token_B = token_B.clamp(max=scores_BV.shape[-1] - 1)
    return token_B, logp_BV.gather(1, token_B[:, None]).squeeze(1), entropy_B


def filter_probabilities(prob_BV: Tensor, sampling: SamplingParams) -> Tensor:
    """Apply top-k, top-p and min-p with the warpers of transformers; the result is not normalised."""
    from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = []
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if not warpers:
        return prob_BV
    scores_BV = prob_BV.log()
    for warper in warpers:
        scores_BV = warper(None, scores_BV)
    return scores_BV.exp()


def left_pad(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows on the left. Returns token ids and their mask, each (B, S)."""
    width = max(map(len, rows))
    ids_BS = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    for i, row in enumerate(rows):
        ids_BS[i, width - len(row) :] = torch.tensor(row)
        mask_BS[i, width - len(row) :] = 1
    return ids_BS, mask_BS


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Switch the model to eval mode (no dropout) within the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
