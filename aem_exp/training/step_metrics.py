"""Computes the metrics of a step, and writes entropy, advantage and coefficient into its recorded responses.

Shapes: R responses, G groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aem_exp.rollout.types import OUTCOME_METRICS, Ending
from aem_exp.training import diagnostics
from aem_exp.training.credit import AssignedCredit, MeasuredCredit, ModulatedCredit


def annotate_responses(credit: MeasuredCredit) -> None:
    """Write entropy (nats), advantage and coefficient into each trained response, for `episodes.parquet`."""
    alphas = credit.alpha_R.tolist() if isinstance(credit, ModulatedCredit) else [None] * len(credit.entropy_R)
    numbers = zip(credit.entropy_R.tolist(), credit.advantage_R.tolist(), alphas, strict=True)
    for (*_, response), (entropy, advantage, alpha) in zip(credit.list_responses(), numbers, strict=True):
        response.entropy, response.advantage, response.alpha = entropy, advantage, alpha


def compute_step_metrics(credit: MeasuredCredit, trained: bool = True) -> dict[str, float]:
    """Compute the metrics of a step, as `train/*`, `drift/*` and, with modulation, `aem/*`.

    Args:
        trained: whether the step has updates; a step whose loss is zero has none.
    """
    tokens_R, turn_R = credit.tokens_R.float(), credit.turn_R.float()
    out = _environment_metrics(credit) | _rollout_metrics(credit, tokens_R, trained) | _ending_shares(credit)
    out |= {f"drift/{name}": value for name, value in _entropy_drift(credit, tokens_R, turn_R == 0).items()}
    if isinstance(credit, ModulatedCredit):
        statistics = diagnostics.modulation_statistics(
            credit.alpha_R, credit.entropy_R, credit.advantage_R, tokens_R, turn_R
        )
        out |= {f"aem/{name}": value for name, value in statistics.items()} | credit.metrics
    return out | _advantage_sums(credit) | _token_counts(credit, trained)


def _environment_metrics(credit: AssignedCredit) -> dict[str, float]:
    """The metrics of the environment, each averaged over the turns that report it."""
    values: dict[str, list[float]] = {}
    for response in (r for t in credit.played if t.ended != Ending.CRASHED for r in t.responses):
        for name, value in response.metrics.items():
            if name not in OUTCOME_METRICS:
                values.setdefault(name, []).append(value)
    return {f"train/{name}": mean(values[name]) for name in sorted(values)}


def _rollout_metrics(credit: MeasuredCredit, tokens_R: Tensor, trained: bool) -> dict[str, float]:
    counted = [t for t in credit.played if t.ended != Ending.CRASHED]
    scores = [t.score for t in counted if t.score is not None]
    return {
        **({"train/score": mean(scores)} if scores else {}),
        "train/success": mean([t.won for t in counted]),
        "train/return": mean([t.ret for t in counted]),
        "train/turns": mean([len(t.responses) for t in counted]),
        "train/invalid_share": mean([not r.valid for t in counted for r in t.responses]),
        "train/response_entropy": mean(credit.entropy_R.tolist()),
        "train/response_tokens": mean(tokens_R.tolist()),
        "train/positive_share": mean((credit.advantage_R > 0).tolist()),
        "train/negative_share": mean((credit.advantage_R < 0).tolist()),
        "train/zero_advantage_groups": _zero_advantage_share(credit),
        "train/rows": len(credit.rows) if trained else 0,
        "train/episodes": len(credit.played),
    }


def _ending_shares(credit: AssignedCredit) -> dict[str, float]:
    endings = sorted({t.ended for t in credit.played})
    return {f"train/ended_{ending}": mean([t.ended == ending for t in credit.played]) for ending in endings}


def _entropy_drift(credit: MeasuredCredit, tokens_R: Tensor, first_R: Tensor) -> dict[str, float]:
    """`diagnostics.entropy_drift` at the first turn, where all members of a group are in the same state."""
    return diagnostics.entropy_drift(
        credit.advantage_R[first_R],
        credit.final_advantage_R[first_R] if isinstance(credit, ModulatedCredit) else None,
        (credit.surprisal_R * tokens_R)[first_R],
        (credit.entropy_R * tokens_R)[first_R],
        credit.group_R[first_R],
    )


def _advantage_sums(credit: MeasuredCredit) -> dict[str, float]:
    """Sums of n alpha A over the responses with A > 0, and over those with A < 0, per trained token; n: tokens of a response.

    alpha is 1 without modulation. With coefficients per token, the sums are over tokens. Masked tokens are left out.
    """
    in_loss_K = credit.in_loss_K
    mass_K = credit.final_advantage_U[credit.unit_K] * in_loss_K
    tokens, advantage_K = max(1, int(in_loss_K.sum())), credit.advantage_R[credit.response_K]
    return {
        "train/positive_advantage": mass_K[advantage_K > 0].sum().item() / tokens,
        "train/negative_advantage": mass_K[advantage_K < 0].sum().item() / tokens,
    }


def _token_counts(credit: AssignedCredit, trained: bool) -> dict[str, float]:
    """Counts of generated, trained, filtered and crashed tokens; generated = trained + filtered + crashed."""
    generated = sum(t.tokens for t in credit.played)
    measured = len(credit.in_loss_K)
    in_updates = int(credit.in_loss_K.sum()) if trained else 0
    removed = {id(t) for t in (*credit.dropped, *credit.filtered)}
    crashed = sum(t.tokens for t in credit.played if t.ended == Ending.CRASHED and id(t) not in removed)
    return {
        "train/tokens_generated": generated,
        "train/tokens_trained": in_updates,
        "train/tokens_filtered": sum(t.tokens for t in (*credit.dropped, *credit.filtered)) + measured - in_updates,
        "train/tokens_crashed": crashed,
        "train/useful_share": in_updates / max(1, generated),
    }


def _zero_advantage_share(credit: AssignedCredit) -> float:
    """Share of the groups in which all advantages are 0; 1 if nothing is trained."""
    if not len(credit.group_M):
        return 1.0
    mass_G = torch.zeros(int(credit.group_M.max()) + 1).index_add_(0, credit.group_R, credit.advantage_R.abs())
    return float((mass_G[credit.group_M.unique()] == 0).float().mean())


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN if there are no values."""
    return sum(values) / len(values) if values else float("nan")
