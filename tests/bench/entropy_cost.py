"""What AEM costs in time and memory against the size of the model, the length of episodes and the vocabulary.

    python tests/bench/entropy_cost.py [--rounds 3]

Random Qwen3 and Qwen2 models play 8 episodes of 4 turns, all of one length, and make one update of them: on a GPU where torch
has one (in bf16), else on one thread of the CPU. Three sources of entropy, each against the same step without AEM:

    sampler    it measures entropies as it samples (`local._sample_tokens`, against the same without that line)
    scoring    old log-probs are scored anyway: the same pass yields entropies (TRL's head, with and without them)
    own pass   nobody scores, so AEM alone pays for `scoring.score_batch`

Each also pays for the trainer's section `aem` (coefficients and modulated advantages). What differs by little is timed alone,
in turns, or it would drown: a draw on the scores of a real one, times their number; and the head on made-up hidden states.
This framework measures entropies with every modulation, as it logs them; and TRL's head does in each update, whatever we do.

Time: medians of the rounds; of the process on a CPU. Memory: the most that all tensors hold which torch is asked for
(weights and the optimizer's moments included, scratch space within a kernel not); on a GPU, its allocator's peak.
"""

import argparse
import contextlib
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401  (environment first)
import torch
import train_step
from support import peak_memory, toy
from transformers.utils.logging import disable_progress_bar
from trl.trainer.utils import add_fused_lm_head

from aem_exp import policy
from aem_exp.core import console
from aem_exp.envs import Task
from aem_exp.envs.executor import SerialExecutor
from aem_exp.jobs.memory_trace import Meter
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.sampling import local
from aem_exp.rollout.types import Episode
from aem_exp.training import logprobs
from aem_exp.training.dynamic_sampling import PlayedStep

CUDA = torch.cuda.is_available()
EPISODES, TURNS = 8, 4
SOURCES = ("sampler", "scoring", "own pass")
HELD = ("mute play", "play", "mute score", "score", "update")


@dataclass(frozen=True)
class Case:
    kind: str = "qwen3"
    hidden: int = 128
    layers: int = 4
    vocab: int = 1_000
    tokens: int = 16  # of a response


CASES = {
    "model": [Case(hidden=64, layers=2), Case(), Case("qwen2", hidden=256, layers=6), Case(hidden=384, layers=8)],
    "length": [Case(tokens=64), Case(tokens=128)],
    "vocabulary": [Case(vocab=32_000, tokens=8), Case("qwen2", vocab=152_000, tokens=8)],
}
if CUDA:
    CASES["large"] = [Case(hidden=1024, layers=28, vocab=152_000, tokens=tokens) for tokens in (64, 256)]


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes of one step. `none` is without AEM; the others are what a source adds, or then holds."""

    parameters: int
    tokens: int
    generation: float
    scoring: float
    update: float
    added: dict[str, float]
    held: dict[str, float]

    def share(self, source: str) -> float:
        """What AEM adds to a step's time."""
        return self.added[source] / (self.generation + self.update + (self.scoring if source == "scoring" else 0.0))

    def memory(self, source: str) -> float:
        """A step's peak, over that without AEM."""
        base = max(self.held["mute play"], self.held["update"])
        without = max(base, self.held["mute score"]) if source == "scoring" else base
        return max(base, self.held["play" if source == "sampler" else "score"]) / without


def measure(case: Case, folder: Path, rounds: int) -> Cost:
    trainer = trainer_of(case, folder)
    draws: list[tuple] = []
    played = play(trainer, recording(draws))  # which also warms up
    trainer.play = lambda step: PlayedStep(played, [], 1)
    updates = trainer.iterate_updates()
    batch = next(updates)[0]
    heads = [head(trainer.model, batch, outputs) for outputs in (("log_probs", "entropy"), ("log_probs",))]
    acts: dict[str, Callable[[], Any]] = {
        "generation": lambda: play(trainer),
        "scoring": lambda: logprobs.compute_logps_and_entropies(trainer, trainer.model, batch),
        "update": lambda: train(trainer, batch),
        "draw": lambda: local._sample_tokens(*draws[-1]),
        "mute draw": lambda: mute(*draws[-1]),
        "head": lambda: logprobs.compute_logps_and_entropies(trainer, heads[0], batch),
        "mute head": lambda: logprobs.compute_logps_and_entropies(trainer, heads[1], batch),
    }
    assert all(map(torch.equal, local._sample_tokens(*draws[-1])[:2], mute(*draws[-1]))), "not the same draw"
    train(trainer, batch)  # the optimizer makes its moments
    times, modulating = timed(acts, updates, trainer, rounds)
    entropy = max(0.0, times["head"] - times["mute head"])
    added = {
        "sampler": max(0.0, times["draw"] - times["mute draw"]) * len(draws) + modulating,
        "scoring": entropy + modulating,
        "own pass": times["scoring"] + modulating,
    }
    quiet = without_entropy(trainer.model)
    held = {
        "play": most(trainer, lambda: play(trainer)),
        "mute play": most(trainer, lambda: play(trainer, mute_for_three)),
        "score": most(trainer, lambda: logprobs.compute_logps_and_entropies(trainer, trainer.model, batch)),
        "mute score": most(trainer, lambda: logprobs.compute_logps_and_entropies(trainer, quiet, batch)),
        "update": most(trainer, lambda: train(trainer, batch)),
    }
    return Cost(
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        tokens=sum(t.tokens for t in played),
        generation=times["generation"] - added["sampler"] + modulating,
        scoring=times["scoring"] - entropy,
        update=times["update"],
        added=added,
        held=held,
    )


def timed(acts: dict[str, Callable], updates: Iterator, trainer: Any, rounds: int) -> tuple[dict[str, float], float]:
    """Median seconds of each act, taken in turns, and the least of the section `aem`, whose clock is the wall.

    What is short is done until it takes a while.
    """
    spent: dict[str, list[float]] = {name: [] for name in acts}
    often = {name: max(1, min(50, int(0.05 / max(seconds(act), 1e-4)))) for name, act in acts.items()}
    for number in range(rounds):
        for name in list(acts) if number % 2 else list(acts)[::-1]:
            spent[name].append(statistics.mean(seconds(acts[name]) for _ in range(often[name])))
    modulating = [trainer.aem_callback.metrics["time/aem"] for _ in range(10) if next(updates)]
    return {name: statistics.median(values) for name, values in spent.items()}, min(modulating)


def seconds(act: Callable[[], Any]) -> float:
    clock = time.perf_counter if CUDA else time.process_time
    start = clock()
    act()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - start


def most(trainer: Any, act: Callable[[], Any]) -> float:
    """The most bytes held in the course of it."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        act()
        return float(torch.cuda.max_memory_allocated())
    with Meter() as meter:
        moments = [x for state in trainer.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        for tensor in (*trainer.model.parameters(), *trainer.model.buffers(), *moments):
            meter.count(tensor)
        act()
    return float(sum(meter.peaks[0].values()))


def trainer_of(case: Case, folder: Path) -> Any:
    torch.manual_seed(0)
    shape = peak_memory.Setting("", case.kind, hidden=case.hidden, layers=case.layers, vocab=case.vocab).shape
    model = policy.build_from_config(shape | {"max_position_embeddings": 4096}, "float32", None, {})
    rules = toy.env("full", response_tokens=case.tokens, context_tokens=TURNS * (case.tokens + 20))
    run = toy.experiment("full", steps=10**6, bf16=CUDA)
    run = replace(run, env=rules, launch=replace(run.launch, trainer={"use_cpu": not CUDA}))
    _, tokenizer = toy.policy(folder)
    rollout = Rollout(SerialExecutor(toy.ChatterWorld()), rules, Chat(tokenizer))
    trainer = toy.trainer(folder, run, lam=1.0, model=model, rollout=rollout)
    trainer.time.step = 1  # not step 0, at which sampler and trainer are compared
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    return trainer


def play(trainer: Any, draw: Callable | None = None) -> list[Any]:
    """Two groups of four; every response has its full length, as the end is one word of many."""
    (task,) = [Task("train-3", 3, kind="turns4")]
    episodes = [Episode(task, d, m, (0, d, m)) for d in range(2) for m in range(EPISODES // 2)]
    with drawing(draw or local._sample_tokens):
        return trainer.rollout.play(episodes, trainer.sampler)


def train(trainer: Any, batch: dict) -> None:
    trainer.training_step(trainer.model, [batch])
    train_step.finish(trainer)
    train_step.forget(trainer)


@contextlib.contextmanager
def drawing(draw: Callable) -> Iterator[None]:
    usual, local._sample_tokens = local._sample_tokens, draw
    try:
        yield
    finally:
        local._sample_tokens = usual


def recording(draws: list[tuple]) -> Callable:
    usual = local._sample_tokens

    def draw(*args: Any) -> tuple:
        draws[-1:] = [()] * len(draws[-1:])  # all are counted, the last is kept
        draws.append(args)
        return usual(*args)

    return draw


def mute(scores_BV: torch.Tensor, draw_B: torch.Tensor, sampling: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`local._sample_tokens` without the entropies."""
    logp_BV = torch.log_softmax(scores_BV / sampling.temperature, dim=-1)
    kept_BV = local._filter_probabilities(logp_BV.exp(), sampling).double().cumsum(-1)
    token_B = torch.searchsorted(kept_BV, draw_B[:, None] * kept_BV[:, -1:], right=True).squeeze(1)
    token_B = token_B.clamp(max=scores_BV.shape[-1] - 1)
    return token_B, logp_BV.gather(1, token_B[:, None]).squeeze(1)


def mute_for_three(*args: Any) -> tuple:
    token_B, logp_B = mute(*args)
    return token_B, logp_B, logp_B


def without_entropy(model: Any) -> Any:
    """The same weights under a head that yields log-probs alone, as TRL gives to a reference policy."""
    alias = copy.copy(model)
    add_fused_lm_head(alias)
    return alias


def head(model: Any, batch: dict, outputs: tuple[str, ...]) -> Any:
    """The head alone, on hidden states that are made up."""
    tokens = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
    hidden = torch.randn(EPISODES, tokens, model.config.hidden_size, device=model.device)
    alias = copy.copy(model)
    alias._modules = {**model._modules, model.base_model_prefix: _Hidden(hidden)}
    alias.get_output_embeddings = model.get_output_embeddings
    add_fused_lm_head(alias, outputs=outputs)
    return alias


class _Hidden(torch.nn.Module):
    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.hidden)


def show(name: str, case: Case, cost: Cost) -> None:
    size = f"{case.kind} {cost.parameters / 1e6:.1f} M"
    parts = "".join(f"{1e3 * x:>9.0f}" for x in (cost.generation, cost.scoring, cost.update))
    shares = "".join(f"{cost.share(source):>10.2%}" for source in SOURCES)
    held = "".join(f"{cost.held[act] / 1e6:>8.1f}" for act in HELD)
    print(f"{name:<12}{size:<14}{case.vocab:>8,}{cost.tokens:>7,}{parts}{shares}{held}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    console.silence_libraries()
    disable_progress_bar()
    torch.set_num_threads(1)
    print(torch.cuda.get_device_name() if CUDA else "a CPU, one thread")
    print(
        f"{'':<41}{'ms of a step without AEM':>27}{'AEM adds to that':>30}   MB: play, scoring (each without, with), update"
    )
    columns = "".join(f"{act:>9}" for act in ("play", "scoring", "update")) + "".join(f"{s:>10}" for s in SOURCES)
    print(f"{'varied':<12}{'model':<14}{'words':>8}{'tokens':>7}{columns}")
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        for name, cases in CASES.items():
            for case in cases:
                costs.append(measure(case, Path(folder), rounds))
                show(name, case, costs[-1])
    for source in SOURCES:
        shares, memory = [c.share(source) for c in costs], max(c.memory(source) for c in costs)
        print(
            f"{source}: {min(shares):.2%} to {max(shares):.2%} of a step without AEM; its peak memory x {memory:.3f} at most"
        )


if __name__ == "__main__":
    main()
