"""The declared contrasts of a sweep: weighted sums of cells, which answer its question in one number.

The first contrast is the primary hypothesis. Everything else that a report compares is exploratory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import TYPE_CHECKING, Any

from aem_exp.core.errors import ConfigError

if TYPE_CHECKING:
    from aem_exp.sweep.cells import Label


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of the mean scores of cells. The weights sum to 0."""

    name: str
    weights: Mapping[str, float]
    """Weight of each cell, by the short name of its arm and point."""


def parse_contrasts(at: str, declared: Mapping[str, Any], labels: Sequence["Label"]) -> tuple[Contrast, ...]:
    """Parse the `contrasts:` of a sweep file. The weight of an arm is divided equally among its points.

    Raises:
        ConfigError: a name is no arm and no cell, a weight is not a number, or the weights do not sum to 0.
    """
    return tuple(
        Contrast(name, _parse_weights(f"{at}.contrasts.{name}", value, labels)) for name, value in declared.items()
    )


def _parse_weights(at: str, value: Any, labels: Sequence["Label"]) -> dict[str, float]:
    groups = [label.group for label in labels]
    by_arm: dict[str, list[str]] = {}
    for label in labels:
        by_arm.setdefault(label.arm, []).append(label.group)
    if not isinstance(value, dict) or not value:
        raise ConfigError(at, value, "must be weights of arms or cells, such as {aem: 1, none: -1}")
    weights: dict[str, float] = {}
    for name, weight in value.items():
        if not isinstance(weight, int | float) or isinstance(weight, bool):
            raise ConfigError(f"{at}.{name}", weight, "must be a number")
        if name not in by_arm and name not in groups:
            raise ConfigError(at, name, list(dict.fromkeys([*by_arm, *groups])))
        members = by_arm.get(name, [name])
        for group in members:
            weights[group] = weights.get(group, 0.0) + weight / len(members)
    if not isclose(sum(weights.values()), 0.0, abs_tol=1e-9):
        raise ConfigError(at, f"a sum of {sum(weights.values()):g}", "the weights must sum to 0")
    return weights
