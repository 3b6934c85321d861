"""Clip-Cov, KL-Cov and training on the tokens of highest entropy: numbers calculated by hand, and the laws of the trainer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import toy

from aem_exp.training.token_selection import (
    TokenRules,
    clip_cov_weights,
    covariances,
    largest_covariances,
    top_entropy_weights,
)

CLIP_COV = TokenRules(clip_cov_ratio=0.2, clip_cov_min=0.05, clip_cov_max=5.0)
KL_COV = TokenRules(kl_cov_ratio=0.2, kl_cov_coef=1.0)
TOP_ENTROPY = TokenRules(top_entropy=0.2)
RULES = {"clip_cov": CLIP_COV, "kl_cov": KL_COV, "top_entropy": TOP_ENTROPY}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_covariances_by_hand():
    """Means -1 and 0.5. The most likely token has the highest advantage, so it has the largest covariance."""
    covariance_K = covariances(tensor(-0.1, -0.4, -3.0, -0.5), tensor(2.0, -1.0, 1.0, 0.0))
    torch.testing.assert_close(covariance_K, tensor(0.9 * 1.5, 0.6 * -1.5, -2.0 * 0.5, 0.5 * -0.5))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(0, 1000))
def test_covariances_average_to_the_covariance(size, seed):
    rng = np.random.default_rng(seed)
    logp, advantage = rng.normal(size=size), rng.normal(size=size)
    mean = covariances(torch.from_numpy(logp), torch.from_numpy(advantage)).mean().item()
    assert mean == pytest.approx(np.cov(logp, advantage, ddof=0)[0, 1], abs=1e-9)


def test_clip_cov_by_hand():
    """Of ten tokens, those at 1, 4, 6 and 9 are between the bounds; a share of 0.35 is three of ten."""
    covariance_K = tensor(0, 1.5, 5.0, 1.0, 2.0, -2.0, 4.9, 9.0, 0.5, 1.1)
    removed = set()
    for seed in range(40):
        weight_K = clip_cov_weights(covariance_K, 0.35, 1.0, 5.0, np.random.default_rng(seed))
        assert weight_K.sum() == 7
        removed |= set((weight_K == 0).nonzero()[:, 0].tolist())
    assert removed == {1, 4, 6, 9}, "the bounds themselves are out"


@pytest.mark.parametrize(("ratio", "count"), [(1e-4, 1), (0.19, 1), (0.2, 2), (1.0, 3)])
def test_clip_cov_removes_at_least_one_token_and_at_most_the_candidates(ratio, count):
    covariance_K = tensor(2, 2, 2, 0, 0, 0, 0, 0, 0, 0)
    weight_K = clip_cov_weights(covariance_K, ratio, 1.0, 5.0, np.random.default_rng(0))
    assert (weight_K == 0).sum() == count and weight_K[3:].all()


def test_clip_cov_without_candidates_changes_nothing():
    assert clip_cov_weights(tensor(0, 0.5), 0.5, 1.0, 5.0, np.random.default_rng(0)).tolist() == [1, 1]


def test_kl_cov_by_hand():
    covariance_K = tensor(0.5, 3.0, -4.0, 1.0, 2.0)
    assert largest_covariances(covariance_K, 0.4).tolist() == [0, 1, 0, 0, 1]
    assert largest_covariances(covariance_K, 1e-4).tolist() == [0, 1, 0, 0, 0], "at least one"
    assert largest_covariances(torch.zeros(5), 0.4).tolist() == [1, 1, 0, 0, 0], "of equal values, the first"


@pytest.mark.parametrize(("size", "count"), [(5, 1), (10, 2), (11, 3), (15, 3), (1, 1)])
def test_top_entropy_by_hand(size, count):
    """0.2 of the tokens, rounded up. The mean over all tokens is then the mean over the chosen ones."""
    weight_K = top_entropy_weights(torch.arange(float(size)), 0.2)
    assert (weight_K > 0).tolist() == [False] * (size - count) + [True] * count
    value_K = torch.randn(size)
    torch.testing.assert_close((weight_K * value_K).mean(), value_K[-count:].mean())


def run_of(history="full", **changes):
    return toy.experiment(history, loss_type="dapo", beta=0.05, entropy_coef=0.01, **changes)


def first_step(trainer):
    return trainer.build_updates(trainer.assign_credit(trainer.play(0).kept), 0)


def move_policy(trainer):
    """Change the weights, so that the ratio to the old policy is not 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(torch.randn_like(p) * 0.02)


def gradients(trainer, update):
    trainer.current_gradient_accumulation_steps = 1
    trainer.aem_callback.metrics["time/update"] = 0.0
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, update)
    return [loss, *(p.grad.clone() for p in trainer.model.parameters())]


def row_values(trainer, step_updates, name):
    """A tensor of the step as one list, in an order that does not depend on micro-batches: by the ids of the row."""
    batches = [batch for update in step_updates for batch in update]
    rows = {}
    for batch in batches:
        for ids, mask, value in zip(batch["completion_ids"], batch["tool_mask"], batch[name], strict=True):
            rows.setdefault(tuple(ids[: mask.nonzero().max() + 1].tolist()), []).append(value[mask.bool()])
    return torch.cat([torch.stack(rows[key]).sum(0) for key in sorted(rows)])


@pytest.mark.slow
@pytest.mark.parametrize("history", ["full", "window"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_micro_batches_and_padding_change_nothing(tmp_path, history, rules):
    results = []
    for device_rows in (0, 1, 3):
        run = run_of(history, mini_batch=7)
        trainer = toy.trainer(tmp_path, run, lam=1.0, device_rows=device_rows, token_rules=rules)
        _, step_updates = first_step(trainer)
        assert len(step_updates) >= 2
        assert 0 < trainer.aem_callback.metrics["tokens/trained_share"] <= 1
        move_policy(trainer)
        results.append(gradients(trainer, step_updates[1]))
    plain = toy.trainer(tmp_path, run, lam=1.0, device_rows=3)
    _, step_updates = first_step(plain)
    move_policy(plain)
    for ours in results[1:]:
        for one, other in zip(ours, results[0], strict=True):
            torch.testing.assert_close(one, other, atol=5e-6, rtol=1e-4)
    assert not torch.allclose(gradients(plain, step_updates[1])[1], results[0][1], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rules", [CLIP_COV, TOP_ENTROPY], ids=["clip_cov", "top_entropy"])
def test_selection_does_not_depend_on_the_modulation(tmp_path, rules):
    """A modulation multiplies the advantages of the tokens that are trained. The covariance is that of the baseline."""
    values = {}
    for lam in (None, 1.0):
        for chosen in (TokenRules(), rules):
            trainer = toy.trainer(tmp_path, run_of(), lam=lam, token_rules=chosen)
            _, step_updates = first_step(trainer)
            values[lam, chosen is rules] = row_values(trainer, step_updates, "advantages")
    factor = values[None, True] / values[None, False]
    trained = values[None, False] != 0
    assert set(factor[trained].unique().tolist()) == {0.0, factor[trained].max().item()}
    torch.testing.assert_close(values[1.0, True][trained], (values[1.0, False] * factor)[trained])
    assert not torch.equal(values[1.0, True], values[None, True])


@pytest.mark.slow
def test_clip_cov_tokens_stay_in_the_denominator(tmp_path):
    """The loss is the sum over the other tokens, divided by the number of all tokens."""
    run = toy.experiment("full", loss_type="dapo", num_iterations=2)
    trainer = toy.trainer(tmp_path, run, token_rules=CLIP_COV)
    _, ((batch,), _) = first_step(trainer)
    removed = (batch["advantages"] == 0) & batch["tool_mask"].bool()
    assert removed.any()
    assert batch["num_items_in_batch"] == batch["tool_mask"].sum()
    move_policy(trainer)
    loss = gradients(trainer, [batch])[0]
    ratio = (trainer_logps(trainer, batch) - batch["old_per_token_logps"]).exp()
    terms = -torch.min(ratio * batch["advantages"], ratio.clamp(0.8, 1.2) * batch["advantages"])
    torch.testing.assert_close(loss, (terms * batch["tool_mask"]).sum() / batch["tool_mask"].sum(), atol=1e-6, rtol=0)


def trainer_logps(trainer, batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return logps[:, -batch["completion_ids"].shape[1] :]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dapo", "bnpo"])
def test_kl_cov_adds_the_absolute_log_ratio_of_its_tokens(tmp_path, kind):
    """Averaged over all tokens of the update. The first update of a step has no such term."""
    run = toy.experiment("full", loss_type=kind, num_iterations=2)
    losses = {}
    for rules in (TokenRules(), KL_COV):
        trainer = toy.trainer(tmp_path, run, token_rules=rules, device_rows=3)
        _, (first, second) = first_step(trainer)
        assert not any("penalties" in batch for batch in first)
        move_policy(trainer)
        losses[rules] = gradients(trainer, second)[0]
    term = sum(
        ((trainer_logps(trainer, batch) - batch["old_per_token_logps"]).abs() * batch["penalties"]).sum()
        for batch in second
    )
    tokens = sum(batch["tool_mask"].sum() for batch in second)
    assert sum((batch["penalties"] > 0).sum() for batch in second) == int(0.2 * tokens)
    torch.testing.assert_close(losses[KL_COV] - losses[TokenRules()], term / tokens, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_another_step_removes_other_tokens(tmp_path):
    """The choice is seeded by the seed of the run and the step, so a resumed run makes it again."""
    trainer = toy.trainer(tmp_path, run_of(), token_rules=CLIP_COV)
    assigned = trainer.assign_credit(trainer.play(0).kept)
    first, again, other = (
        row_values(trainer, trainer.build_updates(assigned, step)[1], "advantages") for step in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first == 0, other == 0)
