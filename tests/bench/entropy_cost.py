"""The cost of AEM in time and memory, by model size, episode length and vocabulary size.

    python tests/bench/entropy_cost.py [--rounds 3]

Random Qwen3 and Qwen2 models play 8 episodes of 4 turns, all of the same length, and make one update. The bench uses a GPU in
bf16 if torch has one, else one thread of the CPU. Three sources of entropy, each against the same step without AEM:

    sampler    the sampler measures entropies (`local.sample_tokens`, against the same function without entropies)
    scoring    a scoring pass computes old log-probs anyway (TRL's head with entropies, against the head without)
    own pass   there is no scoring pass without AEM, so AEM pays for `logprobs.compute_logps_and_entropies`

Each source also pays for the section `aem` of the trainer (coefficients and modulated advantages). Small differences are timed
separately and in alternation, so that noise does not hide them: sampling one token on real logits, times the number of tokens,
and the head on random hidden states. This framework measures entropies also without modulation, because it logs them. TRL's head
computes them in each update in any case.

Time: medians of the rounds; on a CPU, process time. Memory: on a CPU, the peak of all tensors that torch allocates, including
weights and optimizer moments, but no scratch space inside kernels; on a GPU, the peak of its allocator.
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

from support import process_settings  # noqa: F401, I001  (before torch)
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
# Phases whose peak memory is measured; "plain" means without entropies.
PHASES = ("plain play", "play", "plain score", "score", "update")


@dataclass(frozen=True)
class Case:
    kind: str = "qwen3"
    hidden: int = 128
    layers: int = 4
    vocab: int = 1_000
    tokens: int = 16
    """tokens of a response"""


CASES = {
    "model": [Case(hidden=64, layers=2), Case(), Case("qwen2", hidden=256, layers=6), Case(hidden=384, layers=8)],
    "length": [Case(tokens=64), Case(tokens=128)],
    "vocabulary": [Case(vocab=32_000, tokens=8), Case("qwen2", vocab=152_000, tokens=8)],
}
if CUDA:
    CASES["large"] = [Case(hidden=1024, layers=28, vocab=152_000, tokens=tokens) for tokens in (64, 256)]


@dataclass(frozen=True)
class Cost:
    """Time and memory of one step."""

    parameters: int
    tokens: int
    """generated tokens"""
    generation: float
    """seconds without entropies"""
    scoring: float
    """seconds without entropies"""
    update: float
    """seconds"""
    added: dict[str, float]
    """seconds that AEM adds, by source of entropy"""
    peak: dict[str, float]
    """peak bytes, by phase"""

    def share(self, source: str) -> float:
        """Time that AEM adds, as a share of a step without AEM."""
        return self.added[source] / (self.generation + self.update + (self.scoring if source == "scoring" else 0.0))

    def memory(self, source: str) -> float:
        """Peak memory of a step, divided by that without AEM."""
        base = max(self.peak["plain play"], self.peak["update"])
        without = max(base, self.peak["plain score"]) if source == "scoring" else base
        return max(base, self.peak["play" if source == "sampler" else "score"]) / without


def measure(case: Case, folder: Path, rounds: int) -> Cost:
    trainer = make_trainer(case, folder)
    with trainer.accelerator.autocast():  # as in a run, where accelerate wraps the forward pass; no effect in fp32
        return measure_trainer(trainer, rounds)


def measure_trainer(trainer: Any, rounds: int) -> Cost:
    draws: list[tuple] = []
    played = play(trainer, recording(draws))  # this is also the warm-up
    trainer.play = lambda step: PlayedStep(played, [], 1)
    updates = trainer.iterate_updates()
    batch = next(updates)[0]
    heads = [head(trainer.model, batch, outputs) for outputs in (("log_probs", "entropy"), ("log_probs",))]
    actions: dict[str, Callable[[], Any]] = {
        "generation": lambda: play(trainer),
        "scoring": lambda: logprobs.compute_logps_and_entropies(trainer, trainer.model, batch),
        "update": lambda: train(trainer, batch),
        "draw": lambda: local.sample_tokens(*draws[-1]),
        "plain draw": lambda: sample_without_entropies(*draws[-1]),
        "head": lambda: logprobs.compute_logps_and_entropies(trainer, heads[0], batch),
        "plain head": lambda: logprobs.compute_logps_and_entropies(trainer, heads[1], batch),
    }
    plain_draw = sample_without_entropies(*draws[-1])
    assert all(map(torch.equal, local.sample_tokens(*draws[-1])[:2], plain_draw)), "the two must sample the same tokens"
    train(trainer, batch)  # the optimizer creates its moments
    times, modulation_time = time_actions(actions, updates, trainer, rounds)
    entropy = max(0.0, times["head"] - times["plain head"])
    added = {
        "sampler": max(0.0, times["draw"] - times["plain draw"]) * len(draws) + modulation_time,
        "scoring": entropy + modulation_time,
        "own pass": times["scoring"] + modulation_time,
    }
    plain_model = without_entropy(trainer.model)
    peak = {
        "play": peak_bytes(trainer, lambda: play(trainer)),
        "plain play": peak_bytes(trainer, lambda: play(trainer, sample_with_placeholders)),
        "score": peak_bytes(trainer, lambda: logprobs.compute_logps_and_entropies(trainer, trainer.model, batch)),
        "plain score": peak_bytes(trainer, lambda: logprobs.compute_logps_and_entropies(trainer, plain_model, batch)),
        "update": peak_bytes(trainer, lambda: train(trainer, batch)),
    }
    return Cost(
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        tokens=sum(t.tokens for t in played),
        generation=times["generation"] - added["sampler"] + modulation_time,
        scoring=times["scoring"] - entropy,
        update=times["update"],
        added=added,
        peak=peak,
    )


def time_actions(
    actions: dict[str, Callable], updates: Iterator, trainer: Any, rounds: int
) -> tuple[dict[str, float], float]:
    """Median seconds of each action, measured in alternation, and the minimum wall seconds of the section `aem`.

    Short actions are repeated until they take about 0.05 s.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    repeats = {name: max(1, min(50, int(0.05 / max(seconds(action), 1e-4)))) for name, action in actions.items()}
    for number in range(rounds):
        for name in list(actions) if number % 2 else list(actions)[::-1]:
            times[name].append(statistics.mean(seconds(actions[name]) for _ in range(repeats[name])))
    modulation_times = [trainer.aem_callback.metrics["time/aem"] for _ in range(10) if next(updates)]
    return {name: statistics.median(values) for name, values in times.items()}, min(modulation_times)


def seconds(action: Callable[[], Any]) -> float:
    clock = time.perf_counter if CUDA else time.process_time
    start = clock()
    action()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes(trainer: Any, action: Callable[[], Any]) -> float:
    """Peak memory during an action, in bytes."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        action()
        return float(torch.cuda.max_memory_allocated())
    with Meter() as meter:
        moments = [x for state in trainer.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        for tensor in (*trainer.model.parameters(), *trainer.model.buffers(), *moments):
            meter.count(tensor)
        action()
    return float(sum(meter.peaks[0].values()))


def make_trainer(case: Case, folder: Path) -> Any:
    torch.manual_seed(0)
    shape = peak_memory.Setting("", case.kind, hidden=case.hidden, layers=case.layers, vocab=case.vocab).shape
    model = policy.build_from_config(shape | {"max_position_embeddings": 4096}, "float32", None, {})
    rules = toy.env("full", response_tokens=case.tokens, context_tokens=TURNS * (case.tokens + 20))
    run = toy.experiment("full", steps=10**6, bf16=CUDA)
    run = replace(run, env=rules, launch=replace(run.launch, trainer={"use_cpu": not CUDA}))
    _, tokenizer = toy.policy(folder)
    rollout = Rollout(SerialExecutor(toy.ChatterWorld()), rules, Chat(tokenizer))
    trainer = toy.trainer(folder, run, lam=1.0, model=model, rollout=rollout)
    trainer.time.step = 1  # at step 0, the trainer also compares the sampler with a scoring pass
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    return trainer


def play(trainer: Any, draw: Callable | None = None) -> list[Any]:
    """Play two groups of four episodes. Responses practically always have full length: the end is one token of many."""
    (task,) = [Task("train-3", 3, kind="turns4")]
    episodes = [Episode(task, d, m, (0, d, m)) for d in range(2) for m in range(EPISODES // 2)]
    with replaced_sampling(draw or local.sample_tokens):
        return trainer.rollout.play(episodes, trainer.sampler)


def train(trainer: Any, batch: dict) -> None:
    trainer.training_step(trainer.model, [batch])
    train_step.finish(trainer)
    train_step.clear_metrics(trainer)


@contextlib.contextmanager
def replaced_sampling(draw: Callable) -> Iterator[None]:
    """Replace `local.sample_tokens` within the context."""
    original, local.sample_tokens = local.sample_tokens, draw
    try:
        yield
    finally:
        local.sample_tokens = original


def recording(draws: list[tuple]) -> Callable:
    """`local.sample_tokens`, with one entry in `draws` per call; only the last entry keeps its arguments."""
    original = local.sample_tokens

    def draw(*args: Any) -> tuple:
        draws[-1:] = [()] * len(draws[-1:])
        draws.append(args)
        return original(*args)

    return draw


def sample_without_entropies(
    scores_BV: torch.Tensor, draw_B: torch.Tensor, sampling: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `local.sample_tokens`, without the entropies."""
    logp_BV = torch.log_softmax(scores_BV / sampling.temperature, dim=-1)
    kept_BV = local.filter_probabilities(logp_BV.exp(), sampling).double().cumsum(-1)
    token_B = torch.searchsorted(kept_BV, draw_B[:, None] * kept_BV[:, -1:], right=True).squeeze(1)
    token_B = token_B.clamp(max=scores_BV.shape[-1] - 1)
    return token_B, logp_BV.gather(1, token_B[:, None]).squeeze(1)


def sample_with_placeholders(*args: Any) -> tuple:
    """`sample_without_entropies` with log-probs in place of the entropies."""
    token_B, logp_B = sample_without_entropies(*args)
    return token_B, logp_B, logp_B


def without_entropy(model: Any) -> Any:
    """The same weights with a head that returns only log-probs, as TRL does for a reference policy."""
    alias = copy.copy(model)
    add_fused_lm_head(alias)
    return alias


def head(model: Any, batch: dict, outputs: tuple[str, ...]) -> Any:
    """Only the head of the model, on random hidden states."""
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
    peaks = "".join(f"{cost.peak[phase] / 1e6:>8.1f}" for phase in PHASES)
    print(f"{name:<12}{size:<14}{case.vocab:>8,}{cost.tokens:>7,}{parts}{shares}{peaks}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    console.silence_libraries()
    disable_progress_bar()
    torch.set_num_threads(1)
    print(torch.cuda.get_device_name() if CUDA else "one thread of a CPU")
    memory_title = "peak MB: play and scoring (each without, with entropies), update"
    print(f"{'':<41}{'ms of a step without AEM':>27}{'added by AEM':>30}   {memory_title}")
    columns = "".join(f"{part:>9}" for part in ("play", "scoring", "update")) + "".join(f"{s:>10}" for s in SOURCES)
    print(f"{'varied':<12}{'model':<14}{'words':>8}{'tokens':>7}{columns}")
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        for name, cases in CASES.items():
            for case in cases:
                costs.append(measure(case, Path(folder), rounds))
                show(name, case, costs[-1])
    for source in SOURCES:
        shares, memory = [c.share(source) for c in costs], max(c.memory(source) for c in costs)
        time_range = f"{min(shares):.2%} to {max(shares):.2%} of the time of a step without AEM"
        print(f"{source}: {time_range}; at most {memory:.3f} times its peak memory")


if __name__ == "__main__":
    main()
