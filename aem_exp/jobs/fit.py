"""Whether an experiment fits its machine, said before it is submitted: memory of a GPU, environments, disk and GPU-hours.

Sizes are upper bounds: every episode plays all its turns and fills its context, every group is trained on. What is resident
follows from the number of weights; what a pass allocates beside them is rehearsed (`memory_trace.py`) on the model's own layers.
The parts of a step (play, scoring, update) free what they hold, so the largest of them decides, not their sum.

GB are 10^9 bytes. A card of "80 GB" has some 85 of those; the rest is left to CUDA, NCCL and fragmentation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aem_exp import config
from aem_exp.config import Experiment, Launch, Model
from aem_exp.core.errors import ConfigError, MissingResource

if TYPE_CHECKING:
    from aem_exp.jobs.memory_trace import MemoryTrace

GB: Final = 1e9
MOMENT_BYTES: Final = {
    "sgd": 0.0,
    "adafactor": 0.01,
    "adamw_bnb_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
}  # bytes per weight
CHECKPOINTS_ON_DISK: Final = 3  # checkpoints on disk while the newest is written
VLLM_SLEEP_BYTES: Final = 2e9  # bytes that vLLM keeps in its sleep: graphs, and what NCCL took
VLLM_SERVER_SHARE: Final = 0.9  # of a GPU, that vLLM takes where it is alone
VLLM_SHARE: Final = 0.3  # of a GPU, that TRL gives vLLM where nothing is said
FIRST_PROMPT_DIVISOR: Final = 4  # a first prompt is taken to fill this part of a full history's context
UTILISATION: Final = 0.3  # of a GPU's bf16 peak: a common share for training at such lengths
BANDWIDTH: Final = 2e12  # bytes a second, at which a GPU reads all weights for each token that it decodes: an A100's
_SHAPE_KEYS: Final = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "max_position_embeddings"),
)
SHAPES: Final = {  # config.json of what conf/model/ names, so that a plan needs neither weights nor network
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True, 32768),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False, 32768),
    "Qwen/Qwen3-32B": ("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False, 40960),
}


# What is asked for.


@dataclass(frozen=True)
class StepSizes:
    """The sizes of one step, at most: what is played in a round, and what is trained on."""

    episodes: int
    live: int  # episodes at once
    rows: int
    tokens: int  # of those rows, prompts included
    sampled: int  # by the policy, in a round
    updates: int  # of the optimizer

    @classmethod
    def from_experiment(cls, experiment: Experiment) -> StepSizes:
        t, env, launch = experiment.trainer, experiment.env, experiment.launch
        windows, group = env.history == "window", t.group_size
        episodes = t.tasks_per_step * t.oversample * group
        kept = episodes + (t.tasks_per_step - 1) * group if t.rounds > 1 else episodes
        rows, said = kept * (env.max_turns if windows else 1), env.max_turns * env.response_tokens
        updates = 1 if t.mini_batch == "all" else max(1, round(rows / t.mini_batch))
        return cls(
            episodes=episodes,
            live=min(episodes, launch.device_episodes * process_count(launch) or episodes),
            rows=rows,
            tokens=rows * env.context_tokens,
            sampled=episodes * (said if windows else min(said, env.context_tokens)),
            updates=updates * t.num_iterations,
        )


@dataclass(frozen=True)
class PassSpec:
    """How the passes of a policy are computed; see `memory_trace.Rehearsal`."""

    shape: str  # of the model: its config.json
    dtype: str
    attention: str | None
    lora: str  # as JSON
    autocast: bool
    fp32_head: bool
    gpu: bool
    processes: int  # that the weights are in pieces over; 1: each has all
    offload: bool
    checkpointing: bool


@dataclass(frozen=True)
class ProcessSpec:
    """All that the memory of a process depends on: a value that can be varied, and remembered."""

    passes: PassSpec
    optim: str
    reference: bool  # a second model, frozen
    scored: bool  # all log-probs come from a pass of their own, and not a few of them for comparison
    ranks: int  # processes of the run
    sampler: str  # local | colocate | served
    engine: float  # bytes that vLLM takes beside the trainer, awake
    sleeps: bool
    episodes: int  # at once
    prompt: int  # tokens that are read at once
    tokens: int  # of a row
    played: int  # tokens of an episode in play, which a panel may give more of
    rows: int  # of a micro-batch
    accumulates: bool  # an update has several micro-batches

    @classmethod
    def from_experiment(cls, experiment: Experiment) -> ProcessSpec:
        """The process of an experiment with `model.path`.

        Raises:
            ConfigError: the shape of its model cannot be known.
        """
        e, t, env, launch = experiment, experiment.trainer, experiment.env, experiment.launch
        how, sizes, ranks = launch.trainer, StepSizes.from_experiment(experiment), process_count(launch)
        fsdp = how.get("fsdp_config") or {}
        passes = PassSpec(
            shape=read_shape(e.model),
            dtype=e.model.dtype,
            attention=e.model.attention,
            lora=json.dumps(e.model.lora or {}, sort_keys=True),
            autocast=t.bf16,
            fp32_head=t.cast_lm_head_to_fp32,
            gpu=launch.gpus_per_node > 0,
            processes=ranks if how.get("fsdp") else 1,
            offload=bool(fsdp.get("cpu_offload")),
            checkpointing=bool(how.get("gradient_checkpointing") or fsdp.get("activation_checkpointing")),
        )
        share = -(-(sizes.rows if t.mini_batch == "all" else min(sizes.rows, t.mini_batch)) // ranks)
        short = max(1, launch.device_tokens // env.context_tokens) if launch.device_tokens else share
        rows = min(share, short, launch.device_rows or share)
        played = -(-sizes.episodes // ranks)
        sampler = "served" if launch.sampler == "served" else "colocate" if how.get("use_vllm") else "local"
        engine = how.get("vllm_gpu_memory_utilization", VLLM_SHARE) * gpu_memory(launch) * GB
        return cls(
            passes=passes,
            optim=t.optim,
            reference=t.beta > 0 and not e.model.lora,
            scored=launch.sampler != "local" or e.model.dtype != "float32" or t.bf16 or t.beta > 0,
            ranks=ranks,
            sampler=sampler,
            engine=engine if sampler == "colocate" else 0.0,
            sleeps=bool(how.get("vllm_enable_sleep_mode")),
            episodes=min(played, launch.device_episodes or played),
            prompt=env.context_tokens - env.response_tokens
            if env.history == "window"
            else env.context_tokens // FIRST_PROMPT_DIVISOR,
            tokens=env.context_tokens,
            played=max(env.context_tokens, config.apply_evaluation_limits(e).env.context_tokens),
            rows=rows,
            accumulates=share > rows,
        )


def process_count(launch: Launch) -> int:
    return launch.nodes * max(1, launch.gpus_per_node)


def gpu_memory(launch: Launch) -> float:
    """GB of a GPU: as `slurm` says, or else of the one that is here; 0: not known."""
    if launch.gpu_memory_gb or launch.where != "local" or not launch.gpus_per_node:
        return launch.gpu_memory_gb
    import torch

    return torch.cuda.get_device_properties(0).total_memory / GB if torch.cuda.is_available() else 0.0


def read_shape(model: Model) -> str:
    """The config.json of a model: from its folder, the hub's cache, or SHAPES.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = model.path or ""
    if model.trust_remote_code:
        raise MissingResource(
            "model.trust_remote_code", True, "what a model of its own code needs is not known before it runs"
        )
    file = Path(path).expanduser() / "config.json"
    if path.count("/") == 1 and path[0] not in "./~" and not file.is_file():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "config.json", revision=model.revision)
        if not isinstance(cached, str):
            if path in SHAPES:
                return json.dumps(dict(zip(_SHAPE_KEYS, SHAPES[path], strict=True)))
            raise MissingResource(
                "model.path", path, f"its config.json is not on this machine: hf download {path} config.json"
            )
        file = Path(cached)
    try:
        text = file.read_text()
        json.loads(text)["model_type"]
    except OSError as error:
        raise ConfigError("model.path", path, f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError("model.path", path, f"{file} is no config.json of a model ({error!r})") from error
    return text


# What it needs.


@dataclass(frozen=True)
class MemoryEstimate:
    """What a process holds, in bytes and by its parts, in each phase of a step."""

    weights: int  # how many
    trained: int
    saved: float  # bytes of a checkpoint, of all processes together
    phases: dict[str, dict[str, float]]

    @property
    def phase(self) -> str:
        """The one that needs most."""
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
        Missing: its model is of a kind that cannot be rehearsed.
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
    from aem_exp.jobs.memory_trace import ACTIVATIONS, GATHERED, GRADIENTS

    how, seen = process.passes, _cached_trace(process.passes)
    mixed = how.processes > 1 and how.autocast
    learns = [p.numel() * (4 if mixed else p.element_size()) for p in seen.parameters if p.requires_grad]
    weights, trained = (sum(p.numel() for p in seen.parameters if p.requires_grad or every) for every in (True, False))
    moments = trained * MOMENT_BYTES[process.optim] if process.optim in MOMENT_BYTES else 2.0 * sum(learns)
    stored, sent = (4 if how.dtype == "float32" else 2), (2 if mixed or how.dtype == "bfloat16" else 4)
    part = 1 / how.processes
    here = 0.0 if how.offload else part
    resident = {
        "weights": here * (sum(learns) + (weights - trained) * stored),
        "optimizer": here * moments,
        "reference": part * weights * stored if process.reference else 0.0,
        "vLLM": VLLM_SLEEP_BYTES if process.sleeps and process.engine else process.engine,
    }
    copies = sum(learns) if process.ranks > how.processes else 0.0  # which DDP sends
    play = {"vLLM": process.engine}
    if process.sampler == "local":
        gathered = float(sent * weights) if how.processes > 1 else 0.0
        play = {GATHERED: gathered, **_trace_play(seen, process.episodes, process.played, process.prompt)}
    update = _trace_update(seen, process.rows, process.tokens, process.accumulates)
    score = _trace_scoring(seen, process.rows, process.tokens)
    if process.reference and how.processes > 1:  # TRL makes it one unit: it comes whole, beside the buffer it comes in
        score = score | {GATHERED: 2.0 * sent * weights}
    scratch = part * sum(learns) if how.gpu else 2.0 * max(learns)  # a GPU does all weights at a time
    phases = {
        "play": resident | play,
        "scoring": resident | score,
        "update": resident | update | {GRADIENTS: update.get(GRADIENTS, 0.0) + copies},
    }
    if not how.offload:
        phases["optimizer"] = resident | {GRADIENTS: part * sum(learns) + copies, ACTIVATIONS: scratch}
    return MemoryEstimate(weights, trained, sum(learns) + moments, phases)


@cache
def _cached_trace(how: PassSpec) -> MemoryTrace:
    from aem_exp import policy
    from aem_exp.jobs.memory_trace import MemoryTrace

    dtype = "bfloat16" if how.processes > 1 and how.autocast else how.dtype
    attention = how.attention if how.attention in (None, "eager") else "sdpa"  # whatever else never holds the scores
    return MemoryTrace(
        lambda: policy.build_from_config(json.loads(how.shape), dtype, attention, json.loads(how.lora)),
        autocast=how.autocast,
        gpu=how.gpu,
        masks=how.attention in (None, "sdpa", "eager"),
        processes=how.processes,
        offload=how.offload,
        checkpointing=how.checkpointing,
        fp32_head=how.fp32_head,
    )


@cache
def _trace_play(seen: MemoryTrace, episodes: int, tokens: int, prompt: int) -> dict[str, float]:
    return {**seen.play(episodes, tokens, prompt)}


@cache
def _trace_scoring(seen: MemoryTrace, rows: int, tokens: int) -> dict[str, float]:
    return {**seen.score(rows, tokens, tokens - 1)}


@cache
def _trace_update(seen: MemoryTrace, rows: int, tokens: int, again: bool) -> dict[str, float]:
    return {**seen.update(rows, tokens, tokens - 1, again)}


# What a plan says.


def plan_lines(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """A plan, as headings and texts. A policy that is made here has the first line alone.

    Raises:
        ConfigError: the shape of the model cannot be known.
    """
    yield "step", _format_step(experiment)
    if experiment.model.path is None:
        return
    launch, need = experiment.launch, estimate_memory(ProcessSpec.from_experiment(experiment))
    have, whose = gpu_memory(launch), "per GPU" if launch.gpus_per_node else "per process, beside Python's own"
    held = ", ".join(
        f"{n} {_format_gb(size)}" for n, size in sorted(need.peak.items(), key=lambda p: -p[1]) if size > GB / 20
    )
    others = ", ".join(f"{name} {_format_gb(sum(p.values()))}" for name, p in need.phases.items() if name != need.phase)
    yield "memory", f"{_format_gb(need.total)} {f'of {have:g} GB' if have else 'GB'} {whose}, in {need.phase}: {held}"
    yield "", f"{others}; {_format_weights(need)}"
    if serving := ServerSpec.from_experiment(experiment, need):
        yield "serve", str(serving)
    yield "disk", _format_disk(experiment, need)
    if launch.gpus_per_node:
        if not have:
            yield "note", "launch.gpu_memory_gb=0: not known, so nothing is refused"
        yield "cost", _format_cost(experiment, need)


def _format_step(experiment: Experiment) -> str:
    sizes, launch = StepSizes.from_experiment(experiment), experiment.launch
    nodes = f", {-(-sizes.live // launch.nodes):,} a node" if launch.nodes > 1 else ""
    tokens = f"{_format_count(sizes.tokens)} tokens, {_format_count(min(sizes.sampled, sizes.tokens))} of them sampled"
    updates = f"{sizes.updates:,} update{'s' if sizes.updates > 1 else ''}"
    return f"{sizes.live:,} environments at once{nodes}; up to {sizes.rows:,} rows, {tokens}; {updates}"


def _format_weights(need: MemoryEstimate) -> str:
    learning = f", {need.trained / 1e6:,.1f} M of them trained" if need.trained < need.weights else ""
    return f"{need.weights / 1e9:.2f} B weights{learning}"


def _format_disk(experiment: Experiment, need: MemoryEstimate) -> str:
    least, free, whole = _disk_space(experiment, need)
    saved = f"{CHECKPOINTS_ON_DISK} checkpoints of {_format_gb(need.saved)} while one is written"
    each = f"{_format_gb(least)} GB, for {saved}, and the weights at the end"
    once = (experiment.launch.trainer.get("fsdp_config") or {}).get("cpu_ram_efficient_loading")
    readers = 1 if once else max(1, experiment.launch.gpus_per_node)
    loaded = f"{_format_gb(readers * whole)} GB of a node's memory while it loads"
    return f"{each}; {_format_gb(free)} GB free here{', too few' if free < least else ''}; {loaded}"


def _disk_space(experiment: Experiment, need: MemoryEstimate) -> tuple[float, float, float]:
    """Bytes that a run needs on disk, that are free where it would be, and of its weights."""
    whole = need.weights * (4 if experiment.model.dtype == "float32" else 2)
    root = config.outputs_root(experiment)
    free = shutil.disk_usage(next(folder for folder in (root, *root.parents) if folder.exists())).free
    return CHECKPOINTS_ON_DISK * need.saved + whole, free, whole


def _format_cost(experiment: Experiment, need: MemoryEstimate) -> str:
    """2 FLOPs per weight and token forward, twice that backward, and attention to half a context on average."""
    t, launch, process, sizes = (
        experiment.trainer,
        experiment.launch,
        ProcessSpec.from_experiment(experiment),
        StepSizes.from_experiment(experiment),
    )
    if not launch.gpu_tflops:
        return "not known: launch.gpu_tflops=0"
    _, heads, layers, width = _attention_shape(process)
    forward = 2 * need.weights + 2 * process.tokens * heads * width * layers
    turns = experiment.env.max_turns if experiment.env.history == "window" else 1
    flops = {
        "play": forward * sizes.episodes * turns * process.tokens,
        "update": forward * sizes.tokens * (4 if process.passes.checkpointing else 3) * t.num_iterations,
        "scoring": forward * sizes.tokens * (process.scored + process.reference),
    }
    gpus, rate = process_count(launch), UTILISATION * launch.gpu_tflops * 1e12
    hours, slow = {name: count / rate / 3600 for name, count in flops.items()}, ""
    if serving := ServerSpec.from_experiment(experiment, need):  # who trains waits for them, and they for it
        every = gpus + serving.nodes * serving.gpus
        hours = {name: part * every / gpus for name, part in hours.items()} | {
            "play": serving.play_hours(sizes) * every
        }
        gpus, slow = every, f" and {BANDWIDTH / 1e12:g} TB/s for decoding"
    if process.sampler == "local":  # a process decodes its episodes in portions, one token of all of them after another
        portions = -(-sizes.episodes // (gpus * process.episodes))
        decoding = portions * sizes.sampled / sizes.episodes * 2 * need.weights / BANDWIDTH * gpus / 3600
        if decoding > hours["play"]:
            hours["play"], slow = decoding, f" and {BANDWIDTH / 1e12:g} TB/s for decoding"
    total = sum(hours.values())
    shares = ", ".join(f"{name} {part / total:.0%}" for name, part in hours.items())
    total *= t.steps
    told = f"about {total:,.0f} GPU-hours, {total / gpus / 24:,.1f} days, were every context full: {shares}"
    return f"{told}; at {UTILISATION:.0%} of {launch.gpu_tflops:g} TFLOP/s{slow}, without evaluation and environments"


@dataclass(frozen=True)
class ServerSpec:
    """The nodes of a job that serve: the GPUs of each hold the policy together, and contexts beside it. All of it is bf16."""

    nodes: int
    gpus: int  # of each
    weights: float  # bytes of the policy
    context: float  # bytes of the cache of a full context
    free_bytes: float  # bytes that a node has for contexts; infinite where the cards are not known

    @classmethod
    def from_experiment(cls, experiment: Experiment, need: MemoryEstimate) -> ServerSpec | None:
        launch, process = experiment.launch, ProcessSpec.from_experiment(experiment)
        if not launch.server_nodes:
            return None
        cached, _, layers, width = _attention_shape(process)
        gpus, have = max(1, launch.gpus_per_node), gpu_memory(launch) * GB or float("inf")
        weights = 2.0 * need.weights
        room = gpus * (VLLM_SERVER_SHARE * have - VLLM_SLEEP_BYTES) - weights
        return cls(launch.server_nodes, gpus, weights, 4.0 * layers * cached * width * process.played, room)

    @property
    def max_contexts(self) -> float:
        """Full contexts that all servers hold at once."""
        return self.nodes * (self.free_bytes // self.context)

    def play_hours(self, sizes: StepSizes) -> float:
        """Of a round's play, where each token reads the weights and half of the contexts that are decoded with it."""
        at_once = max(1.0, min(sizes.live, self.max_contexts) / self.nodes)
        token = (self.weights + at_once * self.context / 2) / (self.gpus * BANDWIDTH)
        return sizes.sampled / self.nodes / at_once * token / 3600

    def __str__(self) -> str:
        contexts = "" if self.max_contexts == float("inf") else f", {self.max_contexts:,.0f} full contexts at once"
        return f"{self.nodes} nodes of {self.gpus} GPUs; {_format_gb(self.weights / self.gpus)} GB of weights each{contexts}"


def _attention_shape(process: ProcessSpec) -> tuple[int, int, int, int]:
    """Heads that are cached, all heads, layers, and the width of a head."""
    c = _cached_trace(process.passes).config
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return getattr(c, "num_key_value_heads", c.num_attention_heads), c.num_attention_heads, c.num_hidden_layers, width


def context_warnings(experiment: Experiment) -> list[str]:
    """What is allowed and yet not what it seems, as the shape of the model says."""
    if experiment.model.path is None:
        return []
    from aem_exp import policy

    env, panels = experiment.env, experiment.evaluation
    try:
        most, scaled = policy.max_positions(json.loads(read_shape(experiment.model)))
    except ConfigError:  # told where it is needed
        return []
    asked = max(env.context_tokens, panels.context_tokens)
    if not 0 < most < asked:
        return []
    field = "env.context_tokens" if asked == env.context_tokens else "evaluation.context_tokens"
    told = f"{field}={asked}: beyond the {most:,} positions that its config.json has, the model extrapolates"
    remedy = (
        "no server of vLLM's does that" if scaled else "YaRN is rope_parameters there, for trainer and servers alike"
    )
    return [f"{told}; {remedy}"]


# What does not fit.


def check_memory(experiment: Experiment) -> None:
    """Refuse what cannot fit into a GPU of its launch, and name the key to change.

    Raises:
        ConfigError: with what is needed, and with a value that would fit where there is one.
    """
    have = gpu_memory(experiment.launch) * GB
    if experiment.model.path is None or not have:
        return
    try:
        process = ProcessSpec.from_experiment(experiment)
        need = estimate_memory(process)
    except MissingResource:  # what is not known is not refused
        return
    _check_vllm_share(experiment, process, need)
    if (serving := ServerSpec.from_experiment(experiment, need)) and serving.free_bytes < serving.context:
        told = (
            f"the {serving.gpus} GPUs of a node that serves hold {_format_gb(serving.free_bytes + serving.weights)} GB"
        )
        remedy = f"{told}, and the policy takes {_format_gb(serving.weights)} and one full context {_format_gb(serving.context)}"
        raise ConfigError("launch.server_nodes", serving.nodes, f"{remedy}: larger or more GPUs per node")
    if need.total <= have:
        return
    most = max(need.peak, key=need.peak.__getitem__)
    told = f"needs {_format_gb(need.total)} of {have / GB:g} GB per GPU in {need.phase}, most of it {most}"
    tried: dict[str, Any] = {}
    for field, old, new, lighter in _propose_changes(experiment, process, need.phase):
        tried.setdefault(field, old)
        if estimate_memory(lighter).total <= have:
            raise ConfigError(field, old, f"{told}; {_format_value(new)} would fit")
    field, old = next(iter(tried.items()), ("launch", experiment.launch.name))
    also = f"; none of {', '.join(tried)} is enough alone" if tried else ""
    raise ConfigError(field, old, f"{told}{also}: several of them, more or larger GPUs, or another model")


def check_disk(experiment: Experiment) -> None:
    """Refuse a new run whose checkpoints do not fit where it would be. Not part of a plan, which may be made elsewhere.

    Raises:
        ConfigError: with what is needed.
    """
    if experiment.model.path is None or config.run_dir(experiment).exists():
        return
    try:
        least, free, _ = _disk_space(experiment, estimate_memory(ProcessSpec.from_experiment(experiment)))
    except MissingResource:
        return
    if free < least:
        told = f"has {_format_gb(free)} GB free, and the run takes {_format_gb(least)}: "
        told += f"{CHECKPOINTS_ON_DISK} checkpoints and the weights at the end"
        raise ConfigError("outputs", config.outputs_root(experiment), f"{told}; choose a folder with more room")


def _check_vllm_share(experiment: Experiment, process: ProcessSpec, need: MemoryEstimate) -> None:
    """vLLM begins only where the weights and the cache of a full context fit into its share (both bf16)."""
    if process.sampler != "colocate":
        return
    how, (cached, _, layers, width) = experiment.launch.trainer, _attention_shape(process)
    least = 2 * need.weights + 4 * layers * cached * width * process.tokens
    if least + VLLM_SLEEP_BYTES > process.engine:
        share = how.get("vllm_gpu_memory_utilization", VLLM_SHARE)
        told = f"gives vLLM {_format_gb(process.engine)} GB per GPU; with one context of the policy it takes "
        told += _format_gb(least + VLLM_SLEEP_BYTES)
        raise ConfigError("launch.trainer.vllm_gpu_memory_utilization", share, told)


def _propose_changes(
    experiment: Experiment, process: ProcessSpec, phase: str
) -> Iterator[tuple[str, Any, Any, ProcessSpec]]:
    """Keys that make a process lighter where it needs most: a field, its value, another one, and the process with that."""
    launch, how = experiment.launch, process.passes
    at = "launch.trainer"
    if phase == "play":
        for fewer in _halves(process.episodes):
            yield "launch.device_episodes", launch.device_episodes, fewer, replace(process, episodes=fewer)
        if process.sampler == "colocate":
            share = launch.trainer.get("vllm_gpu_memory_utilization", VLLM_SHARE)
            for less in (0.9, 0.8, 0.7, 0.6, 0.5):
                new = round(share * less, 2)
                yield f"{at}.vllm_gpu_memory_utilization", share, new, replace(process, engine=process.engine * less)
    elif phase != "optimizer":
        by_tokens = launch.device_tokens and process.rows < (launch.device_rows or process.rows + 1)
        for fewer in _halves(process.rows):
            lighter = replace(process, rows=fewer, accumulates=True)
            if by_tokens:
                yield "launch.device_tokens", launch.device_tokens, fewer * process.tokens, lighter
            else:
                yield "launch.device_rows", launch.device_rows, fewer, lighter
        if not how.checkpointing:
            name = "fsdp_config.activation_checkpointing" if how.processes > 1 else "gradient_checkpointing"
            yield f"{at}.{name}", False, True, replace(process, passes=replace(how, checkpointing=True))
    if process.engine and not process.sleeps:
        yield f"{at}.vllm_enable_sleep_mode", False, True, replace(process, sleeps=True)
    if process.ranks > how.processes:
        yield f"{at}.fsdp", False, True, replace(process, passes=replace(how, processes=process.ranks))
    elif how.processes > 1 and not how.offload:
        yield f"{at}.fsdp_config.cpu_offload", False, True, replace(process, passes=replace(how, offload=True))


def _halves(count: int) -> Iterator[int]:
    while count > 1:
        count //= 2
        yield count


def _format_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _format_gb(size: float) -> str:
    return f"{size / GB:,.0f}" if size >= 100 * GB else f"{size / GB:,.1f}"


def _format_count(tokens: int) -> str:
    return f"{tokens / 1e6:,.1f} M" if tokens >= 1e5 else f"{tokens:,}"
