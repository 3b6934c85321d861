"""Selects tokens of a step that the policy loss treats differently: Clip-Cov, KL-Cov, and the tokens of highest entropy.

All three select once per step, from the tokens of all ranks, with log-probs and entropies of the old policy. The selection
therefore depends on neither padding, micro-batches nor ranks, and it is the same for all updates of the step. The published code
of all three selects in each micro-batch, with the current policy: there, the selection depends on how a batch is split.

Covariances are computed from the advantages before modulation. A modulation then multiplies the advantages of the tokens that
are trained.

Shapes: K generated tokens of the step, in the order of the rows; N rows of a micro-batch, T tokens of a completion.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aem_exp.training.credit import AssignedCredit, select_ids
from aem_exp.training.logprobs import ResponseMeasurements, TokenScores
from aem_exp.training.modulation import ModulationVariant
from aem_exp.training.size_match import REFERENCE
from aem_exp.training.updates import MicroBatch


@dataclass(frozen=True)
class TokenRules:
    """Which tokens are treated differently. The default is none."""

    top_entropy: float = 1.0
    """share of the tokens that are trained, those of highest entropy; see `top_entropy_weights`"""
    clip_cov_ratio: float | None = None
    """share of the tokens that Clip-Cov does not train; see `clip_cov_weights`"""
    clip_cov_min: float | None = None
    """lower bound of the covariance of these tokens"""
    clip_cov_max: float | None = None
    """upper bound of the covariance of these tokens"""
    kl_cov_ratio: float | None = None
    """share of the tokens that KL-Cov penalises; see `largest_covariances`"""
    kl_cov_coef: float | None = None
    """coefficient of this penalty"""


ALL_TOKENS = TokenRules()


class TokenMeasurements(ResponseMeasurements):
    """Adds the log-prob and entropy of each token in the rows of this rank; 0 for all others.

    Attributes:
        logp_K: log-prob of each token, in nats.
        entropy_K: entropy at each token, in nats.
    """

    def __init__(self, credit: AssignedCredit, variant: ModulationVariant):
        super().__init__(credit, variant)
        self._token_ids_N = credit.token_ids_N
        self.logp_K, self.entropy_K = (torch.zeros(len(credit.response_K)) for _ in range(2))

    def add(
        self, micro: Sequence[int], mask_NT: Tensor, scores: TokenScores, score_norm_NT: Tensor | None = None
    ) -> None:
        super().add(micro, mask_NT, scores, score_norm_NT)
        ids = self.token_ids(micro)
        for value_K, score_NT in zip((self.logp_K, self.entropy_K), scores, strict=True):
            value_K[ids] = score_NT[mask_NT.bool()]

    def token_ids(self, micro: Sequence[int]) -> Tensor:
        """Ids of the tokens in the chosen rows. A padding row has none."""
        return select_ids(self._token_ids_N, micro)

    def advantage_K(self) -> Tensor:
        """Advantage of each token before modulation: that of its response."""
        return self.credit.advantage_R[self.credit.response_K]


@dataclass(frozen=True)
class TokenSelection:
    """The selection of a step."""

    measurements: TokenMeasurements
    """of this rank: they give the ids of the tokens of each row"""
    weight_K: Tensor
    """factor of the advantage of each token; 0: no gradient of the policy loss"""
    penalty_K: Tensor
    """coefficient of the absolute log-ratio of each token in the loss; 0: none"""

    def edit(self, micro: Sequence[int], batch: MicroBatch) -> MicroBatch:
        """The changed tensors of a micro-batch, each (N, T): its advantages, and `penalties` if there are any."""
        mask_NT = batch["tool_mask"]
        weight_NT = self._spread(self.weight_K, micro, mask_NT)
        changed: MicroBatch = {name: batch[name] * weight_NT for name in ("advantages", REFERENCE) if name in batch}
        if self.penalty_K.any():
            changed["penalties"] = self._spread(self.penalty_K, micro, mask_NT)
        return changed

    @property
    def metrics(self) -> dict[str, float]:
        """Shares of the tokens that are trained, and that are penalised."""
        shares = {"trained": self.weight_K > 0, "penalised": self.penalty_K > 0}
        return {f"tokens/{name}_share": chosen_K.float().mean().item() for name, chosen_K in shares.items()}

    def _spread(self, value_K: Tensor, micro: Sequence[int], mask_NT: Tensor) -> Tensor:
        out_NT = torch.zeros(mask_NT.shape)
        out_NT[mask_NT.bool()] = value_K[self.measurements.token_ids(micro)]
        return out_NT


def start_measurements(rules: TokenRules, credit: AssignedCredit, variant: ModulationVariant) -> ResponseMeasurements:
    """Empty measurements of this rank: of each token, if the rules need them."""
    return (ResponseMeasurements if rules == ALL_TOKENS else TokenMeasurements)(credit, variant)


def select_tokens(
    rules: TokenRules,
    measurements: ResponseMeasurements,
    sum_over_ranks: Callable[[Tensor], Tensor],
    rng: np.random.Generator,
) -> TokenSelection | None:
    """Select the tokens of a step.

    Args:
        measurements: of this rank; see `start_measurements`.
        sum_over_ranks: adds up the values of all ranks.
        rng: chooses tokens for Clip-Cov; it must be seeded equally on all ranks.

    Returns:
        The selection, equal on all ranks. None if no token is treated differently.
    """
    if not isinstance(measurements, TokenMeasurements):
        return None
    weight_K, penalty_K = torch.ones(len(measurements.logp_K)), torch.zeros(len(measurements.logp_K))
    if rules.top_entropy < 1:
        weight_K *= top_entropy_weights(sum_over_ranks(measurements.entropy_K), rules.top_entropy)
    if rules.clip_cov_ratio is not None or rules.kl_cov_ratio is not None:
        covariance_K = covariances(sum_over_ranks(measurements.logp_K), measurements.advantage_K())
        if rules.clip_cov_ratio is not None:
            assert rules.clip_cov_min is not None and rules.clip_cov_max is not None
            bounds = rules.clip_cov_min, rules.clip_cov_max
            weight_K *= clip_cov_weights(covariance_K, rules.clip_cov_ratio, *bounds, rng)
        if rules.kl_cov_ratio is not None:
            assert rules.kl_cov_coef is not None
            penalty_K = rules.kl_cov_coef * largest_covariances(covariance_K, rules.kl_cov_ratio)
    return TokenSelection(measurements, weight_K, penalty_K)


def penalty_loss(logps_NT: Tensor, batch: MicroBatch) -> Tensor:
    """KL-Cov's term in the loss of a micro-batch: the share of this micro-batch in a mean over the tokens of the update."""
    log_ratio_NT = logps_NT - batch["old_per_token_logps"]
    return (log_ratio_NT.abs() * batch["penalties"] * batch["tool_mask"]).sum() * batch["penalty_weight"]


def without_first_penalty(step_updates: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
    """The updates of a step, the first of them without KL-Cov's term; see `largest_covariances`."""
    first = [{name: value for name, value in batch.items() if name != "penalties"} for batch in step_updates[0]]
    return [first, *step_updates[1:]]


def covariances(logp_K: Tensor, advantage_K: Tensor) -> Tensor:
    """The contribution of each token to the covariance of log-prob and advantage (arXiv 2505.22617), in float64.

        (log p - mean of log p) * (A - mean of A)

    Both means are over all tokens. A token with a large value is likely and has a high advantage (or the opposite of both):
    training on it lowers the entropy of the policy.

    Args:
        logp_K: log-probs under the old policy, in nats.
        advantage_K: advantages before modulation.
    """
    assert logp_K.ndim == 1 and logp_K.shape == advantage_K.shape, (logp_K.shape, advantage_K.shape)
    logp_K, advantage_K = logp_K.double(), advantage_K.double()
    return (logp_K - logp_K.mean()) * (advantage_K - advantage_K.mean())


def clip_cov_weights(covariance_K: Tensor, ratio: float, low: float, high: float, rng: np.random.Generator) -> Tensor:
    """(K,) Clip-Cov (arXiv 2505.22617): 0 for tokens that get no gradient, 1 for all others.

    max(1, `ratio` x K) tokens, rounded down, are chosen at random from those with low < covariance < high; all of them if there
    are fewer. They stay in the denominator of a mean over tokens.

    The published code uses the current log-probs and does not choose tokens that PPO's clip has removed already. Here, the
    log-probs are those at the start of the step, when the clip removes none.

    Args:
        covariance_K: see `covariances`.
        rng: chooses the tokens.
    """
    candidates = ((covariance_K > low) & (covariance_K < high)).nonzero()[:, 0]
    count = min(len(candidates), max(1, int(ratio * len(covariance_K))))
    chosen = candidates[torch.from_numpy(rng.permutation(len(candidates))[:count])]
    return torch.ones(len(covariance_K)).index_fill_(0, chosen, 0.0)


def largest_covariances(covariance_K: Tensor, ratio: float) -> Tensor:
    """(K,) KL-Cov (arXiv 2505.22617): 1 for the max(1, `ratio` x K) tokens, rounded down, with the largest covariances, else 0.

    The loss of these tokens gets the term coef * |log-ratio of the current to the old policy|. It is 0 at the start of a step,
    and its derivative there would only be the sign of a rounding error. The first update of a step is therefore made without it.

    The published code uses the current log-probs. It has no clip of the ratio, and neither has the objective of the paper.

    Args:
        covariance_K: see `covariances`.
    """
    count = min(len(covariance_K), max(1, int(ratio * len(covariance_K))))
    return _indicator(covariance_K, count)


def top_entropy_weights(entropy_K: Tensor, share: float) -> Tensor:
    """(K,) Training on the tokens of highest entropy (arXiv 2506.01939): K / k for the k = `share` x K tokens of highest entropy,
    rounded up, and 0 for all others.

    A mean over all tokens of the step, with these factors, is the mean over the chosen ones: the others leave the denominator, as
    in the published code. In the objective of the paper they stay there; the policy loss is then smaller by the factor `share`.
    KL term and entropy bonus use all tokens, as in the published code.

    Args:
        entropy_K: entropies under the old policy, in nats. The published code and TRL use those of the current policy.
    """
    count = min(len(entropy_K), math.ceil(round(share * len(entropy_K), 6)))
    return _indicator(entropy_K, count) * (len(entropy_K) / max(1, count))


def _indicator(value_K: Tensor, count: int) -> Tensor:
    """1 for the largest values, else 0. Of equal values, the first are chosen."""
    order = torch.argsort(value_K, descending=True, stable=True)
    return torch.zeros(len(value_K)).index_fill_(0, order[:count], 1.0)
