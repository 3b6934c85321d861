"""Matched controls: sizes equal those of the modulation, directions those of the baseline, and trials leave no trace."""

from dataclasses import replace

import pytest
import torch
from support import toy

from aem_exp import config
from aem_exp.config import ConfigError, rules
from aem_exp.training import size_match
from aem_exp.training.modulation import ModulationVariant

MATCHES = ("gradient_norm", "update_norm", "kl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


def train(folder, match=None, lam=1.0, steps=2, **settings):
    """The metrics of the steps, the weights before each update and after the last one, and the sizes of the updates."""
    rows, weights, sizes = [], [], []
    run = toy.experiment("full", steps=steps, mini_batch=8, **settings)
    trainer = toy.trainer(folder, run, lam=lam, variant=ModulationVariant(match=match))
    trainer.aem_callback.report = lambda step, row: rows.append(row)
    match_of = trainer.size_match
    backward, clean_norm = trainer.training_step, trainer._get_grad_norm

    def training_step(*args):
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        return backward(*args)

    def gradient_norm(*args, **keywords):
        norm = clean_norm(*args, **keywords)
        sizes.append((float(norm), match_of._target if match_of else 0.0))
        return norm

    trainer.training_step, trainer._get_grad_norm = training_step, gradient_norm
    trainer.train()
    weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    return rows, weights, sizes


def change(before, after):
    return torch.cat([(after[name] - before[name]).flatten() for name in before])


@pytest.mark.slow
@pytest.mark.parametrize("match", MATCHES)
def test_lambda_zero_equals_no_modulation_bit_for_bit(folder, match):
    plain, matched = train(folder, None, lam=None), train(folder, match, lam=0.0)
    for one, other in zip(plain[1], matched[1], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert all(row["aem/match_factor"] == 1 and row["aem/match_error"] == 0 for row in matched[0])
    kept = [{key: row[key] for key in row if key.startswith("train/")} for row in matched[0]]
    assert kept == [{key: row[key] for key in row if key.startswith("train/")} for row in plain[0]]


@pytest.mark.slow
@pytest.mark.parametrize("match", MATCHES)
def test_first_update_has_the_size_of_aem_and_the_direction_of_the_baseline(folder, match):
    """SGD: the change of the weights is proportional to the gradient, in the direction of the baseline."""
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "steps": 1}
    plain, aem, twin = (train(folder, *case, **settings) for case in ((None, None), (None, 1.0), (match, 1.0)))
    one, other, own = (change(*run[1][:2]) for run in (plain, aem, twin))
    assert abs(one.norm() / other.norm() - 1) > 0.01, "the two sizes must differ, or the test shows nothing"
    assert torch.cosine_similarity(one, own, dim=0).item() == pytest.approx(1, abs=1e-5)
    assert torch.cosine_similarity(other, own, dim=0).item() < 0.999
    if match == "gradient_norm":
        assert twin[2][0][0] == pytest.approx(aem[2][0][0], rel=1e-5)
    if match != "kl":
        assert own.norm().item() == pytest.approx(other.norm().item(), rel=1e-4)
    assert twin[0][0]["aem/match_error"] <= (0.01 if match == "kl" else 1e-4)
    assert {"aem/alpha_q50", "drift/aem"}.isdisjoint(twin[0][0])  # no coefficient is applied


@pytest.mark.slow
@pytest.mark.parametrize("optim", rules.MATCHED_OPTIMIZERS)
def test_each_update_has_the_size_of_its_trial(folder, optim, monkeypatch):
    """The norm of the change of the weights, measured from outside; the gradients are clipped."""
    targets, pre = [], size_match.SizeMatch.on_pre_optimizer_step

    def record(self, *args, **keywords):
        pre(self, *args, **keywords)
        targets.append(self._target)

    monkeypatch.setattr(size_match.SizeMatch, "on_pre_optimizer_step", record)
    rows, weights, _ = train(folder, "update_norm", optim=optim, max_grad_norm=0.1)
    assert len(targets) == 4 and min(targets) > 0
    for i, target in enumerate(targets):
        assert change(weights[i], weights[i + 1]).norm().item() == pytest.approx(target, rel=1e-3)
    assert all(row["aem/match_factor"] != 1 for row in rows)


@pytest.mark.slow
def test_each_step_has_the_kl_divergence_of_its_trial(folder):
    """One update per step: the KL divergence of the step is that of the update."""
    targets = []
    run = toy.experiment("full", steps=3)
    trainer = toy.trainer(folder, run, lam=2.0, variant=ModulationVariant(match="kl"))
    rescale = trainer.size_match._rescale

    def record(start):
        targets.append(trainer.size_match._target)
        rescale(start)

    rows, trainer.size_match._rescale = [], record
    trainer.aem_callback.report = lambda step, row: rows.append(row)
    trainer.train()
    for row, target in zip(rows, targets, strict=True):
        assert row["train/step_kl"] == pytest.approx(target, rel=0.011) and target > 1e-5
        assert row["aem/match_error"] <= 0.01


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["trainer.optim=paged_adamw_8bit"], "trainer.optim=adamw_torch"),
        (["model.dtype=bfloat16"], "model.dtype=float32"),
        (["launch=slurm_cpu", "launch.nodes=2", "launch.trainer.fsdp=true"], "launch.trainer.fsdp=false"),
    ],
)
def test_what_cannot_be_matched_is_refused(words, remedy):
    with pytest.raises(ConfigError) as refused:
        config.load(["modulation=matched_kl", *words])
    assert refused.value.field == "modulation.match" and remedy in str(refused.value)


def test_any_optimizer_and_dtype_can_match_the_gradient_norm():
    config.load(["modulation=matched_gradient", "trainer.optim=paged_adamw_8bit", "model.dtype=bfloat16"])


def test_match_needs_a_modulation():
    with pytest.raises(ConfigError, match=r"modulation\.lam"):
        config.load(["modulation=none", "modulation.match=kl"])
    aem, twin = config.load(["modulation=aem"]), config.load(["modulation=matched_kl"])
    assert replace(twin.modulation, name="aem", match=None) == aem.modulation
