"""Checks AEM's theory on small exact models: `python tests/bench/theory.py [FOLDER]` prints one section per claim.

A tabular softmax has entropies and natural gradients in closed form. A small Markov language has few enough responses to list
all of them. Each section states a claim, computes both sides, and says where the claim does not hold. No section is about a
language model that is trained with Adam and a clipped ratio.

Shapes: A actions of a bandit, C contexts of a language (its words, then its prompts), V tokens (its words, then the end token),
R responses, T tokens of a response, N sampled responses, G groups, M trajectories of a group, K turns, S seeds.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, xlogy

from aem_exp import aem
from aem_exp.training import controls

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#595959"  # the Okabe-Ito palette of all our figures
ARMS = {"aem": 1.0, "reversed": -1.0, "shuffled": 1.0}  # lambda
LEARNERS = {"none": 0.0, "aem": 1.0, "reversed": -1.0}

# ------------------------------------------------------------------------------------- 1. one step of a tabular policy


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis."""
    return -xlogy(p, p).sum(-1)


@dataclass(frozen=True)
class Drift:
    """Rate of change of the entropy when one action is reinforced; one value per policy, action and sign of A.

    Attributes:
        predicted: A (S - H), the claim for the natural gradient.
        natural, plain: finite differences along the natural and the plain gradient of A log p.
        plain_predicted: A (p (S - H) - sum p^2 (S - H)), the closed form for the plain gradient.
    """

    predicted: np.ndarray
    natural: np.ndarray
    plain: np.ndarray
    plain_predicted: np.ndarray


def measure_drift(rng: np.random.Generator, policies: int = 200, actions: int = 8) -> Drift:
    """Measure the drift of random tabular policies."""
    rows = []
    for _ in range(policies):
        logit_A = rng.normal(0, rng.uniform(0.2, 2.5), actions)
        p_A = np.exp(log_softmax(logit_A))
        relative_A = -np.log(p_A) - entropy(p_A)
        for a in range(actions):
            for advantage in (1.0, -1.0):
                score_A = advantage * (np.eye(actions)[a] - p_A)
                natural_A = advantage * np.eye(actions)[a] / p_A[a]
                fisher_AA = np.diag(p_A) - np.outer(p_A, p_A)
                assert np.allclose(fisher_AA @ natural_A, score_A, atol=1e-12), "not the natural gradient"
                plain = advantage * (p_A[a] * relative_A[a] - (p_A**2 * relative_A).sum())
                slopes = [_slope(logit_A, direction_A) for direction_A in (natural_A, score_A)]
                rows.append((advantage * relative_A[a], *slopes, plain))
    return Drift(*np.array(rows).T)


def _slope(logit_A: np.ndarray, direction_A: np.ndarray) -> float:
    """Central difference of H. No logit changes by more than 1e-4, because the natural gradient of rare actions is large."""
    step = 1e-4 / float(np.abs(direction_A).max())
    ends = [entropy(np.exp(log_softmax(logit_A + sign * step * direction_A))) for sign in (1, -1)]
    return float(ends[0] - ends[1]) / (2 * step)


# ------------------------------------------------------------------------------ 2. all responses of a small language


@dataclass(frozen=True)
class Language:
    """A Markov chain that generates words until the end token or `longest` tokens.

    Attributes:
        next_CV: probability of the next token after each context.
        longest: maximum number of tokens of a response, including the end token.
        description: describes the language in the output.
    """

    next_CV: np.ndarray
    longest: int
    description: str = ""

    @property
    def words(self) -> int:
        return self.next_CV.shape[1] - 1

    @property
    def prompts(self) -> range:
        return range(self.words, len(self.next_CV))

    def response_entropy(self) -> np.ndarray:
        """(C,) H(s), the entropy of whole responses after each context, by backward recursion."""
        later_V = np.zeros(self.words + 1)
        for _ in range(self.longest):
            entropy_C = entropy(self.next_CV) + self.next_CV @ later_V
            later_V[:-1] = entropy_C[: self.words]
        return entropy_C


@dataclass(frozen=True)
class Responses:
    """All responses of a language to its prompts. The prompts are equally likely."""

    prob_R: np.ndarray
    prompt_R: np.ndarray
    surprisal_RT: np.ndarray
    """-log p of each token; 0 after the end of the response"""
    entropy_RT: np.ndarray
    """entropy of the distribution of each token; 0 after the end of the response"""
    tokens_R: np.ndarray
    """number of tokens"""
    final_R: np.ndarray
    """the last word; the prompt if there is no word"""
    relative_R: np.ndarray
    """S - H(s)"""

    @property
    def surprisal_R(self) -> np.ndarray:
        return self.surprisal_RT.sum(-1)

    @property
    def mean_entropy_R(self) -> np.ndarray:
        return self.entropy_RT.sum(-1) / self.tokens_R


def list_responses(language: Language) -> Responses:
    """List all responses of a language."""
    rows: list[tuple] = []

    def extend(context: int, prompt: int, prob: float, surprisals: list[float], entropies: list[float]) -> None:
        entropies = [*entropies, float(entropy_C[context])]
        for token in np.flatnonzero(language.next_CV[context]).tolist():
            p = float(language.next_CV[context, token])
            longer, is_end = [*surprisals, -float(np.log(p))], token == language.words
            if is_end or len(longer) == language.longest:
                rows.append((prob * p, prompt, longer, entropies, context if is_end else token))
            else:
                extend(token, prompt, prob * p, longer, entropies)

    entropy_C = entropy(language.next_CV)
    for prompt in language.prompts:
        extend(prompt, prompt, 1 / len(language.prompts), [], [])
    prob, prompt, surprisals, entropies, final = zip(*rows, strict=True)
    padded = [np.array([[*x, *[0.0] * (language.longest - len(x))] for x in xs]) for xs in (surprisals, entropies)]
    relative_R = padded[0].sum(-1) - language.response_entropy()[list(prompt)]
    tokens_R = np.array([len(x) for x in surprisals])
    return Responses(np.array(prob), np.array(prompt), *padded, tokens_R, np.array(final), relative_R)


def make_ordinary(rng: np.random.Generator) -> Language:
    """A language in which mean token entropy correlates with surprisal."""
    description = "Some contexts have a likely next word, others do not; the end has the same probability in all."
    words, prompts, end = 4, 3, 0.2
    concentration_C = np.tile([0.15, 5.0], words)[: words + prompts]
    words_CV = np.array([rng.dirichlet(np.full(words, concentration)) for concentration in concentration_C])
    words_CV = 0.96 * words_CV + 0.04 / words  # no word is impossible
    return Language(np.hstack([(1 - end) * words_CV, np.full((len(concentration_C), 1), end)]), 6, description)


def make_routine() -> Language:
    """A language in which mean token entropy correlates negatively with surprisal."""
    description = "The first token is uniform, the end included; later words are small choices between two."
    words, prompts, end = 4, 2, 0.08
    next_CV = np.zeros((words + prompts, words + 1))
    for word in range(words):
        next_CV[word, [word, (word + 1) % words, words]] = (0.75 - end, 0.25, end)
    next_CV[words:] = 1 / (words + 1)
    return Language(next_CV, 8, description)


@dataclass(frozen=True)
class DoobDecomposition:
    """S = sum of H_k + a martingale, within each prompt: variances, and correlations with S - H."""

    martingale_mean: float
    """the largest absolute mean of the martingale at a prompt; 0 in theory"""
    increments: float
    """the largest |E m_j m_k| of two increments, j != k; 0 in theory"""
    predictable: float
    """variance of the summed token entropies"""
    martingale: float
    """variance of the martingale"""
    twice_covariance: float
    """twice the covariance of the two"""
    surprisal: float
    """variance of S - H"""
    tokenwise: float
    """expected sum of the variances of the tokens; in theory, the variance of the martingale"""
    sum_correlation: float
    """correlation of S - H with the summed token entropies minus their mean at the prompt"""
    mean_correlation: float
    """correlation of S - H with the mean token entropy, as in AEM, over all prompts"""
    length_correlation: float
    """correlation of the mean token entropy with the number of tokens"""
    same_length: float
    """`mean_correlation` among responses of equal length"""


def decompose_surprisal(language: Language) -> DoobDecomposition:
    """Compute the Doob decomposition of the surprisal of a language."""
    every = list_responses(language)
    p_R, prompt_R = every.prob_R, language.response_entropy()[every.prompt_R]
    step_RT = every.surprisal_RT - every.entropy_RT
    predictable_R, martingale_R = every.entropy_RT.sum(-1) - prompt_R, step_RT.sum(-1)
    moments_TT = step_RT.T @ (p_R[:, None] * step_RT)
    means = [(p_R * martingale_R)[every.prompt_R == prompt].sum() for prompt in language.prompts]
    return DoobDecomposition(
        martingale_mean=max(map(abs, means)),
        increments=float(np.abs(moments_TT - np.diag(np.diag(moments_TT))).max()),
        predictable=float(p_R @ predictable_R**2),
        martingale=float(p_R @ martingale_R**2),
        twice_covariance=2 * float(p_R @ (predictable_R * martingale_R)),
        surprisal=float(p_R @ every.relative_R**2),
        tokenwise=float(np.trace(moments_TT)),
        sum_correlation=correlation(predictable_R, every.relative_R, p_R),
        mean_correlation=correlation(every.mean_entropy_R, every.relative_R, p_R),
        length_correlation=correlation(every.mean_entropy_R, every.tokens_R, p_R),
        same_length=correlation(*(_centre_by_length(x, every) for x in (every.mean_entropy_R, every.relative_R)), p_R),
    )


def _centre_by_length(value_R: np.ndarray, every: Responses) -> np.ndarray:
    """Subtract the mean over the responses of the same length."""
    sums_T = np.bincount(every.tokens_R, every.prob_R * value_R)
    return value_R - (sums_T / np.maximum(np.bincount(every.tokens_R, every.prob_R), 1e-300))[every.tokens_R]


def correlation(x_R: np.ndarray, y_R: np.ndarray, p_R: np.ndarray) -> float:
    """Pearson's correlation under the probabilities `p_R`."""
    x_R, y_R = x_R - p_R @ x_R, y_R - p_R @ y_R
    return float(p_R @ (x_R * y_R) / np.sqrt((p_R @ x_R**2) * (p_R @ y_R**2)))


# ------------------------------------------------------------------------------------------- 3. the drift AEM adds


@dataclass(frozen=True)
class Estimate:
    """A mean over groups, and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} +- {self.error:.4f}"

    @property
    def z(self) -> float:
        return self.value / self.error


@dataclass(frozen=True)
class AddedDrift:
    """AEM's additional drift A (alpha - 1)(S - H): its mean over failures, over successes, and over all responses (net)."""

    failures: Estimate
    successes: Estimate
    net: Estimate


Rule = Callable[
    [np.ndarray, np.ndarray, np.random.Generator], np.ndarray
]  # last words and S - H (G, M, K) -> won (G, M)


def random_success(share: float) -> Rule:
    """Success is independent of the responses."""
    return lambda final_GMK, relative_GMK, rng: rng.random(final_GMK.shape[:2]) < share


def good_endings(final_GMK: np.ndarray, relative_GMK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Success has probability 0.9 if at least two turns end with word 0 or 1, else 0."""
    return ((final_GMK <= 1).sum(-1) >= 2) & (rng.random(final_GMK.shape[:2]) < 0.9)


def usual_wins(final_GMK: np.ndarray, relative_GMK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Trajectories of low surprisal succeed more often."""
    return rng.random(final_GMK.shape[:2]) < 1 / (1 + np.exp(relative_GMK.sum(-1)))


def unusual_wins(final_GMK: np.ndarray, relative_GMK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Trajectories of high surprisal succeed more often."""
    return ~usual_wins(final_GMK, relative_GMK, rng)


def estimate_added_drift(
    language: Language, rule: Rule, arm: str, rng: np.random.Generator, groups: int = 4000, turns: int = 3
) -> AddedDrift:
    """Sample groups of 8 trajectories. Each turn has a random prompt; advantages are group-normalised returns."""
    every, shape = list_responses(language), (groups, 8, turns)
    r_GMK = rng.choice(len(every.prob_R), shape, p=every.prob_R / every.prob_R.sum())
    relative_GMK = every.relative_R[r_GMK]
    won_GM = rule(every.final_R[r_GMK], relative_GMK, rng).astype(float)
    spread_G = won_GM.std(1)
    advantage_GM = (won_GM - won_GM.mean(1, keepdims=True)) / np.where(spread_G > 0, spread_G, 1.0)[:, None]
    group_R = torch.arange(groups).repeat_interleave(8 * turns)
    alpha_R = aem.coefficients(torch.from_numpy(every.mean_entropy_R[r_GMK]).flatten(), group_R, ARMS[arm])
    alpha_R = controls.shuffle_coefficients(alpha_R, group_R, rng) if arm == "shuffled" else alpha_R
    drift_GMK = advantage_GM[..., None] * (alpha_R.double().numpy().reshape(shape) - 1) * relative_GMK
    return AddedDrift(
        *(_mean(drift_GMK, np.broadcast_to(is_GM[..., None], shape)) for is_GM in (advantage_GM < 0, advantage_GM > 0)),
        net=_mean(drift_GMK, np.ones(shape, bool)),
    )


def _mean(value_GMK: np.ndarray, chosen_GMK: np.ndarray) -> Estimate:
    """Mean over the chosen responses. Its standard error assumes independent groups only (delta method for a ratio)."""
    sums_G, counts_G = (value_GMK * chosen_GMK).sum((1, 2)), chosen_GMK.sum((1, 2))
    value = sums_G.sum() / counts_G.sum()
    rest_G = sums_G - value * counts_G
    return Estimate(float(value), float(np.sqrt((rest_G**2).sum()) / counts_G.sum()))


# ------------------------------------------------------------------------------------------------------ 4. learning


@dataclass(frozen=True)
class Curve:
    """Exact response entropy (nats) and success probability, per seed, before each step and after the last step."""

    entropy_SK: np.ndarray
    success_SK: np.ndarray


def learn(language: Language, lam: float, seeds: int = 8, steps: int = 60, rate: float = 0.15) -> Curve:
    """Learn to end responses with the rarest word, with sampled natural gradients in groups of 16 responses."""
    histories = [_learn_one_seed(language, lam, np.random.default_rng(seed), steps, rate) for seed in range(seeds)]
    return Curve(*np.array(histories).transpose(2, 0, 1))


def _learn_one_seed(language: Language, lam: float, rng: np.random.Generator, steps: int, rate: float) -> list[tuple]:
    logit_CV = np.log(np.maximum(language.next_CV, 1e-3))  # so that impossible tokens can be learnt
    goal = int(expected_visits(language, np.array(language.prompts))[: language.words].argmin())  # the rarest word
    history = []
    for _ in range(steps + 1):
        now = Language(np.exp(log_softmax(logit_CV, axis=-1)), language.longest)
        history.append((now.response_entropy()[now.prompts].mean(), _success(now, goal)))
        logit_CV = logit_CV + rate * _natural_gradient(now, goal, lam, rng)
    return history


def _natural_gradient(
    now: Language, goal: int, lam: float, rng: np.random.Generator, groups: int = 16, members: int = 16
) -> np.ndarray:
    """(C, V) natural gradient of a step: summed advantages of the sampled tokens, divided by their expected counts.

    Counts below one are set to one; otherwise one sample of a rare token could change the policy completely.
    """
    prompt_N = np.repeat(rng.choice(now.prompts, groups), members)
    context_NT, token_NT, live_NT = sample_responses(now, prompt_N, rng)
    tokens_N = live_NT.sum(1)
    word_NT = live_NT & (token_NT < now.words)
    final_N = np.where(word_NT.any(1), token_NT[np.arange(len(token_NT)), word_NT.sum(1) - 1], -1)
    won_GM = (final_N == goal).reshape(groups, members).astype(float)
    advantage_N = (won_GM - won_GM.mean(1, keepdims=True)).flatten()
    entropy_N = (entropy(now.next_CV)[context_NT] * live_NT).sum(1) / tokens_N
    group_N = torch.arange(groups).repeat_interleave(members)
    alpha_N = aem.coefficients(torch.from_numpy(entropy_N), group_N, lam).double().numpy()
    step_CV = np.zeros_like(now.next_CV)
    np.add.at(step_CV, (context_NT[live_NT], token_NT[live_NT]), np.repeat(advantage_N * alpha_N, tokens_N))
    return step_CV / np.maximum(1.0, expected_visits(now, prompt_N)[:, None] * now.next_CV)


def sample_responses(now: Language, context_N: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Sample one response per prompt: its contexts, tokens, and a mask of its tokens, each (N, T)."""
    live_N, columns = np.ones(len(context_N), bool), []
    for _ in range(now.longest):
        draw_N = rng.random((len(context_N), 1))
        token_N = (now.next_CV[context_N].cumsum(-1)[:, :-1] < draw_N).sum(-1)
        columns.append((context_N, token_N, live_N))
        live_N = live_N & (token_N < now.words)
        context_N = np.minimum(token_N, now.words - 1)
    context_NT, token_NT, live_NT = (np.stack(column, 1) for column in zip(*columns, strict=True))
    return context_NT, token_NT, live_NT


def expected_visits(now: Language, prompt_N: np.ndarray) -> np.ndarray:
    """(C,) expected number of visits of each context."""
    current_C = np.bincount(prompt_N, minlength=len(now.next_CV)).astype(float)
    visits_C = np.zeros_like(current_C)
    for _ in range(now.longest):
        visits_C += current_C
        current_C = np.append((current_C @ now.next_CV)[:-1], np.zeros(len(now.prompts)))
    return visits_C


def _success(now: Language, goal: int) -> float:
    """Probability that the last word of a response is `goal`."""
    goal_C = (np.arange(len(now.next_CV)) == goal).astype(float)
    success_C = goal_C
    for _ in range(now.longest):
        success_C = now.next_CV[:, :-1] @ success_C[: now.words] + now.next_CV[:, -1] * goal_C
    return float(success_C[now.prompts].mean())


# --------------------------------------------------------------------------------- 5. alpha as the solution of a problem


def variational_gap(rng: np.random.Generator, lam: float, size: int = 12) -> float:
    """The largest gap between alpha and |G| w, where w minimises sum w Htilde + (1/lambda) sum w log(|G| w)."""
    entropy_R = rng.uniform(0.1, 2.0, size)
    unit_R = (entropy_R - entropy_R.min()) / np.ptp(entropy_R)
    solution = minimize(
        lambda w_R: w_R @ unit_R + xlogy(w_R, size * w_R).sum() / lam,
        np.full(size, 1 / size),
        jac=lambda w_R: unit_R + (np.log(size * w_R) + 1) / lam,
        bounds=[(1e-9, 1)] * size,
        constraints={"type": "eq", "fun": lambda w_R: w_R.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 1000},
        method="SLSQP",
    )
    alpha_R = aem.coefficients(torch.from_numpy(entropy_R), torch.zeros(size, dtype=torch.long), lam, gate=0.0)
    return float(np.abs(alpha_R.numpy() - size * solution.x).max())


# ------------------------------------------------------------------------------------------------------- the output


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    languages = {"ordinary": make_ordinary(np.random.default_rng(0)), "routine": make_routine()}
    print_drift(folder)
    print_decomposition(languages)
    print_added_drift(languages)
    print_success_shares(languages["ordinary"], folder)
    print_learning(languages, folder)
    print("\n5. alpha = |G| w, where w minimises sum w Htilde + (1/lambda) sum w log(|G| w) over the simplex, by scipy")
    for lam in (0.5, 1.0, 2.0, 4.0):
        print(f"   lambda {lam:<4} largest gap {variational_gap(np.random.default_rng(0), lam):.1e}")
    print(f"\nplots: {', '.join(str(file) for file in sorted(folder.glob('*.png')))}")


def print_drift(folder: Path) -> None:
    drift = measure_drift(np.random.default_rng(0))
    agree = np.sign(drift.plain) == np.sign(drift.predicted)
    print(
        f"1. A step on one sampled action changes the entropy by A (S - H): {len(agree):,} steps of a tabular softmax"
    )
    print(f"   natural gradient: largest gap to finite differences {_gap(drift.predicted, drift.natural):.1e}")
    print("   plain gradient:   the change is A (p (S - H) - sum p^2 (S - H)) instead; ", end="")
    print(f"largest gap {_gap(drift.plain_predicted, drift.plain):.1e}.")
    print(f"   It has the sign of A (S - H) in {agree.mean():.1%} of the steps, but another size: correlation ", end="")
    print(f"{np.corrcoef(drift.plain, drift.predicted)[0, 1]:.2f}.")
    print("   The next sections therefore assume natural gradients. The plain gradient weights an action by p.")
    with _figure(folder / "drift.png", 1) as (axes,):
        axes.plot(drift.predicted, drift.natural, ".", color=BLUE, label="natural gradient", markersize=3)
        axes.plot(drift.predicted, drift.plain, ".", color=ORANGE, label="plain gradient", markersize=3)
        axes.set(xlabel="A (S - H)", ylabel="change of entropy per unit of step", title="one sampled action")
        axes.legend(frameon=False)


def _gap(predicted: np.ndarray, measured: np.ndarray) -> float:
    return float(np.abs(predicted - measured).max())


def print_decomposition(languages: dict[str, Language]) -> None:
    print("\n2. S = sum of token entropies + a martingale, over all responses of a small Markov language")
    for name, language in languages.items():
        d = decompose_surprisal(language)
        parts = f"{d.predictable:.3f} + {d.martingale:.3f} {d.twice_covariance:+.3f}"
        print(f"   {name}, {len(list_responses(language).prob_R):,} responses. {language.description}")
        print(f"     martingale: mean {d.martingale_mean:.0e}, largest product of increments {d.increments:.0e}")
        print(f"     Var S = {d.surprisal:.3f} = {parts} (predictable, martingale, twice their covariance)")
        print(f"     correlation with S - H(s): summed token entropies {d.sum_correlation:+.2f}, ", end="")
        print(f"mean token entropy {d.mean_correlation:+.2f} ({d.same_length:+.2f} at equal length); ", end="")
        print(f"mean token entropy with length {d.length_correlation:+.2f}")
    print(
        "   The covariance is not 0, so the predictable part may vary more than S itself. If long responses consist of"
    )
    print("   small choices, the mean token entropy ranks responses in the opposite order of their surprisal.")


def print_added_drift(languages: dict[str, Language]) -> None:
    setting = "4,000 groups of 8 x 3 responses, lambda 1 (reversed: -1), gate 0.1"
    print(f"\n3. AEM adds the drift A (alpha - 1)(S - H): {setting}")
    rules = {
        "random, 20 %": random_success(0.2),
        "good endings": good_endings,
        "usual wins": usual_wins,
        "unusual wins": unusual_wins,
    }
    print(f"   {'language':<10}{'success':<18}{'arm':<10}{'failures':>20}{'successes':>20}{'net':>20}")
    for name, language in languages.items():
        for title, rule in rules.items():
            for arm in ARMS:
                a = estimate_added_drift(language, rule, arm, np.random.default_rng(0))
                values = f"{a.failures!s:>20}{a.successes!s:>20}{a.net!s:>20}"
                print(f"   {name:<10}{title:<18}{arm:<10}{values}", flush=True)
    print("   Ordinary: failures raise the entropy and successes lower it; reversed swaps them, shuffled does neither.")
    print("   Routine: all signs are opposite, because mean token entropy correlates negatively with surprisal.")


def print_success_shares(language: Language, folder: Path) -> None:
    print("\n   Does the share of failures change the net drift? Ordinary language, random success:")
    shares = (0.1, 0.3, 0.5, 0.7, 0.9)
    estimates = [
        estimate_added_drift(language, random_success(share), "aem", np.random.default_rng(0)) for share in shares
    ]
    for share, a in zip(shares, estimates, strict=True):
        print(f"   success {share:.0%}: failures {a.failures}, successes {a.successes}, net {a.net}")
    print("   No: advantages with mean 0 weight failures and successes equally. The net is the covariance of A with")
    print("   (alpha - 1)(S - H), so it needs a success that depends on the surprisal of the responses.")
    with _figure(folder / "added.png", 1) as (axes,):
        for part, colour, mark in (("failures", ORANGE, "o"), ("successes", BLUE, "s"), ("net", GREY, "^")):
            values = [getattr(a, part) for a in estimates]
            errors = [1.96 * value.error for value in values]
            axes.errorbar(shares, [v.value for v in values], errors, color=colour, marker=mark, capsize=3, label=part)
        axes.axhline(0, color=GREY, linestyle=":", linewidth=1)
        axes.set(xlabel="share of successes", ylabel="mean of A (alpha - 1)(S - H)", title="drift added by AEM")
        axes.legend(frameon=False)


def print_learning(languages: dict[str, Language], folder: Path) -> None:
    setting = "sampled natural gradient, 8 seeds, 60 steps; response entropy in nats (difference to none)"
    print(f"\n4. Learning to end responses with the rarest word: {setting}")
    colours = {"none": GREY, "aem": BLUE, "reversed": ORANGE}
    styles = {"none": ":", "aem": "-", "reversed": "--"}
    with _figure(folder / "learning.png", 4) as panels:
        for (name, language), axes in zip(languages.items(), (panels[:2], panels[2:]), strict=True):
            curves = {arm: learn(language, lam) for arm, lam in LEARNERS.items()}
            for arm, curve in curves.items():
                difference_SK = curve.entropy_SK - curves["none"].entropy_SK
                values = "  ".join(
                    f"{step:>2}: {curve.entropy_SK[:, step].mean():.2f} ({_over_seeds(difference_SK[:, step])})"
                    for step in (10, 20, 40, 60)
                )
                print(f"   {name:<10}{arm:<10}{values}  at 80 % success: {entropy_at(curve, 0.8):.2f}", flush=True)
                style = {"color": colours[arm], "linestyle": styles[arm], "label": arm}
                for ax, value_SK in zip(axes, (curve.entropy_SK, curve.success_SK), strict=True):
                    ax.plot(value_SK.mean(0), **style)
            axes[0].set(title=f"{name}: response entropy (nats)", xlabel="step")
            axes[1].set(title=f"{name}: success", xlabel="step", ylim=(0, 1))
            axes[0].legend(frameon=False)
    print(
        "   Ordinary: AEM keeps more entropy and learns more slowly; part of the difference remains at equal success."
    )
    print("   Routine: at first the opposite, until learning has changed the statistics of the language.")


def entropy_at(curve: Curve, success: float) -> float:
    """Mean response entropy at the step where each seed first reaches this success: a comparison at equal progress."""
    first_S = (curve.success_SK >= success).argmax(1)
    return float(curve.entropy_SK[np.arange(len(first_S)), first_S].mean())


def _over_seeds(value_S: np.ndarray) -> str:
    return f"{value_S.mean():+.2f} +- {value_S.std(ddof=1) / len(value_S) ** 0.5:.2f}"


@contextmanager
def _figure(file: Path, panels: int) -> Iterator[list]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 11,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context(style):
        rows = 2 if panels > 2 else 1
        size = {"figsize": (5 * panels / rows, 3.8 * rows), "squeeze": False, "constrained_layout": True}
        figure, axes = pyplot.subplots(rows, panels // rows, **size)
        yield list(axes.flat)
        figure.savefig(file, dpi=150)
        pyplot.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/theory"))
