"""Speed and memory on a GPU, as Markdown tables and JSON. Takes less than 8 minutes and needs no network.

    python tests/bench/gpu.py [--out FOLDER] [--small]

It needs `pip install -e '.[train]'`. `--small` uses small sizes; it is the default without a GPU. Three sections, each with a
limit of time. A row that fails or that does not fit into memory is reported as such, and the next row is measured.

    entropy    the time of a step with AEM, divided by the time of the same step with modulation=none, by the source of the
               entropies (see `entropy_cost.py`)
    sampler    tokens per second of the local sampler and of transformers' `generate`, in alternation, with equal lengths
    training   the time of a step (scoring and update) and its peak memory, against the estimate of `plan=true`

Models have random weights. In `training`, rows are random tokens, and each step makes one update of two micro-batches.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with several GPUs, transformers would split each batch
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from support import process_settings, random_models  # noqa: F401, I001  (before torch)
import entropy_cost
import torch
from support import peak_memory
from transformers.utils.logging import disable_progress_bar

from aem_exp import policy
from aem_exp.core import console
from aem_exp.envs import Task
from aem_exp.jobs.memory import estimate_memory
from aem_exp.rollout.sampling.base import Sample, SamplingParams
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.rollout.types import Ending, Response, Trajectory
from aem_exp.training.dynamic_sampling import PlayedStep

CUDA = torch.cuda.is_available()
TOTAL_SECONDS = 430.0  # no row starts later than this; a row takes at most about half a minute
BUDGETS = {"entropy": 100.0, "sampler": 80.0, "training": 240.0}
Row = dict[str, Any]
LORA = {"r": 16, "target_modules": "all-linear"}
TINY = {
    "Qwen2.5, tiny": peak_memory.Setting("", "qwen2", hidden=128, layers=3).shape | {"max_position_embeddings": 4096}
}


@dataclass
class Section:
    """The rows of a section, measured until its budget of time is spent."""

    title: str
    seconds: float
    end: float
    """Time at which the whole bench ends."""
    rows: list[Row] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def measure(self, names: Row, action: Callable[[], Row]) -> None:
        """Add a row, also if its measurement fails. `names`: the first columns."""
        now = time.monotonic()
        if now - self.start > self.seconds or now > self.end:
            self.rows.append(names | {"note": "skipped: the time of this section is spent"})
            return
        try:
            self.rows.append(names | action())
        except torch.OutOfMemoryError:
            self.rows.append(names | {"note": "out of memory"})
        except Exception as error:
            self.rows.append(names | {"note": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"})
        free_memory()
        print(f"{self.title}: {self.rows[-1]}", file=sys.stderr, flush=True)

    def to_markdown(self) -> str:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_format(row.get(name)) for name in columns)} |" for row in self.rows]
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n"


def _format(value: Any) -> str:
    return (
        ""
        if value is None
        else f"{value:,.3g}"
        if isinstance(value, float) and value < 100
        else (f"{value:,.0f}" if isinstance(value, float) else str(value))
    )


def free_memory() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


# Entropy: what AEM adds to a step.


def measure_entropy(section: Section, small: bool, folder: Path) -> None:
    cases = [entropy_cost.Case(hidden=64, layers=2, tokens=4)]
    if not small:
        cases = [
            entropy_cost.Case(hidden=384, layers=8, vocab=32_000, tokens=32),
            entropy_cost.Case("qwen2", hidden=896, layers=24, vocab=152_000, tokens=32),
            entropy_cost.Case("qwen2", hidden=1536, layers=28, vocab=152_000, tokens=32),
        ]
    for case in cases:
        names = {"model": f"{case.kind}, {case.layers} x {case.hidden}, {case.vocab:,} words"}
        section.measure(names, lambda case=case: entropy_row(case, folder, 1 if small else 2))


def entropy_row(case: entropy_cost.Case, folder: Path, rounds: int) -> Row:
    cost = entropy_cost.measure(case, folder, rounds)
    seconds = {"play s": cost.generation, "scoring s": cost.scoring, "update s": cost.update}
    ratios = {f"x none, {source}": 1 + cost.share(source) for source in entropy_cost.SOURCES}
    return {"weights": f"{cost.parameters / 1e6:.0f} M", "tokens": cost.tokens, **seconds, **ratios}


# Sampler: tokens per second.


def measure_sampler(section: Section, small: bool) -> None:
    shapes = TINY if small else dict(list(random_models.SHAPES.items())[:2])
    prompt, new = (16, 8) if small else (256, 64)
    for name, shape in shapes.items():
        for batch in (2,) if small else (8, 32):
            names = {"model": name, "episodes": batch, "prompt": prompt, "new tokens": new}
            section.measure(names, lambda shape=shape, batch=batch: sampler_row(shape, batch, prompt, new))


def sampler_row(shape: dict[str, Any], batch: int, prompt: int, new: int, rounds: int = 3) -> Row:
    """Median tokens per second of both, after one round to warm up. Neither stops at an end token."""
    torch.manual_seed(0)
    device, dtype = ("cuda", "bfloat16") if CUDA else ("cpu", "float32")
    with torch.device(device):
        model = policy.build_from_config(shape, dtype, "sdpa", {}).eval()
        ids = torch.randint(10, shape["vocab_size"], (batch, prompt))
    rows, slots = ids.tolist(), list(range(batch))
    sampler = LocalSampler(model, [-1], SamplingParams())  # no token has the id -1

    def ours() -> int:
        keys = [(0, slot) for slot in slots]
        return sum(len(s.ids) for s in sampler.session().generate(slots, rows, keys, [new] * batch))

    def generate() -> int:
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return batch * (out.shape[1] - prompt)

    speeds: dict[str, list[float]] = {"local sampler": [], "generate": []}
    for number in range(rounds + 1):
        for name, action in (("local sampler", ours), ("generate", generate)):
            synchronize()
            start = time.perf_counter()
            tokens = action()
            synchronize()
            if number:
                speeds[name].append(tokens / (time.perf_counter() - start))
            assert tokens == batch * new, (name, tokens)
    median = {f"{name}, tokens/s": statistics.median(values) for name, values in speeds.items()}
    first, second = median.values()
    return {**median, "ratio": first / second}


# Training: time and memory of a step.


@dataclass(frozen=True)
class RealSetting(peak_memory.Setting):
    """A setting with the config.json of a real model."""

    real_shape: tuple[tuple[str, Any], ...] = ()

    @property
    def shape(self) -> dict[str, Any]:
        return dict(self.real_shape)


def measure_training(section: Section, small: bool, folder: Path) -> None:
    shapes, tokens = (TINY, 64) if small else (random_models.SHAPES, 1024)
    flash = importlib.util.find_spec("flash_attn") is not None
    for name, shape in shapes.items():
        for attention in ("sdpa", "flash_attention_2"):
            for training, lora in (("full", None), ("LoRA r=16", LORA)):
                names = {"model": name, "attention": attention, "training": training, "rows": f"8 x {tokens}"}
                if attention != "sdpa" and not (flash and CUDA):
                    section.rows.append(
                        names | {"note": "not measured: flash_attn is not installed" if CUDA else "needs a GPU"}
                    )
                    continue
                setting = RealSetting(
                    name,
                    dtype="bfloat16" if lora else "float32",
                    attention=attention,
                    lora=lora,
                    autocast=True,
                    cuda=CUDA,
                    real_shape=tuple(shape.items()),
                )
                section.measure(names, lambda setting=setting: training_row(setting, tokens, folder))


def training_row(setting: RealSetting, tokens: int, folder: Path, steps: int = 3) -> Row:
    """The time and the peak memory of the last step; the first ones warm up and create the moments of the optimizer."""
    free_memory()
    before = torch.cuda.memory_allocated() if CUDA else 0
    trainer = peak_memory.make_trainer(setting, folder, steps=steps)
    trainer._save_checkpoint = lambda *_: None
    starts: list[float] = []

    def play(step: int) -> PlayedStep:
        synchronize()
        starts.append(time.perf_counter())
        if CUDA and step == steps - 1:
            torch.cuda.reset_peak_memory_stats()
        return PlayedStep(random_trajectories(setting.shape["vocab_size"], tokens), [], 1)

    trainer.play = play
    with measured_peak(trainer.model) as peak:
        trainer.train()
        synchronize()
        starts.append(time.perf_counter())
    spec = peak_memory.process_spec(setting, tokens, tokens // 4)
    need = estimate_memory(replace(spec, sampler="served"))  # nothing is played in this process
    held = peak[0] - before
    return {
        "step s": starts[-1] - starts[-2],
        "peak GB": held / 1e9,
        "estimate GB": need.total / 1e9,
        "estimate / peak": need.total / held,
        "phase": need.phase,
    }


@contextlib.contextmanager
def measured_peak(model: Any) -> Iterator[list[float]]:
    """On a GPU, the peak since the last reset; on a CPU, the peak of all tensors, which makes the step slower."""
    if not CUDA:
        with peak_memory.track_peak(model, cuda=False) as peak:
            yield peak
        return
    out: list[float] = []
    yield out
    out.append(float(torch.cuda.max_memory_allocated()))


def random_trajectories(words: int, tokens: int) -> list[Trajectory]:
    """Two groups of four episodes with one response each; together they fill the rows of an update."""
    generator = torch.Generator().manual_seed(0)
    prompt = tokens // 4
    out = []
    for number in range(peak_memory.ROWS):
        ids = torch.randint(10, words, (tokens,), generator=generator).tolist()
        response = Response(ids[:prompt], Sample(ids[prompt:], [], []), "", "", reward=float(number % 2))
        task = Task(f"train-{number // 4}", number // 4)
        out.append(Trajectory(task, number // 4, number % 4, [response], Ending.OVER))
    return out


# The command.


def describe_machine(small: bool) -> dict[str, str]:
    """The device, its driver, and the versions of the libraries."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "flash_attn")
    versions = {name: _version(name) for name in packages}
    device = torch.cuda.get_device_name() if CUDA else f"no GPU; one thread of a CPU ({platform.machine()})"
    memory = f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.1f} GB" if CUDA else "-"
    sizes = "small" if small else "full"
    return {
        "device": device,
        "memory": memory,
        "driver": _driver(),
        "CUDA": str(torch.version.cuda),
        "sizes": sizes,
        **versions,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else "unknown"


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--small", action="store_true", help="small sizes; the default without a GPU")
    arguments = parser.parse_args()
    small = arguments.small or not CUDA
    console.silence_libraries()
    disable_progress_bar()
    torch.set_num_threads(1)
    machine, end = describe_machine(small), started + TOTAL_SECONDS
    texts = ["\n".join(f"- {name}: {value}" for name, value in machine.items()) + "\n"]
    rows: dict[str, list[Row]] = {}
    print(texts[0], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sections = {
            "entropy": lambda section: measure_entropy(section, small, Path(folder)),
            "sampler": lambda section: measure_sampler(section, small),
            "training": lambda section: measure_training(section, small, Path(folder)),
        }
        for title, work in sections.items():
            section = Section(title, BUDGETS[title], end)
            work(section)
            rows[title] = section.rows
            texts.append(section.to_markdown())
            print(texts[-1], flush=True)
    seconds = time.monotonic() - started
    print(f"{seconds:.0f} s in total")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine, "seconds": seconds, "sections": rows}
        (arguments.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / "gpu.md").write_text("\n".join(texts))


if __name__ == "__main__":
    main()
