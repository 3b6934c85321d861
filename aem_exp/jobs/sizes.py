"""Sizes of a step and of each process: batch arithmetic without a model.

Sizes are upper bounds: every episode plays all its turns and fills its context, and every group is trained.

1 GB is 10^9 bytes. A GPU of "80 GB" has about 85 of these; the difference is left to CUDA, NCCL and fragmentation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aem_exp import config
from aem_exp.config import Experiment, Launch, Model
from aem_exp.config.model_path import is_hub_id, wheel_file
from aem_exp.core import extras
from aem_exp.core.errors import ConfigError, MissingResource

GB: Final = 1e9
VLLM_SHARE: Final = 0.3  # TRL's default for the share of a GPU that vLLM uses
FIRST_PROMPT_DIVISOR: Final = 4  # with full history, a first prompt is assumed to fill 1/4 of the context
_SHAPE_KEYS: Final = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "max_position_embeddings"),
)
SHAPES: Final = {  # config.json of the models in conf/model/, so that a plan needs neither weights nor a network
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True, 32768),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False, 32768),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True, 8192),
    "Qwen/Qwen3-32B": ("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False, 40960),
}


@dataclass(frozen=True)
class StepSizes:
    """Upper bounds of the sizes of one step."""

    episodes: int
    """Episodes of a round."""
    live: int
    """Episodes that are played at the same time."""
    rows: int
    """Rows that are trained."""
    tokens: int
    """Tokens of these rows, including prompts."""
    sampled: int
    """Tokens that the policy samples in a round."""
    updates: int
    """Updates of the optimizer."""

    @classmethod
    def from_experiment(cls, experiment: Experiment) -> StepSizes:
        t, env, launch = experiment.trainer, experiment.env, experiment.launch
        windows, group = env.history == "window", t.group_size
        episodes = t.tasks_per_step * t.oversample * group
        kept = episodes + (t.tasks_per_step - 1) * group if t.rounds > 1 else episodes
        rows, response_tokens = kept * (env.max_turns if windows else 1), env.max_turns * env.response_tokens
        updates = 1 if t.mini_batch == "all" else max(1, round(rows / t.mini_batch))
        return cls(
            episodes=episodes,
            live=min(episodes, launch.device_episodes * process_count(launch) or episodes),
            rows=rows,
            tokens=rows * env.context_tokens,
            sampled=episodes * (response_tokens if windows else min(response_tokens, env.context_tokens)),
            updates=updates * t.num_iterations,
        )


@dataclass(frozen=True)
class RowLengths:
    """The largest lengths of rows and prompts, in tokens."""

    row: int
    """Tokens of a row."""
    prompt: int
    """Tokens of a prompt that are processed in one pass."""
    episode: int
    """Tokens of the context of an episode while it is played; evaluation may allow more than training."""

    @classmethod
    def from_experiment(cls, experiment: Experiment) -> RowLengths:
        """The lengths that the config allows: every row fills its context."""
        env = experiment.env
        window, first = env.context_tokens - env.response_tokens, env.context_tokens // FIRST_PROMPT_DIVISOR
        return cls(env.context_tokens, window if env.history == "window" else first, config.max_context(experiment))


@dataclass(frozen=True)
class PassSpec:
    """The settings of the passes of a policy; see `memory_trace.MemoryTrace`."""

    shape: str
    """The model's config.json."""
    dtype: str
    attention: str | None
    lora: str
    """The settings of the adapter, as JSON."""
    autocast: bool
    fp32_head: bool
    gpu: bool
    processes: int
    """Number of processes that shard the weights; 1: each process has all weights."""
    offload: bool
    checkpointing: bool

    @classmethod
    def from_experiment(cls, experiment: Experiment) -> PassSpec:
        t, model, launch = experiment.trainer, experiment.model, experiment.launch
        fsdp = launch.trainer.get("fsdp_config") or {}
        return cls(
            shape=read_shape(model),
            dtype=model.dtype,
            attention=model.attention,
            lora=json.dumps(model.lora or {}, sort_keys=True),
            autocast=t.bf16,
            fp32_head=t.cast_lm_head_to_fp32,
            gpu=launch.gpus_per_node > 0,
            processes=process_count(launch) if launch.trainer.get("fsdp") else 1,
            offload=bool(fsdp.get("cpu_offload")),
            checkpointing=bool(launch.trainer.get("gradient_checkpointing") or fsdp.get("activation_checkpointing")),
        )


@dataclass(frozen=True)
class ProcessSpec:
    """Everything that the memory of a process depends on. Hashable, so that estimates can be cached."""

    passes: PassSpec
    optim: str
    reference: bool
    """A frozen reference model exists."""
    scoring_pass: bool
    """A separate pass computes all log-probabilities, not only a sample of them for comparison."""
    ranks: int
    """Processes of the run."""
    sampler: str
    """local | colocate | served"""
    engine_bytes: float
    """Bytes that vLLM uses next to the trainer while it is awake."""
    engine_sleeps: bool
    episodes: int
    """Episodes that are played at the same time."""
    prompt: int
    """Tokens of a prompt that are processed in one pass."""
    tokens: int
    """Tokens of a row."""
    play_tokens: int
    """Tokens of an episode; evaluation may allow more than training."""
    rows: int
    """Rows of a micro-batch."""
    accumulates: bool
    """Whether an update has several micro-batches."""
    match: str | None = None
    """`modulation.match`: needs copies of gradients, and, for a trial of the optimizer step, of weights and moments."""

    @classmethod
    def from_experiment(cls, experiment: Experiment, lengths: RowLengths | None = None) -> ProcessSpec:
        """The process of an experiment with `model.path`.

        Args:
            lengths: lengths of rows; None: the largest that the config allows.

        Raises:
            ConfigError: the shape of the model is not known.
        """
        t, model, launch = experiment.trainer, experiment.model, experiment.launch
        lengths = lengths or RowLengths.from_experiment(experiment)
        sizes, ranks = StepSizes.from_experiment(experiment), process_count(launch)
        share = -(-(sizes.rows if t.mini_batch == "all" else min(sizes.rows, t.mini_batch)) // ranks)
        short = max(1, launch.device_tokens // lengths.row) if launch.device_tokens else share
        rows = min(share, short, launch.device_rows or share)
        episodes = -(-sizes.episodes // ranks)
        sampler = "served" if launch.sampler == "served" else "colocate" if launch.trainer.get("use_vllm") else "local"
        return cls(
            passes=PassSpec.from_experiment(experiment),
            optim=t.optim,
            reference=t.beta > 0 and not model.lora,
            scoring_pass=launch.sampler != "local" or model.dtype != "float32" or t.bf16 or t.beta > 0,
            ranks=ranks,
            sampler=sampler,
            engine_bytes=vllm_share(launch) * gpu_memory(launch) * GB if sampler == "colocate" else 0.0,
            engine_sleeps=bool(launch.trainer.get("vllm_enable_sleep_mode")),
            episodes=min(episodes, launch.device_episodes or episodes),
            prompt=lengths.prompt,
            tokens=lengths.row,
            play_tokens=lengths.episode,
            rows=rows,
            accumulates=share > rows,
            match=experiment.modulation.match,
        )


def process_count(launch: Launch) -> int:
    return launch.nodes * max(1, launch.gpus_per_node)


def vllm_share(launch: Launch) -> float:
    """The share of a GPU that vLLM uses next to the trainer."""
    share: float = launch.trainer.get("vllm_gpu_memory_utilization", VLLM_SHARE)
    return share


def gpu_memory(launch: Launch) -> float:
    """GB of a GPU: `launch.gpu_memory_gb`, or the memory of the GPU of this machine; 0 if unknown."""
    if launch.gpu_memory_gb or launch.where != "local" or not launch.gpus_per_node:
        return launch.gpu_memory_gb
    if extras.first_missing(["torch"]):
        return 0.0
    import torch

    return torch.cuda.get_device_properties(0).total_memory / GB if torch.cuda.is_available() else 0.0


def read_shape(model: Model) -> str:
    """The config.json of a model, from its folder, the Hugging Face cache, or `SHAPES`.

    Raises:
        ConfigError: it is missing or cannot be read.
    """
    path, wheel = model.path or "", wheel_file(model)
    if model.trust_remote_code:
        raise MissingResource(
            "model.trust_remote_code", True, "the memory of a model with its own code cannot be estimated"
        )
    file = (wheel.folder if wheel else Path(path).expanduser()) / "config.json"
    if wheel and not file.is_file():
        command = f"python -m aem_exp.prepare model={model.name}"
        raise MissingResource("model.path", path, f"its config.json is not on this machine; run: {command}")
    if is_hub_id(path) and not file.is_file():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "config.json", revision=model.revision)
        if not isinstance(cached, str):
            if path in SHAPES:
                return json.dumps(dict(zip(_SHAPE_KEYS, SHAPES[path], strict=True)))
            raise MissingResource(
                "model.path", path, f"its config.json is not on this machine; run: hf download {path} config.json"
            )
        file = Path(cached)
    try:
        text = file.read_text()
        json.loads(text)["model_type"]
    except OSError as error:
        raise ConfigError("model.path", path, f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError("model.path", path, f"{file} is not the config.json of a model ({error!r})") from error
    return text


def format_gb(size: float) -> str:
    return f"{size / GB:,.0f}" if size >= 100 * GB else f"{size / GB:,.1f}"
