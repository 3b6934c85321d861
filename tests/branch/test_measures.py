"""The estimators of `aem-exp branch`: exact values on languages whose responses can be listed, and states by hand."""

import numpy as np
import pytest
import torch
from bench import theory
from support import toy

from aem_exp.branch import measures
from aem_exp.branch.probe import Probe, StateResponses, response_logps
from aem_exp.core.errors import ConfigError
from aem_exp.envs import Task
from aem_exp.rollout.sampling.base import Sample
from aem_exp.rollout.types import Response, Trajectory

ORDINARY = theory.make_ordinary(np.random.default_rng(0))


def moved(language, size, seed=1):
    """The language after an update: its logits move at random."""
    noise_CV = np.random.default_rng(seed).normal(0, size, language.next_CV.shape)
    logits_CV = np.log(language.next_CV) + noise_CV
    return theory.Language(np.exp(logits_CV - np.logaddexp.reduce(logits_CV, -1, keepdims=True)), language.longest)


def sample(language, after, prompt, count, rng):
    """`count` responses of the language at a prompt: log-probs under both languages, token ids and mask."""
    context_NT, token_NT, live_NT = theory.sample_responses(language, np.full(count, prompt), rng)
    logps = (torch.from_numpy(np.log(each.next_CV[context_NT])) for each in (language, after))
    return *logps, torch.from_numpy(token_NT), torch.from_numpy(live_NT)


def test_estimates_of_entropy_and_kl_have_the_exact_mean():
    rng, after, prompt, samples = np.random.default_rng(2), moved(ORDINARY, 0.2), ORDINARY.prompts[0], 8
    change = after.response_entropy()[prompt] - ORDINARY.response_entropy()[prompt]
    p_R, q_R = (theory.list_responses(each).prob_R * len(each.prompts) for each in (ORDINARY, after))
    own_R = theory.list_responses(ORDINARY).prompt_R == prompt
    kl = (p_R * np.log(p_R / q_R))[own_R].sum()
    pieces = sample(ORDINARY, after, prompt, samples * 1500, rng)
    batches = [measures.compare_policies(*group) for group in zip(*(x.split(samples) for x in pieces), strict=True)]
    for expected, values in ((change, [b.entropy for b in batches]), (kl, [b.kl for b in batches])):
        error = np.std(values) / len(values) ** 0.5
        assert abs(np.mean(values) - expected) < 4 * error
        assert error < abs(expected) / 8  # so the test can fail


def test_noise_of_the_entropy_change_vanishes_with_the_update():
    """Its standard deviation is proportional to the update, that of the difference of two samples is not; weights of whole
    responses in place of tokens have more noise."""
    prompt, samples, deviations = ORDINARY.prompts[1], 8, []
    for size in (0.02, 0.002):
        before, after, ids, mask = sample(
            ORDINARY, moved(ORDINARY, size), prompt, samples * 300, np.random.default_rng(3)
        )
        h0, h1 = (-(logp.exp() * logp).sum(-1) * mask for logp in (before, after))
        ratio = (after - before).gather(-1, ids[..., None]).squeeze(-1) * mask
        groups = [x.split(samples) for x in (h0, h1, ratio, mask)]
        ours = torch.stack([measures.entropy_change(*group) for group in zip(*groups, strict=True)])
        whole = (ratio.sum(1).exp() * h1.sum(1) - h0.sum(1)).view(-1, samples).mean(1)
        deviations.append((ours.std().item(), whole.std().item()))
    assert deviations[0][0] / deviations[1][0] == pytest.approx(10, rel=0.1)
    assert all(ours < 0.5 * whole for ours, whole in deviations)


def test_equal_policies_differ_by_nothing():
    logps = torch.randn(3, 4, 7).log_softmax(-1)
    change = measures.compare_policies(logps, logps, torch.ones(3, 4, dtype=torch.long), torch.ones(3, 4))
    assert (change.kl, change.entropy, change.token_entropies, change.tokens) == (0.0, 0.0, 0.0, 12)
    assert change.effective_share == pytest.approx(1)


def trajectory(*turns):
    return Trajectory(Task("t"), 0, 0, [Response(prompt, Sample(ids, [], []), "", "") for prompt, ids in turns])


def test_states_are_equal_if_all_tokens_in_front_are():
    played = [
        trajectory(([1], [5]), ([2], [6])),
        trajectory(([1], [7]), ([2], [6])),
        trajectory(([1], [5]), ([2], [8])),
    ]
    assert measures.state_ids(played, "full").tolist() == [0, 1, 0, 2, 0, 1]
    assert measures.state_ids(played, "window").tolist() == [0, 1, 0, 1, 0, 1]


def test_probe_scores_like_a_pass_over_each_whole_row(tmp_path):
    model, _ = toy.policy(tmp_path)
    state = StateResponses([3, 4, 5], [[6, 7], [8], [9, 3, 2]])
    logps_KTV = response_logps(model, state, 0.7)
    for k, ids in enumerate(state.responses):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([state.prompt + ids])).logits[0, 2:-1]
        expected = (logits / 0.7).log_softmax(-1)
        torch.testing.assert_close(logps_KTV[k, : len(ids)], expected, atol=1e-5, rtol=0)


def test_probe_that_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("aem_exp.branch.probe.MEMORY_SHARE", 1e-12)
    with pytest.raises(ConfigError, match="lower --states or --samples"):
        Probe(toy.policy(tmp_path)[0], [StateResponses([1], [[2], [3]])], 1.0)
