"""Training of small models on the toy world, weighed: what a run holds at most, and what `jobs.memory` says of it."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aem_exp import policy
from aem_exp.envs import Task, Turn
from aem_exp.envs.executor import SerialExecutor
from aem_exp.jobs import memory
from aem_exp.jobs.memory import MemoryEstimate
from aem_exp.jobs.memory_trace import Meter
from aem_exp.jobs.sizes import PassSpec, ProcessSpec
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.types import Episode, Trajectory
from aem_exp.training.trainer import TrainerHooks
from support import toy


class LongerChatter(toy.Chatter):
    """Begins at different lengths, so that micro-batches are padded and caches have holes."""

    def reset(self, task: Task) -> Turn:
        turn = super().reset(task)
        return replace(turn, observation=turn.observation + " go" * (task.seed // 4))


class LongerChatterWorld(toy.ChatterWorld):
    def env(self) -> LongerChatter:
        return LongerChatter()


@dataclass(frozen=True)
class Setting:
    """A small model, and how it is trained."""

    name: str
    kind: str = "qwen3"
    hidden: int = 128
    layers: int = 3
    vocab: int = 2000
    tied: bool = True
    rows: int = 4  # of a micro-batch; ROWS are trained in an update
    dtype: str = "float32"
    attention: str = "sdpa"
    lora: dict[str, Any] | None = None
    autocast: bool = False
    checkpointing: bool = False
    optim: str = "adamw_torch"
    cuda: bool = False

    @property
    def shape(self) -> dict[str, Any]:
        sizes = {"hidden_size": self.hidden, "intermediate_size": 3 * self.hidden, "num_hidden_layers": self.layers}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": self.hidden // 4}
        words = {"vocab_size": self.vocab, "tie_word_embeddings": self.tied, "max_position_embeddings": 512}
        return {"model_type": self.kind, **sizes, **heads, **words}


ROWS = 8  # of an update: a step of 16 episodes makes two, so the second finds the optimizer's moments
SETTINGS = (  # the first few are the tests'
    Setting("fp32", hidden=256, layers=4),
    Setting("bf16, checkpointing", "llama", hidden=256, layers=4, tied=False, autocast=True, checkpointing=True),
    Setting("bf16, 20,000 words", "qwen2", layers=2, vocab=20_000, rows=2, autocast=True),
    Setting("bf16 weights, an adapter", hidden=256, dtype="bfloat16", lora={"r": 8}, autocast=True),
    Setting("fp32, rows in one, eager attention, sgd", attention="eager", rows=8, optim="sgd"),
    Setting("fp32, checkpointing", layers=6, checkpointing=True),
    Setting("bf16, six layers", "qwen2", hidden=512, layers=6, autocast=True),
    Setting("bf16, 30,000 words, checkpointing", layers=4, vocab=30_000, autocast=True, checkpointing=True),
)


def measure_peak(setting: Setting, folder: Path) -> tuple[float, MemoryEstimate]:
    """Bytes that a step holds at most, and the plan of a process with rows as long as theirs were."""
    trainer = make_trainer(setting, folder)
    played: list[Trajectory] = []
    trainer.hooks = TrainerHooks(lambda step, credit: played.extend(credit.played))
    with track_peak(trainer.model, setting.cuda) as held:
        trainer.train()
    return held[0], memory.estimate_memory(process_spec(setting, *lengths(played)))


def make_trainer(setting: Setting, folder: Path, pieces: dict[str, Any] | None = None, steps: int = 1) -> Any:
    """The trainer of a setting; `pieces`: the launch's own settings of a run in pieces."""
    torch.manual_seed(0)
    with torch.device("cuda" if setting.cuda else "cpu"):  # a GPU makes random weights faster
        model = policy.build_from_config(setting.shape, setting.dtype, setting.attention, setting.lora or {})
    rules = toy.env("full", response_tokens=12)
    run = toy.experiment("full", steps=steps, mini_batch=ROWS, bf16=setting.autocast, optim=setting.optim)
    how = pieces or {"use_cpu": not setting.cuda, "gradient_checkpointing": setting.checkpointing}
    run = replace(run, env=rules, launch=replace(run.launch, trainer=how))
    _, tokenizer = toy.policy(folder)
    exact = setting.dtype == "float32" and not setting.autocast
    more = {"model": model, "device_rows": setting.rows, "trust_sampler": exact, "draw": draw}
    return toy.trainer(
        folder, run, rollout=Rollout(SerialExecutor(LongerChatterWorld()), rules, Chat(tokenizer)), **more
    )


def draw(step: int, number: int = 0) -> list[Episode]:
    """Tasks of four turns each, so that rows are of similar length."""
    tasks = [task for task in toy.ChatterWorld().tasks("train") if task.kind == "turns4"]
    return [Episode(tasks[d], d, m, (0, step, d, m)) for d in range(4) for m in range(4)]


def lengths(played: list[Trajectory]) -> tuple[int, int]:
    """The most tokens of an episode, and of a first prompt."""
    whole = (sum(len(r.prompt) + len(r.sample.ids) for r in t.responses) for t in played)
    return max(whole), max(len(t.responses[0].prompt) for t in played)


def process_spec(setting: Setting, tokens: int, prompt: int, **changes: Any) -> ProcessSpec:
    """What `jobs.memory` makes of a setting, with rows of this length."""
    passes = PassSpec(
        shape=json.dumps(setting.shape),
        dtype=setting.dtype,
        attention=setting.attention,
        lora=json.dumps(setting.lora or {}),
        autocast=setting.autocast,
        fp32_head=False,
        gpu=setting.cuda,
        processes=1,
        offload=False,
        checkpointing=setting.checkpointing,
    )
    whole = ProcessSpec(
        passes=passes,
        optim=setting.optim,
        reference=False,
        scoring_pass=True,
        ranks=1,
        sampler="local",
        engine_bytes=0.0,
        engine_sleeps=False,
        episodes=2 * ROWS,
        prompt=prompt,
        tokens=tokens,
        play_tokens=tokens,
        rows=setting.rows,
        accumulates=setting.rows < ROWS,
    )
    return replace(whole, **changes)


@contextlib.contextmanager
def track_peak(model: Any, cuda: bool) -> Iterator[list[float]]:
    """The most bytes held: by the allocator of a GPU; on a CPU, by all tensors that torch is asked for."""
    out: list[float] = []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        yield out
        out.append(torch.cuda.max_memory_allocated())
        return
    with Meter() as meter:
        for tensor in (*model.parameters(), *model.buffers()):
            meter.count(tensor)
        yield out
    out.append(sum(meter.peaks[0].values()))
