"""What AEM's theory says, computed where it can be exact: `python tests/bench/theory.py [FOLDER]` tells it, cell by cell.

A tabular softmax has entropies and natural gradients in closed form; a small Markov language has few enough responses to list
them all. Each cell states a claim, computes both sides, and says where it does not hold. None of this is a language model
under Adam with a clipped ratio.

Shapes: A actions of a bandit, C contexts of a language (its words, then its prompts), V tokens (its words, then the end),
R responses, T tokens of a response, G groups, M trajectories of a group, K turns.
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
from aem_exp.training import modulation

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#595959"  # Okabe and Ito, as everywhere
ARMS = {"aem": 1.0, "reversed": -1.0, "shuffled": 1.0}  # lambda
LEARNERS = {"none": 0.0, "aem": 1.0, "reversed": -1.0}

# ------------------------------------------------------------------------------------- 1. one step of a tabular policy


def entropy(p: np.ndarray) -> np.ndarray:
    """In nats, over the last axis."""
    return -xlogy(p, p).sum(-1)


@dataclass(frozen=True)
class Drift:
    """How fast the entropy moves as one action is reinforced, each action of each policy with both signs of A.

    Attributes:
        said: A (S - H).
        natural, plain: what finite differences find along the natural and the plain gradient of A log p.
        plain_said: A (p (S - H) - sum p^2 (S - H)).
    """

    said: np.ndarray
    natural: np.ndarray
    plain: np.ndarray
    plain_said: np.ndarray


def drift(rng: np.random.Generator, policies: int = 200, actions: int = 8) -> Drift:
    rows = []
    for _ in range(policies):
        logit_A = rng.normal(0, rng.uniform(0.2, 2.5), actions)
        p_A = np.exp(log_softmax(logit_A))
        apart_A = -np.log(p_A) - entropy(p_A)
        for a in range(actions):
            for advantage in (1.0, -1.0):
                score_A = advantage * (np.eye(actions)[a] - p_A)
                natural_A = advantage * np.eye(actions)[a] / p_A[a]
                fisher_AA = np.diag(p_A) - np.outer(p_A, p_A)
                assert np.allclose(fisher_AA @ natural_A, score_A, atol=1e-12), "not the natural gradient"
                plain = advantage * (p_A[a] * apart_A[a] - (p_A**2 * apart_A).sum())
                found = [_slope(logit_A, along_A) for along_A in (natural_A, score_A)]
                rows.append((advantage * apart_A[a], *found, plain))
    return Drift(*np.array(rows).T)


def _slope(logit_A: np.ndarray, along_A: np.ndarray) -> float:
    """Central difference of H; no logit moves by more than 1e-4, as a rare action's natural gradient is long."""
    step = 1e-4 / float(np.abs(along_A).max())
    ends = [entropy(np.exp(log_softmax(logit_A + sign * step * along_A))) for sign in (1, -1)]
    return float(ends[0] - ends[1]) / (2 * step)


# ---------------------------------------------------------------------------------------------- 2. a language, listed


@dataclass(frozen=True)
class Language:
    """A Markov chain that says words until it ends, or has said `longest` tokens.

    Attributes:
        next_CV: probability of the next token after each context.
        longest: tokens of a response, at most; the end is one.
        nature: what it is like, in words.
    """

    next_CV: np.ndarray
    longest: int
    nature: str = ""

    @property
    def words(self) -> int:
        return self.next_CV.shape[1] - 1

    @property
    def prompts(self) -> range:
        return range(self.words, len(self.next_CV))

    def ahead(self) -> np.ndarray:
        """H(s), the entropy of whole responses after each context, by backward recursion."""
        later_V = np.zeros(self.words + 1)
        for _ in range(self.longest):
            ahead_C = entropy(self.next_CV) + self.next_CV @ later_V
            later_V[:-1] = ahead_C[: self.words]
        return ahead_C


@dataclass(frozen=True)
class Responses:
    """All that a language can say after any of its prompts, which are equally likely."""

    prob_R: np.ndarray
    prompt_R: np.ndarray
    surprisal_RT: np.ndarray  # -log p of each token; 0 beyond the response, as in the next
    entropy_RT: np.ndarray  # of the distribution that the token was drawn from
    tokens_R: np.ndarray
    final_R: np.ndarray  # the last word, or the prompt
    relative_R: np.ndarray  # S - H(s)

    @property
    def surprisal_R(self) -> np.ndarray:
        return self.surprisal_RT.sum(-1)

    @property
    def mean_entropy_R(self) -> np.ndarray:
        return self.entropy_RT.sum(-1) / self.tokens_R


def listed(language: Language) -> Responses:
    rows: list[tuple] = []

    def say(context: int, prompt: int, prob: float, surprisals: list[float], entropies: list[float]) -> None:
        entropies = [*entropies, float(entropy_C[context])]
        for token in np.flatnonzero(language.next_CV[context]).tolist():
            p = float(language.next_CV[context, token])
            said, over = [*surprisals, -float(np.log(p))], token == language.words
            if over or len(said) == language.longest:
                rows.append((prob * p, prompt, said, entropies, context if over else token))
            else:
                say(token, prompt, prob * p, said, entropies)

    entropy_C = entropy(language.next_CV)
    for prompt in language.prompts:
        say(prompt, prompt, 1 / len(language.prompts), [], [])
    prob, prompt, surprisals, entropies, final = zip(*rows, strict=True)
    padded = [np.array([[*x, *[0.0] * (language.longest - len(x))] for x in xs]) for xs in (surprisals, entropies)]
    relative_R = padded[0].sum(-1) - language.ahead()[list(prompt)]
    tokens_R = np.array([len(x) for x in surprisals])
    return Responses(np.array(prob), np.array(prompt), *padded, tokens_R, np.array(final), relative_R)


def ordinary(rng: np.random.Generator) -> Language:
    nature = "Some contexts know what comes next, others do not; each ends with the same probability."
    words, prompts, end = 4, 3, 0.2
    sure_C = np.tile([0.15, 5.0], words)[: words + prompts]
    words_CV = np.array([rng.dirichlet(np.full(words, sure)) for sure in sure_C])
    words_CV = 0.96 * words_CV + 0.04 / words  # nothing is impossible
    return Language(np.hstack([(1 - end) * words_CV, np.full((len(sure_C), 1), end)]), 6, nature)


def routine() -> Language:
    nature = "Everything is open at first, the end included; once begun, a response goes on by small choices of two."
    words, prompts, end = 4, 2, 0.08
    next_CV = np.zeros((words + prompts, words + 1))
    for word in range(words):
        next_CV[word, [word, (word + 1) % words, words]] = (0.75 - end, 0.25, end)
    next_CV[words:] = 1 / (words + 1)
    return Language(next_CV, 8, nature)


@dataclass(frozen=True)
class Doob:
    """S = sum of H_k + a martingale, within each prompt: variances, and correlations with S - H."""

    martingale_mean: float
    increments: float  # the largest |E m_j m_k|, j != k
    predictable: float  # variances
    martingale: float
    twice_covariance: float
    surprisal: float
    tokenwise: float  # the expected sum of the tokens' own variances, which is the martingale's
    sum_correlation: float  # of S - H with the summed token entropies, less their mean at the prompt
    mean_correlation: float  # ... with the mean token entropy, as AEM takes it, prompts mixed
    length_correlation: float  # of the mean token entropy with the number of tokens
    same_length: float  # `mean_correlation` among responses of one length


def doob(language: Language) -> Doob:
    said = listed(language)
    p_R, prompt_C = said.prob_R, language.ahead()[said.prompt_R]
    step_RT = said.surprisal_RT - said.entropy_RT
    own_R, rest_R = said.entropy_RT.sum(-1) - prompt_C, step_RT.sum(-1)
    moments_TT = step_RT.T @ (p_R[:, None] * step_RT)
    means = [(p_R * rest_R)[said.prompt_R == prompt].sum() for prompt in language.prompts]
    return Doob(
        martingale_mean=max(map(abs, means)),
        increments=float(np.abs(moments_TT - np.diag(np.diag(moments_TT))).max()),
        predictable=float(p_R @ own_R**2),
        martingale=float(p_R @ rest_R**2),
        twice_covariance=2 * float(p_R @ (own_R * rest_R)),
        surprisal=float(p_R @ said.relative_R**2),
        tokenwise=float(np.trace(moments_TT)),
        sum_correlation=correlation(own_R, said.relative_R, p_R),
        mean_correlation=correlation(said.mean_entropy_R, said.relative_R, p_R),
        length_correlation=correlation(said.mean_entropy_R, said.tokens_R, p_R),
        same_length=correlation(*(_less_mean(x, said) for x in (said.mean_entropy_R, said.relative_R)), p_R),
    )


def _less_mean(value_R: np.ndarray, said: Responses) -> np.ndarray:
    """A value less its mean over the responses of the same length."""
    sums_T = np.bincount(said.tokens_R, said.prob_R * value_R)
    return value_R - (sums_T / np.maximum(np.bincount(said.tokens_R, said.prob_R), 1e-300))[said.tokens_R]


def correlation(x_R: np.ndarray, y_R: np.ndarray, p_R: np.ndarray) -> float:
    x_R, y_R = x_R - p_R @ x_R, y_R - p_R @ y_R
    return float(p_R @ (x_R * y_R) / np.sqrt((p_R @ x_R**2) * (p_R @ y_R**2)))


# ------------------------------------------------------------------------------------------------- 3. what AEM adds


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
class Added:
    """AEM's extra drift A (alpha - 1)(S - H): its mean over failures, over successes, and over all responses."""

    failures: Estimate
    successes: Estimate
    net: Estimate


Rule = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]  # last words and S - H (G, M, K) -> won


def coin(share: float) -> Rule:
    """Success has nothing to do with what was said."""
    return lambda final_GMK, relative_GMK, rng: rng.random(final_GMK.shape[:2]) < share


def good_endings(final_GMK: np.ndarray, relative_GMK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two turns or more have to end on word 0 or 1, and mostly that is enough."""
    return ((final_GMK <= 1).sum(-1) >= 2) & (rng.random(final_GMK.shape[:2]) < 0.9)


def beaten_track(final_GMK: np.ndarray, relative_GMK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What is usual wins: the less surprising the trajectory, the likelier."""
    return rng.random(final_GMK.shape[:2]) < 1 / (1 + np.exp(relative_GMK.sum(-1)))


def unlikely_wins(final_GMK: np.ndarray, relative_GMK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What is unusual wins: the more surprising the trajectory, the likelier."""
    return ~beaten_track(final_GMK, relative_GMK, rng)


def added(
    language: Language, rule: Rule, arm: str, rng: np.random.Generator, groups: int = 4000, turns: int = 3
) -> Added:
    """Sample groups of 8 trajectories, whose turns meet random prompts; advantages are group-normalised returns."""
    said, shape = listed(language), (groups, 8, turns)
    r_GMK = rng.choice(len(said.prob_R), shape, p=said.prob_R / said.prob_R.sum())
    relative_GMK = said.relative_R[r_GMK]
    won_GM = rule(said.final_R[r_GMK], relative_GMK, rng).astype(float)
    spread_G = won_GM.std(1)
    advantage_GM = (won_GM - won_GM.mean(1, keepdims=True)) / np.where(spread_G > 0, spread_G, 1.0)[:, None]
    group_R = torch.arange(groups).repeat_interleave(8 * turns)
    alpha_R = aem.coefficients(torch.from_numpy(said.mean_entropy_R[r_GMK]).flatten(), group_R, ARMS[arm])
    alpha_R = modulation.shuffle_coefficients(alpha_R, group_R, rng) if arm == "shuffled" else alpha_R
    moved_GMK = advantage_GM[..., None] * (alpha_R.double().numpy().reshape(shape) - 1) * relative_GMK
    return Added(
        *(_mean(moved_GMK, np.broadcast_to(is_GM[..., None], shape)) for is_GM in (advantage_GM < 0, advantage_GM > 0)),
        net=_mean(moved_GMK, np.ones(shape, bool)),
    )


def _mean(value_GMK: np.ndarray, chosen_GMK: np.ndarray) -> Estimate:
    """Mean over the chosen responses; the error takes groups for independent, and nothing else (a ratio's delta rule)."""
    sums_G, counts_G = (value_GMK * chosen_GMK).sum((1, 2)), chosen_GMK.sum((1, 2))
    value = sums_G.sum() / counts_G.sum()
    rest_G = sums_G - value * counts_G
    return Estimate(float(value), float(np.sqrt((rest_G**2).sum()) / counts_G.sum()))


# ------------------------------------------------------------------------------------------------------ 4. learning


@dataclass(frozen=True)
class Curve:
    """Response entropy (nats) and success, both exact, of each seed before each step; the last is after the last."""

    entropy_SK: np.ndarray
    success_SK: np.ndarray


def learn(language: Language, lam: float, seeds: int = 8, steps: int = 60, rate: float = 0.15) -> Curve:
    """Natural-gradient learning to end on a certain word, in groups of 16 responses, from the language as it is."""
    histories = [_lesson(language, lam, np.random.default_rng(seed), steps, rate) for seed in range(seeds)]
    return Curve(*np.array(histories).transpose(2, 0, 1))


def _lesson(language: Language, lam: float, rng: np.random.Generator, steps: int, rate: float) -> list[tuple]:
    logit_CV = np.log(np.maximum(language.next_CV, 1e-3))  # what was impossible can be learnt
    goal = int(_visits(language, np.array(language.prompts))[: language.words].argmin())  # the rarest word
    history = []
    for _ in range(steps + 1):
        now = Language(np.exp(log_softmax(logit_CV, axis=-1)), language.longest)
        history.append((now.ahead()[now.prompts].mean(), _success(now, goal)))
        logit_CV = logit_CV + rate * _natural(now, goal, lam, rng)
    return history


def _natural(
    now: Language, goal: int, lam: float, rng: np.random.Generator, groups: int = 16, members: int = 16
) -> np.ndarray:
    """The natural gradient of a step's surrogate: for a context, sampled advantages over the expected counts of its tokens.

    A count of less than one is taken for one, or a single sample of a rare token would throw the policy anywhere.
    """
    prompt_N = np.repeat(rng.choice(now.prompts, groups), members)
    context_NT, token_NT, live_NT = _sample(now, prompt_N, rng)
    tokens_N = live_NT.sum(1)
    said_NT = live_NT & (token_NT < now.words)
    final_N = np.where(said_NT.any(1), token_NT[np.arange(len(token_NT)), said_NT.sum(1) - 1], -1)
    won_GM = (final_N == goal).reshape(groups, members).astype(float)
    advantage_N = (won_GM - won_GM.mean(1, keepdims=True)).flatten()
    entropy_N = (entropy(now.next_CV)[context_NT] * live_NT).sum(1) / tokens_N
    group_N = torch.arange(groups).repeat_interleave(members)
    alpha_N = aem.coefficients(torch.from_numpy(entropy_N), group_N, lam).double().numpy()
    step_CV = np.zeros_like(now.next_CV)
    np.add.at(step_CV, (context_NT[live_NT], token_NT[live_NT]), np.repeat(advantage_N * alpha_N, tokens_N))
    return step_CV / np.maximum(1.0, _visits(now, prompt_N)[:, None] * now.next_CV)


def _sample(now: Language, context_N: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    live_N, columns = np.ones(len(context_N), bool), []
    for _ in range(now.longest):
        draw_N = rng.random((len(context_N), 1))
        token_N = (now.next_CV[context_N].cumsum(-1)[:, :-1] < draw_N).sum(-1)
        columns.append((context_N, token_N, live_N))
        live_N = live_N & (token_N < now.words)
        context_N = np.minimum(token_N, now.words - 1)
    context_NT, token_NT, live_NT = (np.stack(column, 1) for column in zip(*columns, strict=True))
    return context_NT, token_NT, live_NT


def _visits(now: Language, prompt_N: np.ndarray) -> np.ndarray:
    """How often each context is expected to be met."""
    here_C = np.bincount(prompt_N, minlength=len(now.next_CV)).astype(float)
    seen_C = np.zeros_like(here_C)
    for _ in range(now.longest):
        seen_C += here_C
        here_C = np.append((here_C @ now.next_CV)[:-1], np.zeros(len(now.prompts)))
    return seen_C


def _success(now: Language, goal: int) -> float:
    """The probability that the last word is this one."""
    there_C = (np.arange(len(now.next_CV)) == goal).astype(float)
    hit_C = there_C
    for _ in range(now.longest):
        hit_C = now.next_CV[:, :-1] @ hit_C[: now.words] + now.next_CV[:, -1] * there_C
    return float(hit_C[now.prompts].mean())


# ------------------------------------------------------------------------------------------------- 5. what alpha is


def variational(rng: np.random.Generator, lam: float, size: int = 12) -> float:
    """The largest gap between alpha and |G| w, with w the minimiser of sum w Htilde + (1/lambda) sum w log(|G| w)."""
    entropy_R = rng.uniform(0.1, 2.0, size)
    unit_R = (entropy_R - entropy_R.min()) / np.ptp(entropy_R)
    found = minimize(
        lambda w_R: w_R @ unit_R + xlogy(w_R, size * w_R).sum() / lam,
        np.full(size, 1 / size),
        jac=lambda w_R: unit_R + (np.log(size * w_R) + 1) / lam,
        bounds=[(1e-9, 1)] * size,
        constraints={"type": "eq", "fun": lambda w_R: w_R.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 1000},
        method="SLSQP",
    )
    alpha_R = aem.coefficients(torch.from_numpy(entropy_R), torch.zeros(size, dtype=torch.long), lam, gate=0.0)
    return float(np.abs(alpha_R.numpy() - size * found.x).max())


# ------------------------------------------------------------------------------------------------------- the account


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    languages = {"ordinary": ordinary(np.random.default_rng(0)), "routine": routine()}
    tell_drift(folder)
    tell_doob(languages)
    tell_added(languages)
    tell_shares(languages["ordinary"], folder)
    tell_learning(languages, folder)
    print("\n5. alpha = |G| w, where w minimises sum w Htilde + (1/lambda) sum w log(|G| w) over the simplex, by scipy")
    for lam in (0.5, 1.0, 2.0, 4.0):
        print(f"   lambda {lam:<4} largest gap {variational(np.random.default_rng(0), lam):.1e}")
    print(f"\nplots: {', '.join(str(file) for file in sorted(folder.glob('*.png')))}")


def tell_drift(folder: Path) -> None:
    found = drift(np.random.default_rng(0))
    agree = np.sign(found.plain) == np.sign(found.said)
    print(
        f"1. A step for one sampled action moves the entropy by A (S - H): {len(found.said):,} steps of a tabular softmax"
    )
    print(
        f"   natural gradient: largest gap between A (S - H) and finite differences {_gap(found.said, found.natural):.1e}"
    )
    print(
        f"   plain gradient:   it is A (p (S - H) - sum p^2 (S - H)) instead, gap {_gap(found.plain_said, found.plain):.1e};"
    )
    print(f"   its sign is that of A (S - H) in {agree.mean():.1%} of the steps, its size is not: correlation ", end="")
    print(f"{np.corrcoef(found.plain, found.said)[0, 1]:.2f}")
    print("   So what follows is about natural gradients. The plain one gives a rare action p times the weight.")
    with _figure(folder / "drift.png", 1) as (axes,):
        axes.plot(found.said, found.natural, ".", color=BLUE, label="natural gradient", markersize=3)
        axes.plot(found.said, found.plain, ".", color=ORANGE, label="plain gradient", markersize=3)
        axes.set(xlabel="A (S - H)", ylabel="change of entropy per unit of step", title="one sampled action")
        axes.legend(frameon=False)


def _gap(said: np.ndarray, found: np.ndarray) -> float:
    return float(np.abs(said - found).max())


def tell_doob(languages: dict[str, Language]) -> None:
    print("\n2. S = sum of token entropies + a martingale, over all responses of a small Markov language")
    for name, language in languages.items():
        found = doob(language)
        split = f"{found.predictable:.3f} + {found.martingale:.3f} {found.twice_covariance:+.3f}"
        print(f"   {name}, {len(listed(language).prob_R):,} responses. {language.nature}")
        print(
            f"     martingale: mean {found.martingale_mean:.0e}, largest product of increments {found.increments:.0e}"
        )
        print(f"     Var S = {found.surprisal:.3f} = {split} (predictable, martingale, twice their covariance)")
        print(f"     correlation with S - H(s): summed token entropies {found.sum_correlation:+.2f}, ", end="")
        print(
            f"mean token entropy {found.mean_correlation:+.2f} ({found.same_length:+.2f} among equal lengths); ", end=""
        )
        print(f"mean token entropy with length {found.length_correlation:+.2f}")
    print(
        "   The covariance is not zero: the predictable part may vary more than S itself. And where long responses are made of"
    )
    print("   small choices, the mean over tokens ranks them the other way round than their surprisal.")


def tell_added(languages: dict[str, Language]) -> None:
    print(
        "\n3. AEM adds the drift A (alpha - 1)(S - H): 4,000 groups of 8 x 3 responses, lambda 1 (reversed: -1), gate 0.1"
    )
    rules = {
        "coin, 20 %": coin(0.2),
        "good endings": good_endings,
        "usual wins": beaten_track,
        "unusual wins": unlikely_wins,
    }
    print(f"   {'language':<10}{'success':<18}{'arm':<10}{'failures':>20}{'successes':>20}{'net':>20}")
    for name, language in languages.items():
        for title, rule in rules.items():
            for arm in ARMS:
                a = added(language, rule, arm, np.random.default_rng(0))
                print(
                    f"   {name:<10}{title:<18}{arm:<10}{a.failures!s:>20}{a.successes!s:>20}{a.net!s:>20}", flush=True
                )
    print(
        "   Ordinary: failures push entropy up and successes pull it down; reversed flips both, shuffled does neither."
    )
    print("   Routine: every sign is the opposite, as mean token entropy goes against surprisal there.")


def tell_shares(language: Language, folder: Path) -> None:
    print("\n   Does the changing share of failures shift the net? Ordinary language, success by a coin:")
    shares = (0.1, 0.3, 0.5, 0.7, 0.9)
    found = [added(language, coin(share), "aem", np.random.default_rng(0)) for share in shares]
    for share, a in zip(shares, found, strict=True):
        print(f"   success {share:.0%}: failures {a.failures}, successes {a.successes}, net {a.net}")
    print(
        "   No: advantages with mean 0 weigh both sides alike whatever the share. The net is the covariance of A with"
    )
    print("   (alpha - 1)(S - H): it takes a success that depends on how surprising a response is.")
    with _figure(folder / "added.png", 1) as (axes,):
        for part, colour, mark in (("failures", ORANGE, "o"), ("successes", BLUE, "s"), ("net", GREY, "^")):
            values = [getattr(a, part) for a in found]
            errors = [1.96 * value.error for value in values]
            axes.errorbar(shares, [v.value for v in values], errors, color=colour, marker=mark, capsize=3, label=part)
        axes.axhline(0, color=GREY, linestyle=":", linewidth=1)
        axes.set(xlabel="share of successes", ylabel="mean of A (alpha - 1)(S - H)", title="what AEM adds")
        axes.legend(frameon=False)


def tell_learning(languages: dict[str, Language], folder: Path) -> None:
    print(
        "\n4. Learning to end on the rarest word: sampled natural gradient, 8 seeds, 60 steps; nats, and difference to none"
    )
    colours = {"none": GREY, "aem": BLUE, "reversed": ORANGE}
    styles = {"none": ":", "aem": "-", "reversed": "--"}
    with _figure(folder / "learning.png", 4) as panels:
        for (name, language), axes in zip(languages.items(), (panels[:2], panels[2:]), strict=True):
            curves = {arm: learn(language, lam) for arm, lam in LEARNERS.items()}
            for arm, curve in curves.items():
                apart_SK = curve.entropy_SK - curves["none"].entropy_SK
                said = "  ".join(
                    f"{step:>2}: {curve.entropy_SK[:, step].mean():.2f} ({_over_seeds(apart_SK[:, step])})"
                    for step in (10, 20, 40, 60)
                )
                print(f"   {name:<10}{arm:<10}{said}  at 80 % success: {entropy_at(curve, 0.8):.2f}", flush=True)
                style = {"color": colours[arm], "linestyle": styles[arm], "label": arm}
                for ax, value_SK in zip(axes, (curve.entropy_SK, curve.success_SK), strict=True):
                    ax.plot(value_SK.mean(0), **style)
            axes[0].set(title=f"{name}: response entropy (nats)", xlabel="step")
            axes[1].set(title=f"{name}: success", xlabel="step", ylim=(0, 1))
            axes[0].legend(frameon=False)
    print(
        "   Ordinary: AEM keeps entropy and learns more slowly; some of the difference is left at equal success. Routine: at"
    )
    print("   first the other way round, until the policy has become another language.")


def entropy_at(curve: Curve, success: float) -> float:
    """Mean response entropy where a seed first reaches this success: what is left of a difference at equal progress."""
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
