"""Memory of an experiment: of a process in each phase of a step, of a server node, and on disk.

Resident memory follows from the number of weights. What a pass allocates in addition is measured on the model's own layers with
fake tensors (`memory_trace.py`). Each phase of a step (play, scoring, update) frees its memory, so the largest phase decides, not
the sum.
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
CHECKPOINTS_ON_DISK: Final = 3  # while the newest checkpoint is written
VLLM_SLEEP_BYTES: Final = 2e9  # bytes that vLLM keeps in sleep mode: CUDA graphs and NCCL buffers
VLLM_SERVER_SHARE: Final = 0.9  # share of a GPU that a vLLM server uses
BANDWIDTH: Final = 2e12  # bytes per second at which a GPU reads all weights for each decoded token (A100)


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of a process in each phase of a step, in bytes, by part."""

    weights: int
    """Number of weights."""
    trained: int
    """Number of trained weights."""
    saved: float
    """Bytes of a checkpoint, over all processes."""
    phases: dict[str, dict[str, float]]
    """Phase -> part -> bytes."""

    @property
    def phase(self) -> str:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> dict[str, float]:
        return self.phases[self.phase]

    @property
    def total(self) -> float:
        return sum(self.peak.values())

    @property
    def total_before_moments(self) -> float:
        """The total of a first step with one update: only this update creates the moments of the optimizer."""
        return max(
            sum(parts.values()) - (parts.get("optimizer", 0.0) if phase != "optimizer" else 0.0)
            for phase, parts in self.phases.items()
        )


@cache
def estimate_memory(process: ProcessSpec) -> MemoryEstimate:
    """Estimate the memory of a process.

    Raises:
        MissingResource: the passes of its model cannot be traced.
    """
    try:
        return _estimate_memory(process)
    except ConfigError:
        raise
    except Exception as error:  # of any type: some model classes of transformers branch on the data
        kind, why = json.loads(process.passes.shape)["model_type"], " ".join(str(error).split())[:80]
        raise MissingResource(
            "model.path", kind, f"its memory is unknown, because its passes cannot be traced ({why})"
        ) from error


def _estimate_memory(process: ProcessSpec) -> MemoryEstimate:
    """Add resident memory and traced memory."""
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
    buckets = sum(trained_bytes) if process.ranks > passes.processes else 0.0  # gradient buckets of DDP
    copies = sum(trained_bytes) if process.match else 0.0  # gradients of the reference
    phases["update"][GRADIENTS] = phases["update"].get(GRADIENTS, 0.0) + buckets + copies
    if not passes.offload:  # a GPU updates all weights at the same time
        scratch = shard * sum(trained_bytes) if passes.gpu else 2.0 * max(trained_bytes)
        trial = 2 * copies + moments if process.match not in (None, "gradient_norm") else 0.0
        gradients = shard * sum(trained_bytes) + buckets + trial
        phases["optimizer"] = resident | {GRADIENTS: gradients, ACTIVATIONS: scratch}
    return MemoryEstimate(weights, trained, sum(trained_bytes) + moments, phases)


def _allocated_bytes(process: ProcessSpec, gathered_bytes: int) -> dict[str, dict[str, float]]:
    """Phase -> part -> bytes that its passes allocate. `gathered_bytes` is the size of all weights as FSDP sends them."""
    from aem_exp.jobs.memory_trace import GATHERED

    trace, sharded = _cached_trace(process.passes), process.passes.processes > 1
    play = {"vLLM": process.engine_bytes}
    if process.sampler == "local":
        gathered = float(gathered_bytes) if sharded else 0.0
        play = {GATHERED: gathered, **_trace_play(trace, process.episodes, process.play_tokens, process.prompt)}
    scoring = _trace_scoring(trace, process.rows, process.tokens)
    if (
        process.reference and sharded
    ):  # TRL wraps it as one FSDP unit: all its weights, and the buffer of the all-gather
        scoring = scoring | {GATHERED: 2.0 * gathered_bytes}
    update = _trace_update(trace, process.rows, process.tokens, process.accumulates)
    return {"play": play, "scoring": scoring, "update": update}


@cache
def _cached_trace(passes: PassSpec) -> MemoryTrace:
    from aem_exp import policy
    from aem_exp.jobs.memory_trace import MemoryTrace

    dtype = "bfloat16" if passes.processes > 1 and passes.autocast else passes.dtype
    attention = (
        passes.attention if passes.attention in (None, "eager") else "sdpa"
    )  # only eager attention stores the scores
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
    """The number of key-value heads, of all heads and of layers, and the width of a head."""
    c = _cached_trace(process.passes).config
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return getattr(c, "num_key_value_heads", c.num_attention_heads), c.num_attention_heads, c.num_hidden_layers, width


def context_bytes(process: ProcessSpec, tokens: int) -> int:
    """Bytes of the keys and values of a context in bf16."""
    cached_heads, _, layers, width = attention_shape(process)
    return 4 * layers * cached_heads * width * tokens


def disk_space(experiment: Experiment, need: MemoryEstimate) -> tuple[float, float, float]:
    """Bytes that a run needs on disk, free bytes on that disk, and bytes of the weights."""
    weights = need.weights * (4 if experiment.model.dtype == "float32" else 2)
    root = config.outputs_root(experiment)
    free = shutil.disk_usage(next(folder for folder in (root, *root.parents) if folder.exists())).free
    return CHECKPOINTS_ON_DISK * need.saved + weights, free, weights


@dataclass(frozen=True)
class ServerSpec:
    """The server nodes of a job. The GPUs of a node share the policy and the contexts, all in bf16."""

    nodes: int
    gpus: int
    """GPUs of each node."""
    weights: float
    """Bytes of the policy."""
    context: float
    """Bytes of the cache of a full context."""
    free_bytes: float
    """Bytes of a node for contexts; infinite if the GPU memory is unknown."""

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
        """Number of full contexts that all servers together can hold."""
        return self.nodes * (self.free_bytes // self.context)

    def play_hours(self, sizes: StepSizes) -> float:
        """Hours of generation in a round. Each token reads the weights and, on average, half of the contexts of its batch."""
        at_once = max(1.0, min(sizes.live, self.max_contexts) / self.nodes)
        token = (self.weights + at_once * self.context / 2) / (self.gpus * BANDWIDTH)
        return sizes.sampled / self.nodes / at_once * token / 3600

    def __str__(self) -> str:
        contexts = "" if self.max_contexts == float("inf") else f", {self.max_contexts:,.0f} full contexts at once"
        return f"{self.nodes} nodes of {self.gpus} GPUs; {format_gb(self.weights / self.gpus)} GB of weights each{contexts}"
