"""The credit of one step, in three immutable stages: assigned, measured, modulated.

- `AssignedCredit`: each response has an advantage A, from a comparison with its group.
- `MeasuredCredit`: adds the mean token entropy and the mean surprisal of each response.
- `ModulatedCredit`: adds the coefficient alpha and the final advantage alpha * A of each unit (`modulation.modulate_credit`).

A step without modulation stops at the second stage. Each rank has the credit of all rows.

Shapes: M trained trajectories, R responses, N rows, K generated tokens, all ordered by trajectory, then by turn. U units: the
responses, or their generated tokens; a unit is what gets a coefficient.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
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
# Endings of truncated episodes: a limit ended them, not the rules of the environment.
TRUNCATED_ENDINGS = (Ending.CONTEXT, Ending.TURNS, Ending.STOPPED)


@dataclass(frozen=True)
class CreditRules:
    """How advantages are computed."""

    estimator: Estimator
    """a function of `advantages`, or of the user"""
    penalty: float = 0.0
    """subtracted from the score of an invalid turn, but not from the return of the episode"""
    mask_truncated: bool = False
    """do not train truncated trajectories; they count in the mean of their group with return 0 (compact filtering)"""


@dataclass(frozen=True)
class AssignedCredit:
    """The trajectories of a step, and the advantage of each trained response."""

    played: list[Trajectory]
    """all trajectories of the step, crashed ones included"""
    dropped: list[Trajectory]
    """trajectories of groups that dynamic sampling removed from the step"""
    filtered: list[Trajectory]
    """truncated trajectories that are not trained, but count in the mean of their group"""
    kept: list[Trajectory]
    """the M trained trajectories"""
    rows: list[Row]
    """the N rows of the trained trajectories"""
    response_ids_N: list[range]
    """ids of the responses in each row"""
    unit_ids_N: list[range]
    """ids of the units in each row"""
    group_M: Tensor
    """(M,) int64: group id of each trajectory"""
    trajectory_R: Tensor
    """(R,) int64: index of the trajectory of each response"""
    advantage_R: Tensor
    """(R,) float32: advantage of each response, before modulation"""
    response_U: Tensor
    """(U,) int64: index of the response of each unit"""

    def __post_init__(self) -> None:
        assert len(self.response_ids_N) == len(self.unit_ids_N) == len(self.rows)
        assert self.group_M.shape == (len(self.kept),)
        assert self.trajectory_R.ndim == self.response_U.ndim == 1
        assert self.advantage_R.shape == self.trajectory_R.shape

    @property
    def group_R(self) -> Tensor:
        """Group id of each response."""
        return self.group_M[self.trajectory_R]

    @property
    def trajectory_U(self) -> Tensor:
        """Index of the trajectory of each unit."""
        return self.trajectory_R[self.response_U]

    @property
    def advantage_U(self) -> Tensor:
        """Advantage of each unit before modulation: that of its response."""
        return self.advantage_R[self.response_U]

    @property
    def final_advantage_U(self) -> Tensor:
        """Advantage of each unit in the loss."""
        return self.advantage_U

    @property
    def in_loss_K(self) -> Tensor:
        """(K,) bool: whether a token is in the loss."""
        return torch.ones(len(self.response_K), dtype=torch.bool)

    @cached_property
    def turn_R(self) -> Tensor:
        """(R,) int64: index of the turn of each response in its trajectory."""
        return torch.tensor([turn for _, turn, _ in self.list_responses()], dtype=torch.long)

    @cached_property
    def tokens_R(self) -> Tensor:
        """(R,) int64: number of tokens of each response."""
        return torch.tensor([len(r.sample.ids) for *_, r in self.list_responses()], dtype=torch.long)

    @cached_property
    def state_R(self) -> Tensor:
        """(R,) int64: id of the state of each response, which is its draw and its observation."""
        return number_labels([(self.kept[m].draw, r.observation) for m, _, r in self.list_responses()])

    @cached_property
    def response_K(self) -> Tensor:
        """(K,) int64: index of the response of each generated token."""
        return torch.arange(len(self.tokens_R)).repeat_interleave(self.tokens_R)

    @property
    def unit_K(self) -> Tensor:
        """(K,) int64: index of the unit of each generated token."""
        units_are_tokens = len(self.response_U) > len(self.tokens_R)
        return torch.arange(len(self.response_K)) if units_are_tokens else self.response_K

    @property
    def task_type_R(self) -> Tensor:
        """(R,) int64: id of the type of the task of each response."""
        return number_labels([self.kept[m].task.kind for m, *_ in self.list_responses()])

    @property
    def token_ids_N(self) -> list[range]:
        """Ids of the generated tokens in each row."""
        return _ranges([sum(row.mask) for row in self.rows])

    def response_ids(self, chosen: Sequence[int]) -> Tensor:
        """Ids of the responses in the chosen rows. A negative index is a padding row, which has none."""
        return select_ids(self.response_ids_N, chosen)

    def unit_ids(self, chosen: Sequence[int]) -> Tensor:
        """Ids of the units in the chosen rows. A negative index is a padding row, which has none."""
        return select_ids(self.unit_ids_N, chosen)

    def list_responses(self) -> list[tuple[int, int, Response]]:
        """(trajectory index, turn index, response) of each response, in the order of R."""
        return [(m, k, r) for m, t in enumerate(self.kept) for k, r in enumerate(t.responses)]


@dataclass(frozen=True)
class MeasuredCredit(AssignedCredit):
    """Adds the measurements of all ranks."""

    entropy_R: Tensor
    """(R,) float32: mean token entropy Hbar of each response under the old policy, in nats"""
    surprisal_R: Tensor
    """(R,) float32: mean surprisal -log p over the tokens of each response under the old policy, in nats"""
    token_signal_K: Tensor | None = None
    """(K,) float32: entropy or surprisal of each generated token in nats, ordered by response; None if no variant needs it"""
    score_norm_R: Tensor | None = None
    """(R,) float32: mean norm of the gradient of log p with respect to the logits, over the tokens of each response; None if the
    modulation does not need it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.entropy_R.shape == self.surprisal_R.shape == self.advantage_R.shape

    @property
    def token_signal(self) -> Tensor:
        """(K,): `token_signal_K`, which must have been measured."""
        assert self.token_signal_K is not None
        return self.token_signal_K


@dataclass(frozen=True, kw_only=True)
class ModulatedCredit(MeasuredCredit):
    """Adds the coefficients of the modulation."""

    alpha_U: Tensor
    """(U,) float32: coefficient alpha of each unit; its mean over each scope is 1 (before units are selected)"""
    modulated_advantage_U: Tensor
    """(U,) float32: advantage of each unit after modulation; alpha * A for the paper"""
    trained_U: Tensor
    """(U,) bool: whether the tokens of a unit are in the loss; all are, unless `modulation.keep_by` masks units"""
    metrics: dict[str, float]
    """statistics that only the modulation knows; see `modulation.modulate_credit`"""

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes = {self.alpha_U.shape, self.modulated_advantage_U.shape, self.trained_U.shape, self.response_U.shape}
        assert len(shapes) == 1, shapes

    @property
    def alpha_R(self) -> Tensor:
        """(R,): coefficient of each response, the mean over its units."""
        return self._mean_over_units(self.alpha_U)

    @property
    def final_advantage_U(self) -> Tensor:
        return self.modulated_advantage_U

    @property
    def in_loss_K(self) -> Tensor:
        return self.trained_U[self.unit_K]

    @property
    def final_advantage_R(self) -> Tensor:
        """(R,): advantage of each response after modulation, the mean over its units."""
        return self._mean_over_units(self.modulated_advantage_U)

    def _mean_over_units(self, value_U: Tensor) -> Tensor:
        sums_R = torch.zeros_like(self.entropy_R).index_add_(0, self.response_U, value_U)
        return sums_R / torch.bincount(self.response_U, minlength=len(sums_R)).clamp(min=1)


def add_measurements(
    credit: AssignedCredit,
    entropy_R: Tensor,
    surprisal_R: Tensor,
    token_signal_K: Tensor | None = None,
    score_norm_R: Tensor | None = None,
) -> MeasuredCredit:
    """Create the second stage of a credit."""
    return MeasuredCredit(
        **_fields_of(credit),
        entropy_R=entropy_R,
        surprisal_R=surprisal_R,
        token_signal_K=token_signal_K,
        score_norm_R=score_norm_R,
    )


def add_modulation(
    credit: MeasuredCredit,
    *,
    alpha_U: Tensor,
    modulated_advantage_U: Tensor,
    trained_U: Tensor,
    metrics: dict[str, float],
) -> ModulatedCredit:
    """Create the third stage of a credit."""
    return ModulatedCredit(
        **_fields_of(credit),
        alpha_U=alpha_U,
        modulated_advantage_U=modulated_advantage_U,
        trained_U=trained_U,
        metrics=metrics,
    )


def number_labels(labels: Sequence[Hashable]) -> Tensor:
    """Number labels in the order of their first occurrence: one int64 id per label, equal for equal labels."""
    ids: dict[Hashable, int] = {}
    return torch.tensor([ids.setdefault(label, len(ids)) for label in labels], dtype=torch.long)


def _fields_of(credit: AssignedCredit) -> dict[str, Any]:
    return {f.name: getattr(credit, f.name) for f in fields(credit)}


def select_ids(ranges: Sequence[range], chosen: Sequence[int]) -> Tensor:
    """Ids in the chosen rows, from the ids of each row. A negative index is a padding row, which has none."""
    return torch.tensor([u for i in chosen if i >= 0 for u in ranges[i]], dtype=torch.long)


def is_masked(trajectory: Trajectory, mask_truncated: bool) -> bool:
    """Whether a trajectory is excluded from training because it was truncated."""
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
    """Compute the advantage of each response from a comparison with its group.

    Trajectories that crashed, or have no response, are neither trained nor counted in the statistics of their group.

    Args:
        played: the trajectories of the groups that the step trains on.
        history: "full" or "window"; see `rollout.rows.build_rows`.
        dropped: trajectories of groups that dynamic sampling removed.
        unit: what gets a coefficient: "response" or "token".
    """
    counted = [t for t in played if t.ended != Ending.CRASHED and t.responses]
    batch = _build_step_batch(counted, rules)
    advantage_R = estimate_advantages(rules.estimator, batch)
    masked = [is_masked(t, rules.mask_truncated) for t in counted]
    trained_M = ~torch.tensor(masked, dtype=torch.bool)
    kept = [t for t, is_out in zip(counted, masked, strict=True) if not is_out]
    rows = build_rows(kept, history)
    tokens_R = [len(r.sample.ids) for t in kept for r in t.responses]
    response_R = torch.arange(len(tokens_R))
    response_ids_N = _ranges([len(row.turns) for row in rows])
    per_token = unit == "token"
    return AssignedCredit(
        played=[*played, *dropped],
        dropped=list(dropped),
        filtered=[t for t, is_out in zip(counted, masked, strict=True) if is_out],
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
    """Build the input of the estimator. It is in float64: rounding to float32 could make equal returns differ."""
    group = {draw: i for i, draw in enumerate(dict.fromkeys(t.draw for t in counted))}
    turns = [(m, t, r) for m, t in enumerate(counted) for r in t.responses]
    masked = [is_masked(t, rules.mask_truncated) for t in counted]
    return StepBatch(
        return_M=torch.tensor([counted_return(t, rules.mask_truncated) for t in counted], dtype=torch.float64),
        group_M=torch.tensor([group[t.draw] for t in counted], dtype=torch.long),
        trajectory_R=torch.tensor([m for m, *_ in turns], dtype=torch.long),
        reward_R=torch.tensor([0.0 if masked[m] else r.reward for m, _, r in turns], dtype=torch.float64),
        penalty_R=torch.tensor(
            [0.0 if r.valid or masked[m] else rules.penalty for m, _, r in turns], dtype=torch.float64
        ),
        state_R=number_labels([(t.draw, r.observation) for _, t, r in turns]),
    )


def _ranges(sizes: Sequence[int]) -> list[range]:
    return [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]


def estimate_advantages(estimator: Estimator, batch: StepBatch) -> Tensor:
    """Call an estimator, possibly the user's, and check that it returns one finite advantage per response.

    Returns:
        (R,) advantages, in the dtype of the estimator.

    Raises:
        RunError: the estimator fails, or returns something else. The message names its file and line.
    """
    name = _estimator_name(estimator)
    try:
        advantage_R: Any = estimator(batch)
    except Exception as error:
        location = user_code.error_location(error, estimator)
        raise RunError(f"{name} failed: {user_code.format_error(error)} ({location})") from error
    responses, location = len(batch.trajectory_R), user_code.definition_location(estimator)
    if not isinstance(advantage_R, Tensor):
        kind = type(advantage_R).__name__
        raise RunError(f"{name} must return a tensor of one advantage per response, not {kind} ({location})")
    if advantage_R.shape != (responses,):
        mismatch = f"returned advantages of shape {tuple(advantage_R.shape)} for {responses} responses"
        raise RunError(f"{name} {mismatch}; it must return one per response ({location})")
    if advantage_R.is_complex():
        dtype = str(advantage_R.dtype).removeprefix("torch.")
        raise RunError(f"{name} must return real numbers, not {dtype} ({location})")
    if not advantage_R.isfinite().all():
        nonfinite = int((~advantage_R.isfinite()).sum())
        problem = f"returned {nonfinite} of {responses} advantages that are not finite"
        raise RunError(f"{name} {problem} ({location})", "nan")
    return advantage_R


def _estimator_name(estimator: Estimator) -> str:
    function = getattr(estimator, "func", estimator)
    return f"{function.__module__}.{getattr(function, '__name__', function)}"
