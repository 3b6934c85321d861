"""The credit of one step: from what was played to one advantage, one entropy and one coefficient per response.

Shapes: M trajectories that are trained, R responses and N rows, each in the order of the other: trajectory by trajectory,
turn by turn. U units: the responses, or their tokens, whichever get coefficients. All ranks hold all of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from aem_exp.advantages import Played
from aem_exp.core import user_code
from aem_exp.core.errors import RunError
from aem_exp.rollout.rows import Row, build_rows
from aem_exp.rollout.types import CONTEXT, CRASHED, OUTCOME_METRICS, STOPPED, TURNS, Response, Trajectory
from aem_exp.training import diagnostics

Estimator = Callable[[Played], Tensor]  # see `estimate_advantages`
TRUNCATED_ENDINGS = (CONTEXT, TURNS, STOPPED)  # endings that are no end by the rules


@dataclass
class Credit:
    """What a step's rows are trained with.

    Attributes:
        played: everything; `dropped` of it teaches nothing (a group of equal returns), `filtered` is masked though it counts
            in its group's mean, `kept` is trained.
        owned_N: ids of the responses of each row.
        units_N: ids of the units of each row.
        signal_U: what the coefficients are made of; filled as the rows are measured, like `entropy_R` and `surprisal_R`
            (the means over a response's tokens).
        addition_U: what is added to the modulated advantages, if anything is.
        trained: whether the step has updates; it has none where its loss is zero.
    """

    played: list[Trajectory]
    dropped: list[Trajectory]
    filtered: list[Trajectory]
    kept: list[Trajectory]
    rows: list[Row]
    response_ids_N: list[range]
    unit_ids_N: list[range]
    group_M: Tensor
    trajectory_R: Tensor
    advantage_R: Tensor
    response_U: Tensor
    entropy_R: Tensor
    surprisal_R: Tensor
    signal_U: Tensor
    alpha_U: Tensor | None = None
    addition_U: Tensor | None = None
    trained: bool = True
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def group_R(self) -> Tensor:
        return self.group_M[self.trajectory_R]

    @property
    def alpha_R(self) -> Tensor | None:
        """The coefficient of each response: the mean over its units."""
        return None if self.alpha_U is None else self._over_units(self.alpha_U)

    @property
    def final_advantage_U(self) -> Tensor:
        """The advantage of each unit, after modulation if there is any."""
        advantage_U = self.advantage_R[self.response_U]
        given_U = advantage_U if self.alpha_U is None else advantage_U * self.alpha_U
        return given_U if self.addition_U is None else given_U + self.addition_U

    @property
    def final_advantage_R(self) -> Tensor | None:
        """The advantage of each response after modulation: the mean over its units."""
        return None if self.alpha_U is None else self._over_units(self.final_advantage_U)

    def _over_units(self, value_U: Tensor) -> Tensor:
        sums_R = torch.zeros_like(self.entropy_R).index_add_(0, self.response_U, value_U)
        return sums_R / torch.bincount(self.response_U, minlength=len(sums_R)).clamp(min=1)

    def response_ids(self, chosen: Sequence[int]) -> Tensor:
        """Ids of the responses of the chosen rows; a negative index is a dead row, which has none."""
        return _ids(self.response_ids_N, chosen)

    def unit_ids(self, chosen: Sequence[int]) -> Tensor:
        """Ids of the units of the chosen rows."""
        return _ids(self.unit_ids_N, chosen)

    def responses(self) -> list[tuple[int, int, Response]]:
        """(trajectory, turn, response) in the order of R."""
        return [(m, k, r) for m, t in enumerate(self.kept) for k, r in enumerate(t.responses)]


def _ids(ranges: Sequence[range], chosen: Sequence[int]) -> Tensor:
    return torch.tensor([u for i in chosen if i >= 0 for u in ranges[i]], dtype=torch.long)


def drop_uninformative_groups(
    played: Sequence[Trajectory], mask_cut: bool = False
) -> tuple[list[Trajectory], list[Trajectory]]:
    """Part groups that can teach from those that cannot: equal returns, or fewer than two survivors."""
    returns: dict[int, list[float]] = {}
    for t in played:
        returns.setdefault(t.draw, []).extend(
            [_counted_return(t, mask_cut)] if t.ended != CRASHED and t.responses else []
        )
    useful = {draw for draw, values in returns.items() if len(set(values)) > 1}
    return [t for t in played if t.draw in useful], [t for t in played if t.draw not in useful]


def _counted_return(trajectory: Trajectory, mask_cut: bool) -> float:
    """The return that a group's mean sees: 0 for a trajectory that was cut, where those are masked."""
    return 0.0 if mask_cut and trajectory.ended in TRUNCATED_ENDINGS else trajectory.ret


def assign_credit(
    played: Sequence[Trajectory],
    history: str,
    estimator: Estimator,
    penalty: float = 0.0,
    mask_cut: bool = False,
    dropped: Sequence[Trajectory] = (),
    unit: Literal["response", "token"] = "response",
) -> Credit:
    """Compare every response with its group. A trajectory whose environment crashed counts nowhere.

    Args:
        penalty: what an invalid turn subtracts from its own score; the episode's return does not see it.
        mask_cut: trajectories that the world did not end count in their group's mean with return 0, and are not trained.
        dropped: also played, and left out of this step.
        unit: what gets a coefficient.
    """
    counted = [t for t in played if t.ended != CRASHED and t.responses]
    seen = _build_step_batch(counted, penalty, mask_cut)
    advantage_R = estimate_advantages(estimator, seen)
    stays_M = torch.tensor([not (mask_cut and t.ended in TRUNCATED_ENDINGS) for t in counted], dtype=torch.bool)
    kept = [t for t, stays in zip(counted, stays_M.tolist(), strict=True) if stays]
    all_rows = build_rows(kept, history)
    tokens_R = [len(r.sample.ids) for t in kept for r in t.responses]
    responses = torch.arange(len(tokens_R))
    response_U = responses.repeat_interleave(torch.tensor(tokens_R, dtype=torch.long)) if unit == "token" else responses
    owned_N = _ranges([len(row.turns) for row in all_rows])
    return Credit(
        played=[*played, *dropped],
        dropped=list(dropped),
        filtered=[t for t, stays in zip(counted, stays_M.tolist(), strict=True) if not stays],
        kept=kept,
        rows=all_rows,
        response_ids_N=owned_N,
        unit_ids_N=_ranges([sum(row.mask) for row in all_rows]) if unit == "token" else owned_N,
        group_M=seen.group_M[stays_M],
        trajectory_R=torch.tensor([m for m, t in enumerate(kept) for _ in t.responses], dtype=torch.long),
        advantage_R=advantage_R[stays_M[seen.trajectory_R]].float(),
        response_U=response_U,
        entropy_R=torch.zeros(len(tokens_R)),
        surprisal_R=torch.zeros(len(tokens_R)),
        signal_U=torch.zeros(len(response_U)),
    )


def _build_step_batch(counted: Sequence[Trajectory], penalty: float, mask_cut: bool) -> Played:
    """What the estimator is shown, in float64: rounded to float32, equal returns could differ."""
    group = {draw: i for i, draw in enumerate(dict.fromkeys(t.draw for t in counted))}
    turns = [(m, t, r) for m, t in enumerate(counted) for r in t.responses]
    states: dict[tuple[int, str], int] = {}
    cut = [mask_cut and t.ended in TRUNCATED_ENDINGS for t in counted]
    return Played(
        return_M=torch.tensor([_counted_return(t, mask_cut) for t in counted], dtype=torch.float64),
        group_M=torch.tensor([group[t.draw] for t in counted], dtype=torch.long),
        trajectory_R=torch.tensor([m for m, *_ in turns], dtype=torch.long),
        reward_R=torch.tensor([0.0 if cut[m] else r.reward for m, _, r in turns], dtype=torch.float64),
        penalty_R=torch.tensor([0.0 if r.valid or cut[m] else penalty for m, _, r in turns], dtype=torch.float64),
        state_R=torch.tensor(
            [states.setdefault((t.draw, r.observation), len(states)) for _, t, r in turns], dtype=torch.long
        ),
    )


def _ranges(sizes: Sequence[int]) -> list[range]:
    return [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]


def estimate_advantages(estimator: Estimator, seen: Played) -> Tensor:
    """What an estimator, which may be a user's, makes of a step: one finite advantage per response.

    Raises:
        Stop: it fails, or returns something else; with the file and the line.
    """
    try:
        advantage_R: Any = estimator(seen)
    except Exception as error:
        raise RunError(
            f"{_estimator_name(estimator)} failed: {user_code.format_error(error)} ({user_code.error_location(error, estimator)})"
        ) from error
    responses, where = len(seen.trajectory_R), f"({user_code.definition_location(estimator)})"
    if not isinstance(advantage_R, Tensor):
        kind = type(advantage_R).__name__
        raise RunError(
            f"{_estimator_name(estimator)} must return a tensor of one advantage per response, not {kind} {where}"
        )
    if advantage_R.shape != (responses,):
        shape = tuple(advantage_R.shape)
        told = f"returned advantages of shape {shape} for {responses} responses: one each"
        raise RunError(f"{_estimator_name(estimator)} {told} {where}")
    if advantage_R.is_complex():
        raise RunError(
            f"{_estimator_name(estimator)} must return real numbers, not {str(advantage_R.dtype).removeprefix('torch.')} {where}"
        )
    if not advantage_R.isfinite().all():
        strange = int((~advantage_R.isfinite()).sum())
        raise RunError(
            f"{_estimator_name(estimator)} returned {strange} of {responses} advantages that are not finite {where}",
            "nan",
        )
    return advantage_R


def _estimator_name(estimator: Estimator) -> str:
    function = getattr(estimator, "func", estimator)
    return f"{function.__module__}.{getattr(function, '__name__', function)}"


def annotate_responses(credit: Credit) -> None:
    """Write what a response was given beside it, for the record."""
    alpha_R = credit.alpha_R
    alphas = alpha_R.tolist() if alpha_R is not None else [None] * len(credit.entropy_R)
    numbers = zip(credit.entropy_R.tolist(), credit.advantage_R.tolist(), alphas, strict=True)
    for (*_, response), (entropy, advantage, alpha) in zip(credit.responses(), numbers, strict=True):
        response.entropy, response.advantage, response.alpha = entropy, advantage, alpha


def step_metrics(credit: Credit) -> dict[str, float]:
    """The numbers of a step that a log shows. Every token that was generated is accounted for."""
    flat, counted = credit.responses(), [t for t in credit.played if t.ended != CRASHED]
    turns = [r for t in counted for r in t.responses]
    tokens_R = torch.tensor([float(len(r.sample.ids)) for *_, r in flat])
    turn_R = torch.tensor([float(turn) for _, turn, _ in flat])
    scores = [t.score for t in counted if t.score is not None]
    told = [(name, value) for r in turns for name, value in r.metrics.items() if name not in OUTCOME_METRICS]
    out = {f"train/{name}": mean([v for n, v in told if n == name]) for name in sorted({name for name, _ in told})}
    out |= {
        **({"train/score": mean(scores)} if scores else {}),
        "train/success": mean([t.won for t in counted]),
        "train/return": mean([t.ret for t in counted]),
        "train/turns": mean([len(t.responses) for t in counted]),
        "train/invalid_share": mean([not r.valid for r in turns]),
        "train/response_entropy": mean(credit.entropy_R.tolist()),
        "train/response_tokens": mean(tokens_R.tolist()),
        "train/positive_share": mean((credit.advantage_R > 0).tolist()),
        "train/negative_share": mean((credit.advantage_R < 0).tolist()),
        "train/zero_advantage_groups": _zero_advantage_share(credit),
        "train/rows": len(credit.rows) if credit.trained else 0,
        "train/episodes": len(credit.played),
    }
    for how in sorted({t.ended for t in credit.played}):
        out[f"train/ended_{how}"] = mean([t.ended == how for t in credit.played])
    out |= {f"drift/{name}": value for name, value in _entropy_drift(credit, tokens_R, turn_R == 0).items()}
    alpha_R = credit.alpha_R
    if alpha_R is not None:
        numbers = diagnostics.modulation_statistics(alpha_R, credit.entropy_R, credit.advantage_R, tokens_R, turn_R)
        out |= {f"aem/{name}": value for name, value in numbers.items()}
    return out | credit.metrics | _token_counts(credit)


def _entropy_drift(credit: Credit, tokens_R: Tensor, first_R: Tensor) -> dict[str, float]:
    """The drift of entropy at the first turn, where all members of a group are in the same state."""
    given_R = credit.final_advantage_R
    return diagnostics.entropy_drift(
        credit.advantage_R[first_R],
        None if given_R is None else given_R[first_R],
        (credit.surprisal_R * tokens_R)[first_R],
        credit.group_R[first_R],
    )


def _token_counts(credit: Credit) -> dict[str, float]:
    """Where the generated tokens went: trained, filtered or crashed; nothing is lost."""
    generated = sum(t.tokens for t in credit.played)
    measured = sum(sum(row.mask) for row in credit.rows)
    trained = measured if credit.trained else 0
    gone = {id(t) for t in (*credit.dropped, *credit.filtered)}
    crashed = sum(t.tokens for t in credit.played if t.ended == CRASHED and id(t) not in gone)
    return {
        "train/tokens_generated": generated,
        "train/tokens_trained": trained,
        "train/tokens_filtered": sum(t.tokens for t in (*credit.dropped, *credit.filtered)) + measured - trained,
        "train/tokens_crashed": crashed,
        "train/useful_share": trained / max(1, generated),
    }


def _zero_advantage_share(credit: Credit) -> float:
    """Share of the groups in which no response has an advantage."""
    if not len(credit.group_M):
        return 1.0
    mass_G = torch.zeros(int(credit.group_M.max()) + 1).index_add_(0, credit.group_R, credit.advantage_R.abs())
    return float((mass_G[credit.group_M.unique()] == 0).float().mean())


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
