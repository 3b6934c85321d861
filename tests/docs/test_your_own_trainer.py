"""The code of docs/your-own-trainer.md: TRL's trainer trains with it, and a verl-style batch is modulated as by hand."""

import importlib
import sys

import numpy as np
import pytest
import torch
from support import page_reader, torchrun_trl
from support.runs import torchrun

from aem_exp import aem

PAGE = "your-own-trainer.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The files that the page shows, importable."""
    folder = tmp_path_factory.mktemp("page")
    page_reader.write_files(PAGE, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder
        for name in ("aem_grpo", "aem_verl", "train"):
            sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_commands_of_the_page_train(tmp_path):
    done = page_reader.follow(PAGE, tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0.txt").read_text().count("aem/gated_share") == 2


def record_batches(trainer):
    """Keep a copy of every batch that the trainer makes."""
    batches, make = [], trainer._generate_and_score_completions

    def record(inputs):
        batch = make(inputs)
        batches.append({name: value.clone() for name, value in batch.items()})
        return batch

    trainer._generate_and_score_completions = record
    return batches


def train(kind, folder):
    """The batches of two steps and the weights after them."""
    trainer = torchrun_trl.make_trainer(kind, folder)
    batches = record_batches(trainer)
    trainer.train()
    return batches, {name: value.clone() for name, value in trainer.model.state_dict().items()}


def with_strength(kind, lam, gate=0.0):
    return type("Modulated", (kind,), {"lam": lam, "gate": gate})


@pytest.mark.slow
def test_lambda_zero_is_plain_trl_bit_for_bit(page, tmp_path):
    from trl import GRPOTrainer

    ours = importlib.import_module("aem_grpo").AEMGRPOTrainer
    plain, plain_weights = train(GRPOTrainer, tmp_path / "plain")
    zero, zero_weights = train(with_strength(ours, 0.0), tmp_path / "zero")
    assert len(plain) == len(zero) == 2
    for a, b in zip(plain, zero, strict=True):
        assert torch.equal(b["advantages"], a["advantages"][:, None].expand_as(b["advantages"]))
    for name, value in plain_weights.items():
        assert torch.equal(value, zero_weights[name]), name


@pytest.mark.slow
def test_advantages_are_multiplied_by_the_coefficients(page, tmp_path):
    """Against `aem`, with entropies of the logits themselves, and groups and responses numbered by hand."""
    from trl import GRPOTrainer

    ours = importlib.import_module("aem_grpo").AEMGRPOTrainer
    before = torchrun_trl.make_trainer(GRPOTrainer, tmp_path / "model").model.eval()
    plain, plain_weights = train(GRPOTrainer, tmp_path / "plain")
    batches, weights = train(with_strength(ours, 1.0), tmp_path / "aem")
    batch = batches[0]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        log_p = before(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    entropy_NT = -(log_p.exp() * log_p).sum(-1)[:, :-1][:, -batch["completion_ids"].shape[1] :]
    response_NT = torch.tensor(torchrun_trl.RESPONSES)
    entropy_R = torch.stack([entropy_NT[response_NT == r].mean() for r in range(12)])
    alpha_R = aem.coefficients(entropy_R, torch.tensor(torchrun_trl.GROUPS), 1.0, 0.0)
    assert plain[0]["advantages"].abs().min() > 0.5 and alpha_R.max() / alpha_R.min() > 1.5
    own_NT = response_NT >= 0
    expected_NT = plain[0]["advantages"][:, None] * alpha_R[response_NT]
    torch.testing.assert_close(batch["advantages"][own_NT], expected_NT[own_NT], atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(value, weights[name]) for name, value in plain_weights.items())


def test_the_gate_leaves_groups_unchanged(page, tmp_path):
    ours = importlib.import_module("aem_grpo").AEMGRPOTrainer
    gated, _ = train(with_strength(ours, 1.0, gate=100.0), tmp_path / "gated")
    zero, _ = train(with_strength(ours, 0.0), tmp_path / "zero")
    for a, b in zip(gated, zero, strict=True):
        assert torch.equal(a["advantages"], b["advantages"])


@pytest.mark.slow
def test_a_group_may_lie_on_two_processes(page, tmp_path):
    """Two processes, each with three rows of groups of two, compute what one process does."""
    ours = importlib.import_module("aem_grpo").AEMGRPOTrainer
    trainer = torchrun_trl.make_trainer(with_strength(ours, 1.0), tmp_path / "one")
    trainer.model.train()
    alone = trainer._generate_and_score_completions([{"prompt": "2"} for _ in torchrun_trl.EPISODES])["advantages"]
    done = torchrun(torchrun_trl, page, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    rows = [row for half in halves for row in half["advantages"]]
    for row, (ids, mask, _), expected in zip(rows, torchrun_trl.EPISODES, alone, strict=True):
        own = torch.tensor(mask).bool()
        torch.testing.assert_close(torch.tensor(row)[: len(ids)][own], expected[: len(ids)][own], atol=1e-5, rtol=1e-5)


# A verl-style batch.


def verl_batch():
    """Four rows in two groups: a row of two turns, two rows of one turn, and a row whose tokens are all masked."""
    mask_NT = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    entropy_NT = torch.tensor(
        [[0.1, 0.3, 9.0, 0.8, 9.0], [0.5, 0.5, 0.5, 9.0, 9.0], [9.0, 0.7, 9.0, 9.0, 9.0], [9.0] * 5]
    )
    advantage_NT = torch.tensor([[1.0], [-1.0], [0.5], [2.0]]).expand(4, 5).clone()
    return {"response_mask": mask_NT, "entropys": entropy_NT, "advantages": advantage_NT}


def test_a_verl_batch_by_hand(page):
    """Entropies 0.2, 0.8 and 0.5 in one group: the worked numbers of three equally spaced responses. The other has one: 1."""
    aem_verl = importlib.import_module("aem_verl")
    batch = verl_batch()
    alpha_R = aem_verl.modulate_batch(batch, np.array(["b", "b", "a", "b"], dtype=object))
    torch.testing.assert_close(alpha_R, torch.tensor([1.519441, 0.558971, 0.921588, 1.0]), atol=1e-5, rtol=0)
    expected_NT = torch.tensor(
        [
            [1.519441, 1.519441, 1.0, 0.558971, 1.0],
            [-0.921588, -0.921588, -0.921588, -1.0, -1.0],
            [0.5] * 5,
            [2.0] * 5,
        ]
    )
    torch.testing.assert_close(batch["advantages"], expected_NT, atol=1e-5, rtol=0)


def test_lambda_zero_and_order_of_rows(page):
    aem_verl = importlib.import_module("aem_verl")
    batch = verl_batch()
    aem_verl.modulate_batch(batch, [7, 7, 3, 7], lam=0.0)
    assert torch.equal(batch["advantages"], verl_batch()["advantages"])
    order = torch.tensor([2, 1, 3, 0])
    straight, mixed = verl_batch(), {name: value[order] for name, value in verl_batch().items()}
    aem_verl.modulate_batch(straight, [7, 7, 3, 7])
    aem_verl.modulate_batch(mixed, torch.tensor([7, 7, 3, 7])[order])
    torch.testing.assert_close(mixed["advantages"], straight["advantages"][order])


def test_turns_without_a_token_between_them(page):
    aem_verl = importlib.import_module("aem_verl")
    mask_NT, turn_NT = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]]), torch.tensor([[0, 0, 1, 2], [0, 0, 4, 4]])
    assert aem_verl.response_ids(mask_NT).tolist() == [[0, 0, 0, 0], [-1, 1, 1, -1]]
    assert aem_verl.response_ids(mask_NT, turn_NT).tolist() == [[0, 0, 1, 2], [-1, 3, 4, -1]]
    separated = verl_batch()
    turns = torch.tensor([[0, 0, 0, 1, 1], [0] * 5, [0] * 5, [0] * 5])
    assert torch.equal(
        aem_verl.response_ids(separated["response_mask"], turns), aem.responses(separated["response_mask"])
    )
