"""One-update branches: they are exactly the updates of training, from exactly restored weights; the command and its result."""

import json
from dataclasses import replace

import pytest
import torch
from support import toy

from aem_exp import branch, config
from aem_exp.branch import command, session
from aem_exp.branch.probe import Probe, StateResponses
from aem_exp.branch.result import build_result, differences
from aem_exp.branch.trainer import Branches, BranchTrainer
from aem_exp.config import Modulation
from aem_exp.rundir import checkpoints
from aem_exp.training.snapshot import TOLERANCE

AEM = Modulation(lam={"_target_": "aem_exp.schedules.Constant", "value": 1.0}, gate=0.0)
ARMS = {"none": Modulation(), "aem": AEM, "shuffled": replace(AEM, shuffle=True), "same": AEM}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


class WeightReader:
    """A probe that reads the weights."""

    def __init__(self, model):
        self.model, self.read = model, []

    def measure(self):
        self.read.append([p.detach().clone() for p in self.model.parameters()])
        return {"kl": 1.0}


def train(folder, steps, start=None, lam=None, history="full"):
    """Train toy steps, from a checkpoint after the first one if given; the trainer."""
    made = toy.trainer(folder, toy.experiment(history, steps=steps), lam=lam)
    made.aem_callback.gate = 0.0
    if start:
        made.time.step = made.time.updates = 1
    made.train(resume_from_checkpoint=start and str(start))
    return made


def take(folder, start, history="full", batches=(1,), kl=None, make_probe=None, arms=ARMS):
    """Take branches from a checkpoint after the first step; the trainer, the probe and the records."""
    made = toy.trainer(folder, toy.experiment(history, steps=3), kind=BranchTrainer)
    made.time.step = made.time.updates = 1
    probes, rows = [], []

    def build(current):
        probes.append((make_probe or WeightReader)(current.model))
        return probes[0]

    made.branches = Branches(arms, batches, build, lambda *_: None, lambda batch, row: rows.append(row), kl=kl)
    made.train(resume_from_checkpoint=str(start))
    return made, probes[0], rows


@pytest.mark.slow
@pytest.mark.parametrize("history", ["full", "window"])
def test_branch_is_bitwise_the_update_of_the_run(folder, history):
    (start,) = checkpoints.list_complete(folder_of(train(folder, 1, lam=1.0, history=history)))
    ran = {name: train(folder, 2, start, lam, history) for name, lam in (("none", None), ("aem", 1.0))}
    made, probe, rows = take(folder, start, history)
    weights = dict(zip(ARMS, probe.read, strict=True))
    for name, run in ran.items():
        assert equal(weights[name], run.model.parameters())
    assert equal(weights["aem"], weights["same"])
    for one, other in (("none", "aem"), ("aem", "shuffled")):
        assert not equal(weights[one], weights[other])
    saved = toy.policy(folder, history)[0]
    saved.load_state_dict(trainer_weights(start))
    assert equal(made.model.parameters(), saved.parameters())
    arms = rows[0]["arms"]
    assert all(arm["norm"] > 0 and arm["grad_norm"] > 0 and "predicted" in arm for arm in arms.values())
    assert arms["aem"] == arms["same"]


def folder_of(made):
    from pathlib import Path

    return Path(made.args.output_dir)


def trainer_weights(checkpoint):
    from safetensors.torch import load_file

    weights = load_file(checkpoint / "model.safetensors")
    return {**weights, "lm_head.weight": weights.get("lm_head.weight", weights["model.embed_tokens.weight"])}


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_updates_can_be_scaled_to_one_kl(folder):
    (start,) = checkpoints.list_complete(folder_of(train(folder, 1)))
    states = [StateResponses([3, 4], [[5, 6, 7], [8, 9]]), StateResponses([4], [[7], [3, 3]])]
    _, _, rows = take(folder, start, kl=1e-3, make_probe=lambda model: Probe(model, states, 1.0), batches=(1, 2))
    for row in rows:
        for arm in row["arms"].values():
            assert arm["kl"] == pytest.approx(1e-3, rel=2 * TOLERANCE)
            assert arm["norm"] > 0


# The result.


def measured(predicted, entropy, **more):
    same = {"own_entropy": entropy, "kl": 4.0, "own_kl": 1.0, "token_entropy": 0.0, "own_token_entropy": 0.0}
    return {"predicted": predicted, "entropy": 2 * entropy, "norm": 2.0, "grad_norm": 1.0, **same, **more}


ROWS = [
    {"batch": 0, "arms": {"none": measured(1.0, 1.0), "aem": measured(3.0, 2.0)}},
    {"batch": 1, "arms": {"none": measured(1.0, -1.0), "aem": measured(2.0, 3.0, effective_share=0.7)}},
    {"batch": 2, "arms": {"none": measured(1.0, 1.0), "aem": measured(0.0, 4.0)}},
]


def test_result_by_hand():
    result = build_result(ROWS, ["none", "aem"], {"step": 1})
    none, aem = result["arms"]["none"], result["arms"]["aem"]
    assert none["entropy"]["mean"] == pytest.approx(2 / 3)
    assert none["agreement"]["own_entropy"] == {"batches": 3, "agree": 2, "r": None}
    assert aem["difference"]["own_entropy"]["mean"] == pytest.approx((1 + 4 + 3) / 3)
    low, high = (aem["difference"]["own_entropy"][end] for end in ("low", "high"))
    assert (low + high) / 2 == pytest.approx(8 / 3) and high - low == pytest.approx(2 * 4.30265 * 3**-0.5 * 1.527525)
    assert aem["agreement"]["own_entropy"]["batches"] == 3 and aem["agreement"]["own_entropy"]["agree"] == 2
    assert aem["entropy_per_root_kl"]["mean"] == pytest.approx(3) and aem["own_entropy_per_norm"]["mean"] == 1.5
    assert result["smallest_effective_share"] == 0.7
    assert differences(ROWS, ["none", "aem"], "own_entropy") == {"aem": [(2.0, 1.0), (1.0, 4.0), (-1.0, 3.0)]}


# The command.


@pytest.fixture
def run_branch(unbroken, cache, monkeypatch, tmp_path, capsys):
    """Run the command on a finished run; return its output."""
    monkeypatch.setenv("AEM_CACHE", str(cache))

    def run(*options):
        argv = [unbroken[0], f"outputs={tmp_path}", "--states", 3, "--samples", 4, *options]
        assert command.main([*map(str, argv)]) == 0
        return capsys.readouterr().out

    return run


def test_command_resumes_extends_and_shows_the_result(run_branch, tmp_path, monkeypatch):
    options = ("--arms", "none,aem", "--batches", 2)
    result = json.loads(run_branch("--json", *options), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert result["arms"].keys() == {"none", "aem"} and result["batches"] == 2
    assert result["arms"]["aem"]["norm"]["mean"] > 0 and result["arms"]["aem"]["kl"]["mean"] > 0
    (folder,) = tmp_path.glob("*/branches/step-6-*")
    assert (folder / command.FIGURE).stat().st_size > 5000
    file, before = folder / session.BATCHES, (folder / "result.json").read_text()
    lines = file.read_text()
    file.write_text(lines[:-20])
    (folder / "result.json").unlink()
    assert "one update of each arm: means over 2 batches" in run_branch(*options)
    assert file.read_text() == lines and (folder / "result.json").read_text() == before
    assert json.loads(run_branch("--json", "--arms", "none,aem", "--batches", 3))["batches"] == 3
    monkeypatch.setattr(session, "take_branches", lambda *_: pytest.fail("it plays again"))
    assert str(folder) in run_branch(*options)
    assert (folder / "result.json").read_text() == before


def test_command_starts_at_an_earlier_step_with_a_plain_gradient(run_branch, tmp_path):
    options = ("--arms", "none,reversed", "--batches", 1, "--optimizer", "sgd", "--step", 0)
    result = json.loads(run_branch("--json", *options))
    assert result["identity"]["step"] == 0
    for arm in result["arms"].values():
        assert arm["kl"]["mean"] == pytest.approx(command.SGD_KL, rel=0.05)


@pytest.mark.parametrize(
    ("argv", "fact"),
    [
        ([], "RUN_DIR="),
        (["launch=local"], "RUN_DIR=launch=local: "),
        (["x", "y"], "RUN_DIR=y: only one"),
        (["/nowhere"], "RUN_DIR=/nowhere: "),
        (["x", "--samples", "1"], "--samples=1: "),
        (["x", "--batches", "0"], "--batches=0: "),
        (["x", "--kl", "0"], "--kl=0.0: "),
        (["x", "--arms", "aem,aem"], "--arms=aem,aem: "),
        (["x", "trainer.steps=3"], "trainer.steps=3: has no effect"),
    ],
)
def test_invalid_arguments_exit_with_one_line(capsys, argv, fact):
    assert command.main(argv) == 2
    err = capsys.readouterr().err
    assert fact in err and err.count("\n") == 1


def test_invalid_arms_and_steps_are_named(unbroken, capsys):
    for options, fact in (
        (["--arms", "none,aems"], "--arms=aems: did you mean aem?"),
        (["--arms", "none,matched_kl"], "--arms=matched_kl: is not possible here"),
        (["--step", "5"], "--step=5: "),
    ):
        assert command.main([str(unbroken[0]), *options]) == 2
        assert fact in capsys.readouterr().err
    assert config.read(unbroken[0]).trainer.mini_batch == 6 and branch.__doc__
