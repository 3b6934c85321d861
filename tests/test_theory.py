"""The claims of the theory and their limits, computed with `bench/theory.py`."""

import numpy as np
import pytest
import torch
from bench import theory

from aem_exp.training import diagnostics

LANGUAGES = {"ordinary": theory.make_ordinary(np.random.default_rng(0)), "routine": theory.make_routine()}


def added_drift(language, rule, arm="aem", seed=1):
    return theory.estimate_added_drift(LANGUAGES[language], rule, arm, np.random.default_rng(seed), groups=1000)


def test_natural_gradient_changes_entropy_by_advantage_times_relative_surprisal():
    drift = theory.measure_drift(np.random.default_rng(1), policies=50)
    assert drift.natural == pytest.approx(drift.predicted, abs=1e-5)
    assert (drift.predicted > 0).any() and (drift.predicted < 0).any()


def test_plain_gradient_has_another_closed_form():
    drift = theory.measure_drift(np.random.default_rng(1), policies=50)
    assert drift.plain == pytest.approx(drift.plain_predicted, abs=1e-6)
    agree = (np.sign(drift.plain) == np.sign(drift.predicted)).mean()
    assert 0.8 < agree < 1  # the sign is mostly equal ...
    assert np.corrcoef(drift.plain, drift.predicted)[0, 1] < 0.9  # ... but not the size


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES)
def test_surprisal_is_the_sum_of_token_entropies_and_a_martingale(language):
    every, decomposition = theory.list_responses(language), theory.decompose_surprisal(language)
    assert every.prob_R.sum() == pytest.approx(1)
    for prompt in language.prompts:  # H(s) by recursion equals the mean surprisal over all responses
        own_R = every.prompt_R == prompt
        assert every.prob_R[own_R] @ every.relative_R[own_R] == pytest.approx(0, abs=1e-12)
    assert decomposition.martingale_mean < 1e-12
    assert decomposition.increments < 1e-12
    assert decomposition.tokenwise == pytest.approx(decomposition.martingale)
    parts = decomposition.predictable + decomposition.martingale + decomposition.twice_covariance
    assert parts == pytest.approx(decomposition.surprisal)
    assert decomposition.sum_correlation > 0.7


def test_mean_token_entropy_is_a_proxy_but_not_in_every_language():
    assert theory.decompose_surprisal(LANGUAGES["ordinary"]).mean_correlation > 0.2
    routine = theory.decompose_surprisal(LANGUAGES["routine"])
    assert routine.mean_correlation < -0.5
    assert routine.predictable > routine.surprisal  # the predictable part may vary more than the surprisal


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [theory.random_success(0.2), theory.good_endings, theory.usual_wins, theory.unusual_wins]
)
def test_failures_raise_entropy_and_successes_lower_it(rule):
    aem, reverse, placebo = (added_drift("ordinary", rule, arm) for arm in theory.ARMS)
    assert aem.failures.z > 5 and aem.successes.z < -5
    assert reverse.failures.z < -5 and reverse.successes.z > 5
    assert abs(placebo.failures.z) < 4 and abs(placebo.successes.z) < 4


def test_signs_are_opposite_if_mean_entropy_correlates_negatively_with_surprisal():
    aem = added_drift("routine", theory.random_success(0.5))
    assert aem.failures.z < -5 and aem.successes.z > 5


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_share_of_failures_alone_causes_no_net_drift(share):
    """Advantages have mean 0 in each group. If success is independent of surprisal, both sides cancel."""
    assert abs(added_drift("ordinary", theory.random_success(share)).net.z) < 4


@pytest.mark.slow
def test_success_that_depends_on_surprisal_causes_net_drift():
    usual, unusual = added_drift("ordinary", theory.usual_wins), added_drift("ordinary", theory.unusual_wins)
    assert usual.net.z > 4 and unusual.net.z < -4


def test_expected_visits_match_samples():
    language, rng = LANGUAGES["ordinary"], np.random.default_rng(0)
    prompt_N = rng.choice(language.prompts, 20_000)
    context_NT, _, live_NT = theory.sample_responses(language, prompt_N, rng)
    visits_C = np.bincount(context_NT[live_NT], minlength=len(language.next_CV))
    assert visits_C == pytest.approx(theory.expected_visits(language, prompt_N), rel=0.05)


@pytest.mark.slow
def test_learning_keeps_more_entropy_with_aem_and_less_with_reversed():
    none, aem, reverse = (
        theory.learn(LANGUAGES["ordinary"], lam, seeds=3, steps=30) for lam in theory.LEARNERS.values()
    )
    assert (aem.entropy_SK[:, -1] > none.entropy_SK[:, -1] + 0.1).all()
    assert (reverse.entropy_SK[:, -1] < none.entropy_SK[:, -1] - 0.1).all()
    assert all((curve.success_SK[:, -1] > curve.success_SK[:, 0] + 0.3).all() for curve in (none, aem, reverse))


@pytest.mark.parametrize("lam", [0.5, 1.0, 2.0, 4.0])
def test_alpha_minimises_entropy_plus_divergence_from_uniform(lam):
    assert theory.variational_gap(np.random.default_rng(2), lam) < 1e-4


def without_end(language):
    """The same words without the end token: all responses have the maximum length."""
    words_CV = language.next_CV[:, :-1] / language.next_CV[:, :-1].sum(-1, keepdims=True)
    return theory.Language(np.pad(words_CV, ((0, 0), (0, 1))), language.longest)


@pytest.mark.parametrize(
    ("language", "smallest", "largest"),
    [
        (without_end(LANGUAGES["ordinary"]), 0.0, 0.5),
        (LANGUAGES["ordinary"], 0.9, 1.1),
        (LANGUAGES["routine"], 1.1, 9.0),
    ],
    ids=["equal lengths", "ordinary", "routine"],
)
def test_mean_surprisal_from_token_entropies_is_unbiased(language, smallest, largest):
    """H(s) from the token entropies of m other responses has the same mean as from their surprisals: H(s).

    With equal lengths, its mean squared error is less than half. In the routine language, long responses consist of small
    choices, the token entropies vary more than the surprisal, and the error is larger.
    """
    every, m, rng = theory.list_responses(language), 4, np.random.default_rng(0)
    squares = np.zeros(2)
    for prompt in language.prompts:
        own_R = np.flatnonzero(every.prompt_R == prompt)
        p_R = every.prob_R[own_R] / every.prob_R[own_R].sum()
        drawn_N = rng.choice(own_R, 5_000 * (m + 1), p=p_R)
        surprisal_N, entropy_N = (
            torch.from_numpy(v_RT.sum(-1)[drawn_N]) for v_RT in (every.surprisal_RT, every.entropy_RT)
        )
        state_N = torch.arange(5_000).repeat_interleave(m + 1)
        for i, by_N in enumerate((entropy_N, surprisal_N)):
            estimate_N = diagnostics.relative_surprisal(surprisal_N, by_N, state_N).numpy()
            error_N = (estimate_N - every.relative_R[drawn_N])[:: m + 1]  # one response of each state: independent
            assert abs(error_N.mean()) < 4 * error_N.std() / len(error_N) ** 0.5
            squares[i] += (error_N**2).mean()
    assert smallest < squares[0] / squares[1] < largest
