"""The sizes of a step: worked numbers, a direct computation, and that measuring changes nothing."""

import json
import math
import shutil

import pytest
import torch
from support import toy

from aem_exp.core import disk
from aem_exp.envs import Task
from aem_exp.rollout.sampling.base import Sample
from aem_exp.rollout.types import Ending, Response, Trajectory
from aem_exp.rundir import FIXED_STATES
from aem_exp.training import step_size
from aem_exp.training.fixed_states import FixedContext, choose_contexts, kl_divergence, load_contexts
from aem_exp.training.modulation import ModulationVariant
from aem_exp.training.step_size import StepSizeMeter, WeightSample

SIZES = ("train/grad_norm_mean", "train/weight_change", "train/step_kl", "train/effective_learning_rate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


# Worked numbers.


def test_change_of_the_weights_of_a_linear_model():
    """The weights change by 3 and 4, the bias is frozen: the norm is 5."""
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    sample = WeightSample(model)
    with torch.no_grad():
        model.weight += torch.tensor([[3.0, -4.0]])
        model.bias += 100
    assert sample.squared_distance().sqrt().item() == pytest.approx(5.0, rel=1e-6)


def test_change_of_a_large_tensor_is_estimated_from_all_its_columns(monkeypatch):
    """64 elements, 16 of them sampled. Every column of 8 changes by another amount; without a tie to columns the estimate is
    exact here, because the sampled elements visit each column equally often."""
    monkeypatch.setattr(step_size, "SAMPLED_ELEMENTS", 16)
    model = torch.nn.Linear(8, 24, bias=False)
    sample = WeightSample(model)
    (values,) = sample._values
    assert len(values) == math.ceil(192 / 13)  # 12 shares divisors with 8, 13 does not
    with torch.no_grad():
        model.weight += 0.5
    assert sample.squared_distance().item() == pytest.approx(192 * 0.25, rel=1e-5)
    columns = {13 * i % 8 for i in range(15)}
    assert columns == set(range(8))


def test_kl_divergence_by_hand():
    before = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()
    after = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2)]
    assert kl_divergence(before, after).tolist() == pytest.approx(expected)
    assert kl_divergence(before, before).tolist() == [0, 0]


def trajectory(draw, ids, ended=Ending.OVER):
    """A trajectory of one turn per list of ids; the prompt of turn t is [90 + t]."""
    responses = [
        Response([90 + t], Sample(each, [-1.0] * len(each), [0.5] * len(each)), "look", "a", reward=1.0)
        for t, each in enumerate(ids)
    ]
    return Trajectory(Task("t"), draw, 0, responses, ended=ended)


PLAYED = [
    trajectory(1, [[5, 6, 7, 8]]),
    trajectory(0, [[1, 2], [3]]),
    trajectory(0, [[9]], Ending.CRASHED),
    trajectory(2, [[4]]),
]


@pytest.mark.parametrize("history", ["full", "window"])
def test_states_by_hand(history):
    """Two groups in the first round; the responses in order are [1, 2], [3] and [5, 6, 7, 8]; two states of each."""
    found = choose_contexts(PLAYED, history, groups=2, vocabulary=12_500_000 // 3, contexts=3)
    second = [90, 1, 2, 91, 3] if history == "full" else [91, 3]
    assert found == [
        FixedContext([90, 1, 2], [1, 2]),
        FixedContext(second, [len(second) - 1]),
        FixedContext([90, 5, 6, 7], [1, 3]),
    ]
    (first,) = choose_contexts(PLAYED, history, groups=2, vocabulary=10**9, contexts=1)
    assert first == FixedContext([90, 1], [1])  # one state, however large the vocabulary


# Training.


def train(folder, meter=True, steps=3, **changes):
    """The metrics of the steps, the policy before the first step and after each, and the trainer."""
    rows, policies, norms = [], [], []
    trainer = toy.trainer(folder, toy.experiment("full", steps=steps, mini_batch=8), lam=1.0, **changes)
    copy = lambda: {name: value.clone() for name, value in trainer.model.state_dict().items()}  # noqa: E731

    def report(step, row):
        rows.append(row)
        policies.append(copy())

    def record_norm(norm):
        norms.append(norm)
        add_norm(norm)

    policies.append(copy())
    trainer.aem_callback.report = report
    add_norm, trainer.step_size.add_gradient_norm = trainer.step_size.add_gradient_norm, record_norm
    if not meter:
        trainer.remove_callback(StepSizeMeter)
        trainer.step_size.begin_step = lambda played, is_trained: None
    trainer.train()
    return rows, policies, norms, trainer


@pytest.mark.slow
def test_sizes_equal_a_direct_computation(folder):
    rows, policies, norms, trainer = train(folder)
    contexts = load_contexts(trainer.step_size._file)
    assert len(contexts) == 8 and all(context.positions for context in contexts)
    model = toy.policy(folder)[0].eval()

    def log_probs(weights):
        model.load_state_dict(weights)
        with torch.no_grad():
            each = [model(input_ids=torch.tensor([c.ids])).logits[0].log_softmax(-1) for c in contexts]
        return torch.cat([lp[[k - 1 for k in c.positions]] for lp, c in zip(each, contexts, strict=True)]).double()

    for i, row in enumerate(rows):
        assert row["train/updates"] == 2
        own = norms[2 * i : 2 * i + 2]
        assert row["train/grad_norm"] == pytest.approx(own[1])
        assert row["train/grad_norm_mean"] == pytest.approx(sum(own) / 2)
        before, after = policies[i], policies[i + 1]
        change = torch.stack([(after[n] - before[n]).square().sum() for n, _ in model.named_parameters()]).sum().sqrt()
        assert row["train/weight_change"] == pytest.approx(change.item(), rel=1e-5)
        assert row["train/effective_learning_rate"] == pytest.approx(change.item() / sum(own), rel=1e-5)
        p, q = log_probs(before), log_probs(after)
        assert row["train/step_kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
        assert row["train/step_kl"] > 1e-4


@pytest.mark.slow
def test_measuring_changes_no_bit_of_the_training(folder):
    measured, plain = (train(folder, meter)[1] for meter in (True, False))
    for one, other in zip(measured, plain, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_measuring_uses_no_random_numbers_and_keeps_the_mode(folder):
    trainer = toy.trainer(folder, toy.experiment("full"), lam=1.0)
    trainer.model.train()
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    states = trainer.step_size._open_states(trainer.play(0).kept)
    before = torch.get_rng_state()
    one, other = states.log_probs(), states.log_probs()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) and trainer.model.training


@pytest.mark.slow
@pytest.mark.parametrize("match", [None, "kl"])
def test_resumed_run_measures_the_same_on_the_same_states(folder, match):
    """With a matched control too, which has no state of its own."""
    variant = ModulationVariant(match=match)
    rows, policies, _, whole = train(folder, variant=variant)
    trainer, resumed = (
        toy.trainer(folder, toy.experiment("full", steps=3, mini_batch=8), lam=1.0, variant=variant) for _ in range(2)
    )
    trainer.aem_callback.should_stop = lambda: trainer.time.step == 2
    trainer.train()
    first = trainer.step_size._file.parent
    shutil.copytree(first, resumed.step_size._file.parent, dirs_exist_ok=True)
    (checkpoint,) = first.glob("checkpoint-*")
    resumed.time.step, seen = 2, []
    resumed.aem_callback.report = lambda step, row: seen.append(row)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert whole.step_size._file.read_bytes() == resumed.step_size._file.read_bytes()
    assert [row[name] for row in seen for name in SIZES] == [rows[2][name] for name in SIZES]
    assert all(torch.equal(value, policies[3][name]) for name, value in resumed.model.state_dict().items())


@pytest.mark.slow
def test_step_without_updates_has_size_zero(folder):
    rows, *_ = train(folder, steps=1, estimator=lambda batch: torch.zeros(len(batch.trajectory_R)))
    sizes = {name: rows[0].get(name) for name in SIZES}
    assert sizes == dict.fromkeys(SIZES, 0.0) | {"train/effective_learning_rate": None}


def test_damaged_states_are_refused(tmp_path):
    file = tmp_path / FIXED_STATES
    file.write_text(json.dumps({"contexts": [{"ids": [1]}]}))
    with pytest.raises(disk.DamagedFileError, match=FIXED_STATES):
        load_contexts(file)
