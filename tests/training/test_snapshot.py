"""Laws of a snapshot: it undoes an update exactly, and scales it."""

import math

import pytest
import torch

from aem_exp.training.snapshot import HIGHEST, LOWEST, Snapshot, find_factor


def test_trial_of_an_optimizer_leaves_no_trace():
    """A linear model: two steps with a trial before each equal two steps without trials, bit for bit."""
    for make in (torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.Adafactor):
        models = [torch.nn.Linear(3, 2) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        optimizers = [make(model.parameters()) for model in models]
        for step in range(2):
            for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                if i == 0:
                    start = Snapshot(model, optimizer)
                    for parameter in model.parameters():
                        parameter.grad = torch.full_like(parameter, 5.0)
                    optimizer.step()
                    start.restore()
                for n, parameter in enumerate(model.parameters()):
                    parameter.grad = torch.full_like(parameter, 1.0 + n + step)
                optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
        states = [optimizer.state_dict()["state"] for optimizer in optimizers]
        assert states[0].keys() == states[1].keys()
        for key, values in states[0].items():
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][key][k]))
                for k, v in values.items()
                if v is not None
            )


def test_factor_by_hand():
    """KL = (c / 2)^2 + c^3 / 10: at c = 1 it is 0.35. The target 0.1 is reached at c = 0.5537 (Cardano)."""
    tried = []

    def kl(c):
        tried.append(c)
        return c**2 / 4 + c**3 / 10

    factor = find_factor(kl, 0.35, 0.1)
    assert kl(factor) == pytest.approx(0.1, rel=0.01) and len(tried) <= 4
    assert tried[0] == pytest.approx(math.sqrt(0.1 / 0.35))
    assert find_factor(kl, 0.35, 0.35) == 1.0
    assert find_factor(lambda c: c**2, 1.0, 1e6) == HIGHEST
    assert find_factor(lambda c: c**2, 1.0, 0.0) == LOWEST
    assert find_factor(lambda c: 0.0, 0.0, 1.0) == 1.0


def test_distance_and_scale_by_hand():
    """The weights change by (3, 4): the norm is 5, and half of the change is (1.5, 2)."""
    model = torch.nn.Linear(2, 1, bias=False)
    start = Snapshot(model, torch.optim.SGD(model.parameters(), lr=0.1))
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += torch.tensor([[3.0, 4.0]])
    assert start.distance() == pytest.approx(5.0)
    factor = start.scale_to_kl(lambda: start.distance() ** 2, 25 / 4)
    assert factor == pytest.approx(0.5) and torch.allclose(model.weight, first + torch.tensor([[1.5, 2.0]]))
    start.restore()
    assert torch.equal(model.weight, first)
