"""The logged diagnostics: values by hand, the theory of entropy drift, and independence of micro-batches."""

import math

import pytest
import torch
from support import toy

from aem_exp import advantages
from aem_exp.envs import Task
from aem_exp.rollout.sampling.base import Sample
from aem_exp.rollout.types import Ending, Response, Trajectory
from aem_exp.training import diagnostics
from aem_exp.training.credit import CreditRules, add_measurements, add_modulation, assign_credit
from aem_exp.training.step_metrics import compute_step_metrics

STATE_R = torch.tensor([7, 3, 7, 7, 3, 5])
SURPRISAL_R = torch.tensor([1.0, 2.0, 4.0, 7.0, 6.0, 9.0])
ENTROPY_R = torch.tensor([2.0, 3.0, 1.0, 5.0, 4.0, 8.0])  # summed over tokens


def test_relative_surprisal_compares_with_the_token_entropies_of_the_other_responses():
    relative_R = diagnostics.relative_surprisal(SURPRISAL_R, ENTROPY_R, STATE_R)
    assert relative_R[:5].tolist() == [1 - 6 / 2, 2 - 4, 4 - 7 / 2, 7 - 3 / 2, 6 - 3]
    assert relative_R[5].isnan()
    assert not len(diagnostics.relative_surprisal(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long)))


def test_entropy_drift_by_hand():
    advantage_R = torch.tensor([1.0, 1.0, -1.0, 0.0, -1.0, 5.0])
    modulated_R = advantage_R * torch.tensor([2.0, 1.0, 1.0, 1.0, 0.5, 3.0])
    drift = diagnostics.entropy_drift(advantage_R, modulated_R, SURPRISAL_R, ENTROPY_R, STATE_R)
    assert drift == {"advantage": (-2 - 2 - 0.5 + 0 - 3) / 5, "aem": (-2 + 0.5 * 3) / 5}
    assert diagnostics.entropy_drift(advantage_R, None, SURPRISAL_R, ENTROPY_R, STATE_R).keys() == {"advantage"}
    assert diagnostics.entropy_drift(advantage_R, modulated_R, SURPRISAL_R, ENTROPY_R, torch.arange(6)) == {}


def test_entropy_changes_by_advantage_times_relative_surprisal_under_a_natural_gradient():
    """The inverse Fisher matrix maps the gradient of log p(a) to 1 / p(a) on the logit of a, up to a shift of all logits."""
    logits_V = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64)

    def entropy(logits_V):
        p_V = logits_V.softmax(-1)
        return -(p_V * p_V.log()).sum()

    for a, advantage in ((0, 1.0), (1, 0.7), (2, -1.5)):
        surprisal = -logits_V.log_softmax(-1)[a]
        step_V = torch.nn.functional.one_hot(torch.tensor(a), 4) * advantage * surprisal.exp()
        slope = (entropy(logits_V + 1e-6 * step_V) - entropy(logits_V - 1e-6 * step_V)) / 2e-6
        torch.testing.assert_close(slope, advantage * (surprisal - entropy(logits_V)), atol=1e-6, rtol=0)


def test_modulation_statistics_by_hand():
    """alpha A = (2, 1, -1/2, 0) sums to 5/2, and |A| to 4. Weighted by 1, 2, 3 and 4 tokens: 5/2 and 9."""
    alpha_R = torch.tensor([2.0, 1.0, 0.25, 0.75])
    advantage_R = torch.tensor([1.0, 1.0, -2.0, 0.0])
    tokens_R, turn_R = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    stats = diagnostics.modulation_statistics(alpha_R, torch.rand(4), advantage_R, tokens_R, turn_R)
    assert stats["advantage_balance"] == pytest.approx(2.5 / 4)
    assert stats["advantage_balance_token"] == pytest.approx((2 + 2 - 1.5) / 9)
    assert stats["alpha_positive_mean"] == pytest.approx(1.5)
    assert stats["alpha_negative_mean"] == pytest.approx(0.25)
    assert stats["alpha_advantage_mean"] == pytest.approx(3.5 / 4)
    assert stats["alpha_token_mean"] == pytest.approx((2 + 2 + 0.75 + 3) / 10)
    assert stats["alpha_length_corr"] == pytest.approx(torch.corrcoef(torch.stack([alpha_R, tokens_R]))[0, 1].item())
    assert stats["alpha_turn_corr"] == pytest.approx(torch.corrcoef(torch.stack([alpha_R, turn_R]))[0, 1].item())
    no_advantage = diagnostics.modulation_statistics(alpha_R, torch.rand(4), torch.zeros(4), tokens_R, turn_R)
    assert no_advantage["advantage_balance"] == no_advantage["advantage_balance_token"] == 0
    assert not {"alpha_positive_mean", "alpha_negative_mean"} & no_advantage.keys()


# The drift of a step.


def trajectory(draw, member, reward, *turns):
    """A trajectory from the token log-probs of each turn."""
    responses = [
        Response([9], Sample([1] * len(logps), list(logps), [0.5] * len(logps)), "look", "a") for logps in turns
    ]
    responses[-1].reward = reward
    return Trajectory(Task("t"), draw, member, responses, ended=Ending.OVER)


PLAYED = [
    trajectory(0, 0, 1.0, [-1.0, -2.0], [-50.0]),
    trajectory(0, 1, 0.0, [-1.0], [-70.0, -1.0]),
    trajectory(1, 0, 1.0, [-4.0]),
]


def measured(played, history):
    credit = assign_credit(played, history, CreditRules(advantages.group_centred))
    samples = [r.sample for *_, r in credit.list_responses()]
    surprisal_R = torch.tensor([-sum(sample.logps) / len(sample.ids) for sample in samples])
    entropy_R = torch.tensor([sum(sample.entropies) / len(sample.ids) for sample in samples])
    return add_measurements(credit, entropy_R, surprisal_R)


def test_sums_of_advantages_by_sign():
    """By hand: A = (1/2, 1/2, -1/2, -1/2, 0), lengths (2, 1, 1, 2, 1), 7 tokens; with alpha = (1/2, 2, 3, 1, 1)."""
    credit = measured(PLAYED, "full")
    names = ("train/positive_advantage", "train/negative_advantage")
    plain = compute_step_metrics(credit)
    assert [plain[name] for name in names] == pytest.approx([1.5 / 7, -1.5 / 7])
    alpha_R = torch.tensor([0.5, 2.0, 3.0, 1.0, 1.0])

    def sums(kept):
        final_R, kept_R = credit.advantage_R * alpha_R, torch.tensor(kept)
        modulated = add_modulation(credit, alpha_U=alpha_R, modulated_advantage_U=final_R, trained_U=kept_R, metrics={})
        return [compute_step_metrics(modulated)[name] for name in names]

    assert sums([True] * 5) == pytest.approx([(0.5 + 1) / 7, -(1.5 + 1) / 7])
    assert sums([True, False, True, True, True]) == pytest.approx(
        [0.5 / 6, -(1.5 + 1) / 6]
    )  # a masked response of 1 token


@pytest.mark.parametrize("history", ["full", "window"])
def test_drift_uses_first_turns_of_groups_with_several_members(history):
    credit = measured(PLAYED, history)
    assert compute_step_metrics(credit)["drift/advantage"] == pytest.approx((0.5 * (3 - 0.5) - 0.5 * (1 - 1)) / 2)
    assert "drift/aem" not in compute_step_metrics(credit)
    alpha_R = torch.tensor([0.5, 9.0, 1.0, 9.0, 1.0])
    final_R, kept_R = credit.advantage_R * alpha_R, torch.ones(len(alpha_R), dtype=torch.bool)
    modulated = add_modulation(credit, alpha_U=alpha_R, modulated_advantage_U=final_R, trained_U=kept_R, metrics={})
    assert compute_step_metrics(modulated)["drift/aem"] == pytest.approx(-0.5 * 0.5 * 2.5 / 2)
    assert not any(name.startswith("drift/") for name in compute_step_metrics(measured(PLAYED[2:], history)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


def first_step(folder, history, **changes):
    trainer = toy.trainer(folder, toy.experiment(history, mini_batch=7), **changes)
    credit, _ = trainer.build_updates(trainer.assign_credit(trainer.play(0).kept), 0)
    return credit


@pytest.mark.slow
@pytest.mark.parametrize("history", ["full", "window"])
def test_drift_of_a_step_does_not_depend_on_micro_batches_or_scoring(folder, history):
    """Reference values come from the sampler's log-probs; the last trainer scores again, as with vLLM."""
    credit = first_step(folder, history, lam=1.0)
    whole = compute_step_metrics(credit)
    extra, counted = 0.0, 0
    for r, (m, turn, response) in enumerate(credit.list_responses()):
        others = [t.responses[0] for t in credit.kept if t.draw == credit.kept[m].draw and t is not credit.kept[m]]
        if turn == 0 and others:
            surprisal, rest = -math.fsum(response.sample.logps), [math.fsum(o.sample.entropies) for o in others]
            scale = credit.advantage_R[r].item() * (credit.alpha_R[r].item() - 1)
            extra, counted = extra + scale * (surprisal - sum(rest) / len(rest)), counted + 1
    assert counted > 4
    assert whole["drift/aem"] == pytest.approx(extra / counted, rel=1e-4)
    for changes in ({"device_rows": 1}, {"device_rows": 3}):
        cut = compute_step_metrics(first_step(folder, history, lam=1.0, **changes))
        assert [cut[name] for name in ("drift/advantage", "drift/aem")] == [
            whole["drift/advantage"],
            whole["drift/aem"],
        ]
    scored = compute_step_metrics(first_step(folder, history, lam=1.0, trust_sampler=False))
    assert scored["drift/advantage"] == pytest.approx(whole["drift/advantage"], abs=1e-4)


@pytest.mark.parametrize("unit", ["response", "token"])
def test_lambda_zero_leaves_advantages_and_drift_unchanged(folder, unit):
    from aem_exp.training.modulation import ModulationVariant

    credit = first_step(folder, "full", lam=0.0, variant=ModulationVariant(unit=unit))
    torch.testing.assert_close(credit.final_advantage_R, credit.advantage_R)
    assert compute_step_metrics(credit)["drift/aem"] == pytest.approx(0.0, abs=1e-6)
