"""The credit of one step: from what was played to one advantage, one entropy and one coefficient per response.

Shapes: M trajectories that count, R responses and N rows, each in the order of the other: trajectory by trajectory, turn by
turn. All ranks hold all of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from aem_exp import diagnostics
from aem_exp.rollout import CRASHED, Response, Row, Trajectory, rows
from aem_exp.values import Stop

Estimator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # see `advantages`


@dataclass
class Credit:
    """What a step's rows are trained with. `owned_N`: ids of the responses of each row."""

    played: list[Trajectory]
    kept: list[Trajectory]
    rows: list[Row]
    owned_N: list[range]
    group_M: Tensor
    trajectory_R: Tensor
    advantage_R: Tensor
    entropy_R: Tensor
    alpha_R: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def group_R(self) -> Tensor:
        return self.group_M[self.trajectory_R]

    def owned(self, chosen: Sequence[int]) -> Tensor:
        """Ids of the responses of the chosen rows; a negative index is a dead row, which has none."""
        return torch.tensor([r for i in chosen if i >= 0 for r in self.owned_N[i]], dtype=torch.long)

    def responses(self) -> list[tuple[int, int, Response]]:
        """(trajectory, turn, response) in the order of R."""
        return [(m, k, r) for m, t in enumerate(self.kept) for k, r in enumerate(t.responses)]


def assign(played: Sequence[Trajectory], history: str, estimator: Estimator, penalty: float = 0.0) -> Credit:
    """Compare every response with its group. A trajectory whose environment crashed counts nowhere.

    Args:
        penalty: what an invalid turn subtracts from its own score; the episode's return does not see it.
    """
    kept = [t for t in played if t.ended != CRASHED and t.responses]
    all_rows = rows(kept, history)
    group = {draw: i for i, draw in enumerate(dict.fromkeys(t.draw for t in kept))}
    group_M = torch.tensor([group[t.draw] for t in kept], dtype=torch.long)
    return_M = torch.tensor([t.ret for t in kept])
    trajectory_R = torch.tensor([m for m, t in enumerate(kept) for _ in t.responses], dtype=torch.long)
    penalty_R = torch.tensor([0.0 if r.valid else penalty for t in kept for r in t.responses])
    ends = accumulate((len(row.turns) for row in all_rows), initial=0)
    advantage_R = estimator(return_M, penalty_R, trajectory_R, group_M)
    _check(advantage_R, estimator, len(trajectory_R))
    return Credit(
        played=list(played),
        kept=kept,
        rows=all_rows,
        owned_N=[range(a, b) for a, b in pairwise(ends)],
        group_M=group_M,
        trajectory_R=trajectory_R,
        advantage_R=advantage_R,
        entropy_R=torch.zeros(len(trajectory_R)),
    )


def _check(advantage_R: Tensor, estimator: Estimator, responses: int) -> None:
    function = getattr(estimator, "func", estimator)
    name = f"{function.__module__}.{getattr(function, '__name__', function)}"
    if advantage_R.shape != (responses,):
        raise Stop(
            f"{name} returned advantages of shape {tuple(advantage_R.shape)} for {responses} responses: one each"
        )
    if not advantage_R.isfinite().all():
        raise Stop(
            f"{name} returned {int((~advantage_R.isfinite()).sum())} of {responses} advantages that are not finite"
        )


def annotate(credit: Credit) -> None:
    """Write what a response was given beside it, for the record."""
    alphas = credit.alpha_R.tolist() if credit.alpha_R is not None else [None] * len(credit.entropy_R)
    numbers = zip(credit.entropy_R.tolist(), credit.advantage_R.tolist(), alphas, strict=True)
    for (*_, response), (entropy, advantage, alpha) in zip(credit.responses(), numbers, strict=True):
        response.entropy, response.advantage, response.alpha = entropy, advantage, alpha


def describe(credit: Credit, gate: float) -> dict[str, float]:
    """The numbers of a step that a log shows. Every token that was generated is accounted for."""
    played, flat = credit.played, credit.responses()
    tokens_R = torch.tensor([float(len(r.sample.ids)) for *_, r in flat])
    turn_R = torch.tensor([float(turn) for _, turn, _ in flat])
    generated = sum(t.tokens for t in played)
    still_G = _still(credit)
    out = {
        "train/success": _mean([t.won for t in credit.kept]),
        "train/return": _mean([t.ret for t in credit.kept]),
        "train/turns": _mean([len(t.responses) for t in credit.kept]),
        "train/invalid_share": _mean([not r.valid for *_, r in flat]),
        "train/response_entropy": credit.entropy_R.mean().item(),
        "train/response_tokens": tokens_R.mean().item(),
        "train/positive_share": (credit.advantage_R > 0).float().mean().item(),
        "train/negative_share": (credit.advantage_R < 0).float().mean().item(),
        "train/zero_advantage_groups": still_G.float().mean().item(),
        "train/rows": len(credit.rows),
        "train/tokens_generated": generated,
        "train/tokens_trained": sum(sum(row.mask) for row in credit.rows),
        "train/tokens_crashed": sum(t.tokens for t in played if t.ended == CRASHED),
    }
    for how in sorted({t.ended for t in played}):
        out[f"train/ended_{how}"] = _mean([t.ended == how for t in played])
    if credit.alpha_R is not None:
        numbers = diagnostics.modulation(
            credit.alpha_R, credit.entropy_R, credit.group_R, credit.advantage_R, tokens_R, turn_R, gate
        )
        out |= {f"aem/{name}": value for name, value in numbers.items()}
    return out


def _still(credit: Credit) -> Tensor:
    """Groups in which no response has an advantage."""
    groups = int(credit.group_M.max()) + 1
    mass_G = torch.zeros(groups).index_add_(0, credit.group_R, credit.advantage_R.abs())
    return mass_G == 0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
