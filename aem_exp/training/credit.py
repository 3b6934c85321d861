"""The credit of one step, in three immutable stages: assigned, measured, modulated.

- `AssignedCredit`: every response has an advantage, by comparison with its group.
- `MeasuredCredit`: the entropy and the surprisal of every response are known too.
- `ModulatedCredit`: every unit has a coefficient and a final advantage (`modulation.modulate_credit`).

A step without modulation ends as measured. All ranks hold the credit of all rows.
Shapes: M trained trajectories, R their responses and N their rows, each in the order of the other: trajectory by trajectory,
turn by turn. U units: the responses or their tokens, whichever get coefficients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from aem_exp.advantages import StepBatch
from aem_exp.core import user_code
from aem_exp.core.errors import RunError
from aem_exp.rollout.rows import Row, build_rows
from aem_exp.rollout.types import Ending, Response, Trajectory

Estimator = Callable[[StepBatch], Tensor]  # see `estimate_advantages`
Unit = Literal["response", "token"]
TRUNCATED_ENDINGS = (
    Ending.CONTEXT,
    Ending.TURNS,
    Ending.STOPPED,
)  # the rules of the environment did not end the episode


@dataclass(frozen=True)
class CreditRules:
    """How the responses of a step are compared."""

    estimator: Estimator
    """a function of `advantages`, or the user's"""
    penalty: float = 0.0
    """what an invalid turn subtracts from its own score; the episode's return does not include it"""
    mask_truncated: bool = False
    """truncated trajectories count in their group's mean with return 0, and are not trained"""


@dataclass(frozen=True)
class AssignedCredit:
    """What was played in a step, and the advantage of each trained response."""

    played: list[Trajectory]
    """all trajectories of the step"""
    dropped: list[Trajectory]
    """those of them that are in groups without information: all returns are equal"""
    filtered: list[Trajectory]
    """those of them that are masked, but count in their group's mean"""
    kept: list[Trajectory]
    """those of them that are trained"""
    rows: list[Row]
    response_ids_N: list[range]
    """ids of the responses of each row"""
    unit_ids_N: list[range]
    """ids of the units of each row"""
    group_M: Tensor
    """group id of each trajectory"""
    trajectory_R: Tensor
    """trajectory of each response"""
    advantage_R: Tensor
    """advantage of each response, before modulation"""
    response_U: Tensor
    """response of each unit"""

    def __post_init__(self) -> None:
        assert len(self.response_ids_N) == len(self.unit_ids_N) == len(self.rows)
        assert self.group_M.shape == (len(self.kept),)
        assert self.trajectory_R.ndim == self.response_U.ndim == 1
        assert self.advantage_R.shape == self.trajectory_R.shape

    @property
    def group_R(self) -> Tensor:
        return self.group_M[self.trajectory_R]

    @property
    def trajectory_U(self) -> Tensor:
        return self.trajectory_R[self.response_U]

    @property
    def advantage_U(self) -> Tensor:
        """The advantage of each unit before modulation: that of its response."""
        return self.advantage_R[self.response_U]

    @property
    def final_advantage_U(self) -> Tensor:
        """The advantage that each unit is trained with."""
        return self.advantage_U

    def response_ids(self, chosen: Sequence[int]) -> Tensor:
        """Ids of the responses of the chosen rows; a negative index is a dead row, which has none."""
        return _ids(self.response_ids_N, chosen)

    def unit_ids(self, chosen: Sequence[int]) -> Tensor:
        """Ids of the units of the chosen rows."""
        return _ids(self.unit_ids_N, chosen)

    def list_responses(self) -> list[tuple[int, int, Response]]:
        """(trajectory, turn, response) in the order of R."""
        return [(m, k, r) for m, t in enumerate(self.kept) for k, r in enumerate(t.responses)]


@dataclass(frozen=True)
class MeasuredCredit(AssignedCredit):
    """The same, with the measurements of all ranks."""

    entropy_R: Tensor
    """mean token entropy of each response, in nats"""
    surprisal_R: Tensor
    """mean surprisal (-log p) of the tokens of each response, in nats"""
    signal_U: Tensor
    """what the coefficients are computed from, in nats"""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.entropy_R.shape == self.surprisal_R.shape == self.advantage_R.shape
        assert self.signal_U.shape == self.response_U.shape


@dataclass(frozen=True)
class ModulatedCredit(MeasuredCredit):
    """The same, with the coefficients of the modulation."""

    alpha_U: Tensor
    """coefficient of each unit"""
    modulated_advantage_U: Tensor
    """advantage of each unit after modulation"""
    metrics: dict[str, float]
    """which share of the scopes the gate left unmodulated (`aem/gated_share`), and which share of the units is trained
    (`aem/kept_share`, where the variant selects units)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.alpha_U.shape == self.modulated_advantage_U.shape == self.response_U.shape

    @property
    def alpha_R(self) -> Tensor:
        """The coefficient of each response: the mean over its units."""
        return self._mean_over_units(self.alpha_U)

    @property
    def final_advantage_U(self) -> Tensor:
        return self.modulated_advantage_U

    @property
    def final_advantage_R(self) -> Tensor:
        """The advantage of each response after modulation: the mean over its units."""
        return self._mean_over_units(self.modulated_advantage_U)

    def _mean_over_units(self, value_U: Tensor) -> Tensor:
        sums_R = torch.zeros_like(self.entropy_R).index_add_(0, self.response_U, value_U)
        return sums_R / torch.bincount(self.response_U, minlength=len(sums_R)).clamp(min=1)


def add_measurements(
    credit: AssignedCredit, entropy_R: Tensor, surprisal_R: Tensor, signal_U: Tensor
) -> MeasuredCredit:
    """The next stage of an assigned credit."""
    return MeasuredCredit(**_fields_of(credit), entropy_R=entropy_R, surprisal_R=surprisal_R, signal_U=signal_U)


def add_modulation(
    credit: MeasuredCredit, alpha_U: Tensor, modulated_advantage_U: Tensor, metrics: dict[str, float]
) -> ModulatedCredit:
    """The next stage of a measured credit."""
    return ModulatedCredit(
        **_fields_of(credit), alpha_U=alpha_U, modulated_advantage_U=modulated_advantage_U, metrics=metrics
    )


def _fields_of(credit: AssignedCredit) -> dict[str, Any]:
    return {f.name: getattr(credit, f.name) for f in fields(credit)}


def _ids(ranges: Sequence[range], chosen: Sequence[int]) -> Tensor:
    return torch.tensor([u for i in chosen if i >= 0 for u in ranges[i]], dtype=torch.long)


def is_masked(trajectory: Trajectory, mask_truncated: bool) -> bool:
    """Whether a trajectory is not trained, because it was truncated."""
    return mask_truncated and trajectory.ended in TRUNCATED_ENDINGS


def counted_return(trajectory: Trajectory, mask_truncated: bool) -> float:
    """The return that enters the group's mean: 0 for a masked trajectory."""
    return 0.0 if is_masked(trajectory, mask_truncated) else trajectory.ret


def assign_credit(
    played: Sequence[Trajectory],
    history: str,
    rules: CreditRules,
    dropped: Sequence[Trajectory] = (),
    unit: Unit = "response",
) -> AssignedCredit:
    """Compare every response with its group. A trajectory whose environment crashed counts nowhere.

    Args:
        dropped: also played, and left out of this step.
        unit: what gets a coefficient.
    """
    counted = [t for t in played if t.ended != Ending.CRASHED and t.responses]
    batch = _build_step_batch(counted, rules)
    advantage_R = estimate_advantages(rules.estimator, batch)
    masked = [is_masked(t, rules.mask_truncated) for t in counted]
    trained_M = ~torch.tensor(masked, dtype=torch.bool)
    kept = [t for t, out in zip(counted, masked, strict=True) if not out]
    rows = build_rows(kept, history)
    tokens_R = [len(r.sample.ids) for t in kept for r in t.responses]
    response_R = torch.arange(len(tokens_R))
    response_ids_N = _ranges([len(row.turns) for row in rows])
    per_token = unit == "token"
    return AssignedCredit(
        played=[*played, *dropped],
        dropped=list(dropped),
        filtered=[t for t, out in zip(counted, masked, strict=True) if out],
        kept=kept,
        rows=rows,
        response_ids_N=response_ids_N,
        unit_ids_N=_ranges([sum(row.mask) for row in rows]) if per_token else response_ids_N,
        group_M=batch.group_M[trained_M],
        trajectory_R=torch.tensor([m for m, t in enumerate(kept) for _ in t.responses], dtype=torch.long),
        advantage_R=advantage_R[trained_M[batch.trajectory_R]].float(),
        response_U=response_R.repeat_interleave(torch.tensor(tokens_R, dtype=torch.long)) if per_token else response_R,
    )


def _build_step_batch(counted: Sequence[Trajectory], rules: CreditRules) -> StepBatch:
    """What the estimator gets, in float64: rounded to float32, equal returns could differ."""
    group = {draw: i for i, draw in enumerate(dict.fromkeys(t.draw for t in counted))}
    turns = [(m, t, r) for m, t in enumerate(counted) for r in t.responses]
    states: dict[tuple[int, str], int] = {}
    masked = [is_masked(t, rules.mask_truncated) for t in counted]
    return StepBatch(
        return_M=torch.tensor([counted_return(t, rules.mask_truncated) for t in counted], dtype=torch.float64),
        group_M=torch.tensor([group[t.draw] for t in counted], dtype=torch.long),
        trajectory_R=torch.tensor([m for m, *_ in turns], dtype=torch.long),
        reward_R=torch.tensor([0.0 if masked[m] else r.reward for m, _, r in turns], dtype=torch.float64),
        penalty_R=torch.tensor(
            [0.0 if r.valid or masked[m] else rules.penalty for m, _, r in turns], dtype=torch.float64
        ),
        state_R=torch.tensor(
            [states.setdefault((t.draw, r.observation), len(states)) for _, t, r in turns], dtype=torch.long
        ),
    )


def _ranges(sizes: Sequence[int]) -> list[range]:
    return [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]


def estimate_advantages(estimator: Estimator, batch: StepBatch) -> Tensor:
    """Call an estimator, which may be the user's, and check that it returns one finite advantage per response.

    Raises:
        RunError: it fails, or returns something else; with the file and the line.
    """
    try:
        advantage_R: Any = estimator(batch)
    except Exception as error:
        raise RunError(
            f"{_estimator_name(estimator)} failed: {user_code.format_error(error)} ({user_code.error_location(error, estimator)})"
        ) from error
    responses, where = len(batch.trajectory_R), f"({user_code.definition_location(estimator)})"
    if not isinstance(advantage_R, Tensor):
        kind = type(advantage_R).__name__
        raise RunError(
            f"{_estimator_name(estimator)} must return a tensor of one advantage per response, not {kind} {where}"
        )
    if advantage_R.shape != (responses,):
        shape = tuple(advantage_R.shape)
        mismatch = f"returned advantages of shape {shape} for {responses} responses: one each"
        raise RunError(f"{_estimator_name(estimator)} {mismatch} {where}")
    if advantage_R.is_complex():
        raise RunError(
            f"{_estimator_name(estimator)} must return real numbers, not {str(advantage_R.dtype).removeprefix('torch.')} {where}"
        )
    if not advantage_R.isfinite().all():
        nonfinite = int((~advantage_R.isfinite()).sum())
        raise RunError(
            f"{_estimator_name(estimator)} returned {nonfinite} of {responses} advantages that are not finite {where}",
            "nan",
        )
    return advantage_R


def _estimator_name(estimator: Estimator) -> str:
    function = getattr(estimator, "func", estimator)
    return f"{function.__module__}.{getattr(function, '__name__', function)}"
