"""Statistics over batches: each arm, its difference from the first arm in the same batch, and its agreement with the theory."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from aem_exp.core.disk import nonfinite_to_none

# Changes at the fixed states, and (own_) at the first turns of the batch.
MEASURES = (
    *("predicted", "own_entropy", "entropy", "own_kl", "kl", "own_token_entropy", "token_entropy", "norm", "grad_norm"),
    *("own_entropy_per_root_kl", "entropy_per_root_kl", "own_entropy_per_norm", "entropy_per_norm"),
)
Rows = Sequence[Mapping[str, Any]]  # recorded batches


def build_result(rows: Rows, arms: Sequence[str], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Build the content of `result.json`. The first arm is the reference."""
    values = {arm: _collect(rows, arm) for arm in arms}
    reference = values[arms[0]]
    shares = [
        row["arms"][arm][f"{kind}effective_share"] for row in rows for arm in arms for kind in ("", "own_")
        if f"{kind}effective_share" in row["arms"][arm]
    ]  # fmt: skip
    result = {
        "batches": len(rows),
        "reference": arms[0],
        "arms": {arm: _describe(values[arm], None if arm == arms[0] else reference) for arm in arms},
        "smallest_effective_share": min(shares, default=math.nan),
        "identity": identity,
    }
    return dict(nonfinite_to_none(result))


def differences(rows: Rows, arms: Sequence[str], name: str) -> dict[str, list[tuple[float, float]]]:
    """Arm -> (predicted, observed) difference from the first arm in each batch."""
    values = {arm: _collect(rows, arm) for arm in arms}
    out = {}
    for arm in arms[1:]:
        pairs = zip(
            _minus(values[arm], values[arms[0]], "predicted"), _minus(values[arm], values[arms[0]], name), strict=True
        )
        out[arm] = [pair for pair in pairs if all(map(math.isfinite, pair))]
    return out


def _collect(rows: Rows, arm: str) -> dict[str, list[float]]:
    """The values of an arm in each batch, by measure; NaN where a measure does not exist."""
    out = {name: [float(row["arms"][arm].get(name, math.nan)) for row in rows] for name in MEASURES[:9]}
    for kind in ("own_", ""):
        out[f"{kind}entropy_per_root_kl"] = [
            e / kl**0.5 if kl > 0 else math.nan for e, kl in zip(out[f"{kind}entropy"], out[f"{kind}kl"], strict=True)
        ]
        out[f"{kind}entropy_per_norm"] = [
            e / norm if norm > 0 else math.nan for e, norm in zip(out[f"{kind}entropy"], out["norm"], strict=True)
        ]
    return out


def _minus(one: Mapping[str, list[float]], other: Mapping[str, list[float]], name: str) -> list[float]:
    return [a - b for a, b in zip(one[name], other[name], strict=True)]


def _describe(values: Mapping[str, list[float]], reference: Mapping[str, list[float]] | None) -> dict[str, Any]:
    """Means of an arm with their intervals, and its differences from the reference."""
    out: dict[str, Any] = {name: _estimate(values[name]) for name in MEASURES}
    compared = values
    if reference is not None:
        compared = {name: _minus(values, reference, name) for name in MEASURES}
        out["difference"] = {name: _estimate(compared[name]) for name in MEASURES}
    out["agreement"] = {name: _agreement(compared["predicted"], compared[name]) for name in ("own_entropy", "entropy")}
    return out


def _estimate(values: Sequence[float]) -> dict[str, float]:
    """Mean over batches with its 95 % t interval; batches without a value are left out."""
    from aem_exp.stats import compare  # imports scipy

    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return {"mean": math.nan, "low": math.nan, "high": math.nan}
    interval = compare.paired_interval(finite, [0.0] * len(finite))
    return {"mean": float(interval.difference), "low": float(interval.low), "high": float(interval.high)}


def _agreement(predicted: Sequence[float], observed: Sequence[float]) -> dict[str, float | int]:
    """In how many batches prediction and observation have the same sign, and their correlation over batches."""
    import numpy as np

    pairs = [pair for pair in zip(predicted, observed, strict=True) if all(map(math.isfinite, pair))]
    signs = [p * o > 0 for p, o in pairs if p * o != 0]
    x, y = np.array(pairs, float).reshape(-1, 2).T
    varies = len(pairs) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
    return {"batches": len(signs), "agree": sum(signs), "r": float(np.corrcoef(x, y)[0, 1]) if varies else math.nan}
