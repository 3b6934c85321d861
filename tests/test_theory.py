"""The theory, by the functions of `theory.py`; each test is a claim, or where a claim ends."""

import numpy as np
import pytest
from bench import theory

LANGUAGES = {"ordinary": theory.ordinary(np.random.default_rng(0)), "routine": theory.routine()}


def added(language, rule, arm="aem", seed=1):
    return theory.added(LANGUAGES[language], rule, arm, np.random.default_rng(seed), groups=1000)


def test_entropy_moves_by_advantage_times_relative_surprisal_under_a_natural_gradient():
    found = theory.drift(np.random.default_rng(1), policies=50)
    assert found.natural == pytest.approx(found.said, abs=1e-5)
    assert (found.said > 0).any() and (found.said < 0).any()


def test_the_plain_gradient_does_something_else_in_closed_form():
    found = theory.drift(np.random.default_rng(1), policies=50)
    assert found.plain == pytest.approx(found.plain_said, abs=1e-6)
    agree = (np.sign(found.plain) == np.sign(found.said)).mean()
    assert 0.8 < agree < 1  # mostly the sign, not always ...
    assert np.corrcoef(found.plain, found.said)[0, 1] < 0.9  # ... and not the size


@pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES)
def test_surprisal_is_token_entropies_and_a_martingale(language):
    said, found = theory.listed(language), theory.doob(language)
    assert said.prob_R.sum() == pytest.approx(1)
    for prompt in language.prompts:  # two ways to the entropy of a response
        own_R = said.prompt_R == prompt
        assert said.prob_R[own_R] @ said.relative_R[own_R] == pytest.approx(0, abs=1e-12)
    assert found.martingale_mean < 1e-12
    assert found.increments < 1e-12
    assert found.tokenwise == pytest.approx(found.martingale)
    assert found.predictable + found.martingale + found.twice_covariance == pytest.approx(found.surprisal)
    assert found.sum_correlation > 0.7


def test_mean_token_entropy_is_a_proxy_but_not_in_every_language():
    assert theory.doob(LANGUAGES["ordinary"]).mean_correlation > 0.2
    routine = theory.doob(LANGUAGES["routine"])
    assert routine.mean_correlation < -0.5
    assert routine.predictable > routine.surprisal  # nor is the predictable part always the calmer one


@pytest.mark.parametrize("rule", [theory.coin(0.2), theory.good_endings, theory.beaten_track, theory.unlikely_wins])
def test_failures_push_entropy_up_and_successes_pull_it_down(rule):
    aem, backwards, placebo = (added("ordinary", rule, arm) for arm in theory.ARMS)
    assert aem.failures.z > 5 and aem.successes.z < -5
    assert backwards.failures.z < -5 and backwards.successes.z > 5
    assert abs(placebo.failures.z) < 4 and abs(placebo.successes.z) < 4


def test_where_mean_entropy_goes_against_surprisal_both_signs_are_the_opposite():
    aem = added("routine", theory.coin(0.5))
    assert aem.failures.z < -5 and aem.successes.z > 5


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_of_failures_alone_moves_no_net(share):
    """Advantages have mean 0 in each group, so a success that is independent of surprisal leaves nothing over."""
    assert abs(added("ordinary", theory.coin(share)).net.z) < 4


def test_a_success_that_depends_on_surprisal_leaves_a_net():
    usual, unusual = added("ordinary", theory.beaten_track), added("ordinary", theory.unlikely_wins)
    assert usual.net.z > 4 and unusual.net.z < -4


def test_the_count_of_visits_is_that_of_samples():
    language, rng = LANGUAGES["ordinary"], np.random.default_rng(0)
    prompt_N = rng.choice(language.prompts, 20_000)
    context_NT, _, live_NT = theory._sample(language, prompt_N, rng)
    seen_C = np.bincount(context_NT[live_NT], minlength=len(language.next_CV))
    assert seen_C == pytest.approx(theory._visits(language, prompt_N), rel=0.05)


def test_learning_keeps_entropy_with_aem_and_loses_it_reversed():
    none, aem, backwards = (
        theory.learn(LANGUAGES["ordinary"], lam, seeds=3, steps=30) for lam in theory.LEARNERS.values()
    )
    assert (aem.entropy_SK[:, -1] > none.entropy_SK[:, -1] + 0.1).all()
    assert (backwards.entropy_SK[:, -1] < none.entropy_SK[:, -1] - 0.1).all()
    assert all((curve.success_SK[:, -1] > curve.success_SK[:, 0] + 0.3).all() for curve in (none, aem, backwards))


@pytest.mark.parametrize("lam", [0.5, 1.0, 2.0, 4.0])
def test_alpha_minimises_entropy_plus_distance_from_uniform(lam):
    assert theory.variational(np.random.default_rng(2), lam) < 1e-4
