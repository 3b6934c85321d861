"""A copy of the trained weights and of the optimizer, with which an update is undone, measured or scaled."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch import Tensor

LOWEST, HIGHEST = 0.1, 10.0  # bounds of the factor of a change of the weights
TOLERANCE: Final = 0.01  # largest relative difference between the KL divergence and its target
TRIALS: Final = 6  # maximum number of factors that are tried in an update


class Snapshot:
    """The trained weights of a model and the state of its optimizer, at one moment."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._weights = [p.detach().clone() for p in self._parameters]
        self._optimizer = optimizer
        self._groups = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._state = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}

    def restore(self) -> None:
        """Restore weights and optimizer exactly. State that the optimizer has added since then is removed."""
        self.scale(self._weights, 1.0)
        for group, saved in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(copy.deepcopy(saved))
        self._optimizer.state.clear()
        self._optimizer.state.update({p: copy.deepcopy(state) for p, state in self._state.items()})

    @torch.no_grad()
    def distance(self) -> float:
        """Euclidean norm of the change of the weights since then."""
        return norm(p.double() - w.double() for p, w in zip(self._parameters, self._weights, strict=True))

    def current_weights(self) -> list[Tensor]:
        """A copy of the present weights."""
        return [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def scale(self, end: list[Tensor], factor: float) -> None:
        """Set the weights to those of the snapshot plus `factor` times the change to `end`."""
        for parameter, weight, last in zip(self._parameters, self._weights, end, strict=True):
            parameter.copy_(last if factor == 1 else weight + factor * (last - weight))

    def scale_to_kl(
        self, measure_kl: Callable[[], float], target: float, lowest: float = LOWEST, highest: float = HIGHEST
    ) -> float:
        """Scale the change of the weights until its KL divergence is `target`, up to `TOLERANCE`.

        Args:
            measure_kl: measures the KL divergence between the policy of the snapshot and that of the current weights.
            lowest: smallest factor.
            highest: largest factor.

        Returns:
            The factor.
        """
        end = self.current_weights()

        def kl_with(factor: float) -> float:
            self.scale(end, factor)
            return measure_kl()

        factor = find_factor(kl_with, measure_kl(), target, lowest, highest)
        self.scale(end, factor)
        return factor


def find_factor(
    kl_with: Callable[[float], float], kl: float, target: float, lowest: float = LOWEST, highest: float = HIGHEST
) -> float:
    """Find the factor of a change of the weights with which its KL divergence is `target`, by the secant method.

    The search is for the root of the KL divergence, which is about linear in the factor.

    Args:
        kl_with: factor -> KL divergence.
        kl: the KL divergence with factor 1.
        target: the KL divergence to reach, up to `TOLERANCE`.
        lowest: smallest factor.
        highest: largest factor.

    Returns:
        The best factor that was tried.
    """
    points = [(0.0, 0.0), (1.0, math.sqrt(max(kl, 0.0)))]
    errors = {1.0: abs(kl - target)}
    while len(errors) <= TRIALS and min(errors.values()) > TOLERANCE * target:
        (x, y), (x_last, y_last) = points[-2:]
        slope = (y_last - y) / (x_last - x)
        factor = bound(x_last + (math.sqrt(max(target, 0.0)) - y_last) / slope, lowest, highest) if slope > 0 else 1.0
        if factor in errors:
            break
        reached = kl_with(factor)
        errors[factor] = abs(reached - target)
        points.append((factor, math.sqrt(max(reached, 0.0))))
    return min(errors, key=errors.__getitem__)


def norm(tensors: Iterable[Tensor | None]) -> float:
    """Norm of all elements, summed in float64."""
    squares = [each.double().square().sum() for each in tensors if each is not None]
    return math.sqrt(sum(square.item() for square in squares))


def bound(factor: float, lowest: float = LOWEST, highest: float = HIGHEST) -> float:
    """The factor, between its bounds."""
    return min(max(factor, lowest), highest)
