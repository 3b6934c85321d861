"""The bytes that an experiment takes: of a process in each phase of a step, of a node that serves, and on disk.

What is resident follows from the number of weights; what a pass allocates beside them is rehearsed (`memory_trace.py`) on
the model's own layers. The phases of a step (play, scoring, update) free what they hold, so the largest of them decides,
not their sum.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

from aem_exp import config
from aem_exp.config import Experiment
from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.jobs.sizes import GB, PassSpec, ProcessSpec, StepSizes, format_gb, gpu_memory

if TYPE_CHECKING:
    from aem_exp.jobs.memory_trace import MemoryTrace

LIBRARIES: Final = ("torch", "transformers", "peft")  # to rehearse a model
MOMENT_BYTES: Final = {
    "sgd": 0.0,
    "adafactor": 0.01,
    "adamw_bnb_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
}  # bytes per weight
CHECKPOINTS_ON_DISK: Final = 3  # checkpoints on disk while the newest is written
VLLM_SLEEP_BYTES: Final = 2e9  # bytes that vLLM keeps in its sleep: graphs, and what NCCL took
VLLM_SERVER_SHARE: Final = 0.9  # of a GPU, that vLLM takes where it is alone
BANDWIDTH: Final = 2e12  # bytes a second, at which a GPU reads all weights for each token that it decodes: an A100's


@dataclass(frozen=True)
class MemoryEstimate:
    """What a process holds, in bytes and by its parts, in each phase of a step."""

    weights: int
    """Number of weights."""
    trained: int
    """Number of weights that are trained."""
    saved: float
    """Bytes of a checkpoint, of all processes together."""
    phases: dict[str, dict[str, float]]
    """Phase -> part -> bytes."""

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> dict[str, float]:
        return self.phases[self.phase]

    @property
    def total(self) -> float:
        return sum(self.peak.values())


@cache
def estimate_memory(process: ProcessSpec) -> MemoryEstimate:
    """What a process holds.

    Raises:
        MissingResource: its model is of a kind that cannot be rehearsed.
    """
    try:
        return _estimate_memory(process)
    except ConfigError:
        raise
    except Exception as error:  # transformers has hundreds of models, and some need to see their data
        kind, why = json.loads(process.passes.shape)["model_type"], " ".join(str(error).split())[:80]
        raise MissingResource(
            "model.path", kind, f"what it needs is not known, as its passes cannot be rehearsed ({why})"
        ) from error


def _estimate_memory(process: ProcessSpec) -> MemoryEstimate:
    """Add what is resident to what is rehearsed."""
    from aem_exp.jobs.memory_trace import ACTIVATIONS, GRADIENTS

    passes, parameters = process.passes, _cached_trace(process.passes).parameters
    mixed = passes.processes > 1 and passes.autocast
    trained_bytes = [p.numel() * (4 if mixed else p.element_size()) for p in parameters if p.requires_grad]
    weights = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    moments = trained * MOMENT_BYTES[process.optim] if process.optim in MOMENT_BYTES else 2.0 * sum(trained_bytes)
    stored, sent = (4 if passes.dtype == "float32" else 2), (2 if mixed or passes.dtype == "bfloat16" else 4)
    shard = 1 / passes.processes
    on_device = 0.0 if passes.offload else shard
    resident = {
        "weights": on_device * (sum(trained_bytes) + (weights - trained) * stored),
        "optimizer": on_device * moments,
        "reference": shard * weights * stored if process.reference else 0.0,
        "vLLM": VLLM_SLEEP_BYTES if process.engine_sleeps and process.engine_bytes else process.engine_bytes,
    }
    phases = {name: resident | parts for name, parts in _allocated_bytes(process, sent * weights).items()}
    buckets = sum(trained_bytes) if process.ranks > passes.processes else 0.0  # the gradients' copies that DDP sends
    phases["update"][GRADIENTS] = phases["update"].get(GRADIENTS, 0.0) + buckets
    if not passes.offload:  # a GPU does all weights at a time
        scratch = shard * sum(trained_bytes) if passes.gpu else 2.0 * max(trained_bytes)
        phases["optimizer"] = resident | {GRADIENTS: shard * sum(trained_bytes) + buckets, ACTIVATIONS: scratch}
    return MemoryEstimate(weights, trained, sum(trained_bytes) + moments, phases)


def _allocated_bytes(process: ProcessSpec, gathered_bytes: int) -> dict[str, dict[str, float]]:
    """Phase -> part -> bytes that its passes allocate; `gathered_bytes`: all weights, as FSDP sends them."""
    from aem_exp.jobs.memory_trace import GATHERED

    trace, sharded = _cached_trace(process.passes), process.passes.processes > 1
    play = {"vLLM": process.engine_bytes}
    if process.sampler == "local":
        gathered = float(gathered_bytes) if sharded else 0.0
        play = {GATHERED: gathered, **_trace_play(trace, process.episodes, process.play_tokens, process.prompt)}
    scoring = _trace_scoring(trace, process.rows, process.tokens)
    if process.reference and sharded:  # TRL makes it one unit: it comes whole, beside the buffer it comes in
        scoring = scoring | {GATHERED: 2.0 * gathered_bytes}
    update = _trace_update(trace, process.rows, process.tokens, process.accumulates)
    return {"play": play, "scoring": scoring, "update": update}


@cache
def _cached_trace(passes: PassSpec) -> MemoryTrace:
    from aem_exp import policy
    from aem_exp.jobs.memory_trace import MemoryTrace

    dtype = "bfloat16" if passes.processes > 1 and passes.autocast else passes.dtype
    attention = passes.attention if passes.attention in (None, "eager") else "sdpa"  # no other holds the scores
    return MemoryTrace(
        lambda: policy.build_from_config(json.loads(passes.shape), dtype, attention, json.loads(passes.lora)),
        autocast=passes.autocast,
        gpu=passes.gpu,
        masks=passes.attention in (None, "sdpa", "eager"),
        processes=passes.processes,
        offload=passes.offload,
        checkpointing=passes.checkpointing,
        fp32_head=passes.fp32_head,
    )


@cache
def _trace_play(trace: MemoryTrace, episodes: int, tokens: int, prompt: int) -> dict[str, float]:
    return {**trace.play(episodes, tokens, prompt)}


@cache
def _trace_scoring(trace: MemoryTrace, rows: int, tokens: int) -> dict[str, float]:
    return {**trace.score(rows, tokens, tokens - 1)}


@cache
def _trace_update(trace: MemoryTrace, rows: int, tokens: int, accumulates: bool) -> dict[str, float]:
    return {**trace.update(rows, tokens, tokens - 1, accumulates)}


def attention_shape(process: ProcessSpec) -> tuple[int, int, int, int]:
    """Heads that are cached, all heads, layers, and the width of a head."""
    c = _cached_trace(process.passes).config
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return getattr(c, "num_key_value_heads", c.num_attention_heads), c.num_attention_heads, c.num_hidden_layers, width


def context_bytes(process: ProcessSpec, tokens: int) -> int:
    """Bytes of a context's keys and values, in bf16."""
    cached_heads, _, layers, width = attention_shape(process)
    return 4 * layers * cached_heads * width * tokens


def disk_space(experiment: Experiment, need: MemoryEstimate) -> tuple[float, float, float]:
    """Bytes that a run needs on disk, that are free where it would be, and of its weights."""
    weights = need.weights * (4 if experiment.model.dtype == "float32" else 2)
    root = config.outputs_root(experiment)
    free = shutil.disk_usage(next(folder for folder in (root, *root.parents) if folder.exists())).free
    return CHECKPOINTS_ON_DISK * need.saved + weights, free, weights


@dataclass(frozen=True)
class ServerSpec:
    """The nodes of a job that serve: the GPUs of each hold the policy together, and contexts beside it. All of it is bf16."""

    nodes: int
    gpus: int
    """GPUs of each node."""
    weights: float
    """Bytes of the policy."""
    context: float
    """Bytes of the cache of a full context."""
    free_bytes: float
    """Bytes that a node has for contexts; infinite where the cards are not known."""

    @classmethod
    def from_experiment(cls, experiment: Experiment, need: MemoryEstimate) -> ServerSpec | None:
        launch, process = experiment.launch, ProcessSpec.from_experiment(experiment)
        if not launch.server_nodes:
            return None
        gpus, gpu_bytes = max(1, launch.gpus_per_node), gpu_memory(launch) * GB or float("inf")
        weights = 2.0 * need.weights
        free_bytes = gpus * (VLLM_SERVER_SHARE * gpu_bytes - VLLM_SLEEP_BYTES) - weights
        context = float(context_bytes(process, process.play_tokens))
        return cls(launch.server_nodes, gpus, weights, context, free_bytes)

    @property
    def max_contexts(self) -> float:
        """Full contexts that all servers hold at once."""
        return self.nodes * (self.free_bytes // self.context)

    def play_hours(self, sizes: StepSizes) -> float:
        """Hours of a round's play, where each token reads the weights and half of the contexts that are decoded with it."""
        at_once = max(1.0, min(sizes.live, self.max_contexts) / self.nodes)
        token = (self.weights + at_once * self.context / 2) / (self.gpus * BANDWIDTH)
        return sizes.sampled / self.nodes / at_once * token / 3600

    def __str__(self) -> str:
        contexts = "" if self.max_contexts == float("inf") else f", {self.max_contexts:,.0f} full contexts at once"
        return f"{self.nodes} nodes of {self.gpus} GPUs; {format_gb(self.weights / self.gpus)} GB of weights each{contexts}"
