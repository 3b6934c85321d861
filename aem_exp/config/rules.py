"""Checks that settings of an experiment do not contradict each other, and lists settings that have no effect."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from math import prod
from string import Formatter
from typing import TYPE_CHECKING, Final

from aem_exp.config.trainer_keys import ROW_MEAN_LOSSES
from aem_exp.core.errors import ConfigError, MissingResource, format_value, unknown_key_error

if TYPE_CHECKING:
    from aem_exp.config import Experiment

_TURN_FIELDS: Final = {
    "task",
    "observation",
    "actions",
    "step",
    "turn",
    "left",
}  # turns taken, this one's number, turns left
_WINDOW_FIELDS: Final = _TURN_FIELDS | {"history", "length"}
TEMPLATE_FIELDS: Final = {  # history -> template -> what it may quote
    "full": {"first": _TURN_FIELDS, "next": _TURN_FIELDS},
    "window": {"first": _TURN_FIELDS, "window": _WINDOW_FIELDS, "pair": {"n", "observation", "action"}},
}
NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}")
OPTIMIZER_KEYS: Final = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16")
CONSTANT_SCHEDULE: Final = "aem_exp.schedules.Constant"
MAX_EPISODES: Final = 1_000_000  # of a step: more is a slip of the finger
UNFILTERED_SAMPLING: Final = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def check(e: Experiment) -> None:
    """Refuse the first contradiction, by name.

    Raises:
        ConfigError: field, value, and what they collide with.
    """
    for rule in RULES:
        rule(e)


def check_against_parent(e: Experiment, parent: Experiment) -> None:
    """Refuse what a run that begins at another's last checkpoint could not honour: weights and moments are as they are."""
    kept = {f"trainer.{key}": (getattr(parent.trainer, key), getattr(e.trainer, key)) for key in OPTIMIZER_KEYS}
    kept |= {f"model.{key}": (value, getattr(e.model, key)) for key, value in vars(parent.model).items()}
    for field, (old, new) in kept.items():
        if old != new:
            raise ConfigError(
                field, new, f"must stay {format_value(old)}: weights and optimizer are those of {e.parent_dir}"
            )
    if e.trainer.steps <= e.parent_steps:
        remedy = f"must be above {e.parent_steps}, the steps of {e.parent_dir}: steps are counted from its start"
        raise ConfigError("trainer.steps", e.trainer.steps, remedy)


def notes(e: Experiment) -> list[str]:
    """What is allowed and yet does nothing, or not what its name says."""
    t, out = e.trainer, []
    fits = e.env.history == "full" and round(t.tasks_per_step * t.group_size / _rows_per_update(e)) == 1
    if t.num_iterations == 1 and (t.mini_batch == "all" or fits):
        clips = ", ".join(
            f"trainer.{key}" for key in ("epsilon", "epsilon_high", "delta") if getattr(t, key) is not None
        )
        out.append(f"one update per step (trainer.mini_batch={t.mini_batch}): the ratio is 1, so {clips} never act")
    if t.importance_sampling_level == "sequence" and t.loss_type in ("bnpo", "dr_grpo", "dapo", "cispo"):
        out.append(f"trainer.loss_type={t.loss_type} weights a sequence ratio by length; GSPO's own loss_type is grpo")
    if e.parent_steps and (anew := _progress_schedules(e)):
        span = f"steps {e.parent_steps + 1} to {t.steps}"
        out.append(f"{' and '.join(anew)}: a new schedule over {span}, the steps of this run; not the parent's")
    if e.modulation.lam is not None and e.modulation.gate == 0:
        out.append("modulation.gate=0: groups whose entropies differ by noise alone are modulated too")
    if e.modulation.lam is not None and not any(v for k, v in e.modulation.lam.items() if k != "_target_"):
        out.append(f"modulation={e.modulation.name} with lambda 0: this is the baseline alone, under another name")
    if t.mask_truncated_completions:
        out.append("trainer.mask_truncated_completions=true: where failures run out of turns, only wins are trained")
    if e.env.history == "full" and e.env.max_turns * e.env.response_tokens > e.env.context_tokens:
        out.append(
            f"env.context_tokens={e.env.context_tokens}: too few for env.max_turns={e.env.max_turns} full responses"
        )
    if 0 < e.launch.device_tokens < e.env.context_tokens:
        out.append(
            f"launch.device_tokens={e.launch.device_tokens}: longer rows are trained one by one, whatever they need"
        )
    for name in TEMPLATE_FIELDS[e.env.history]:
        needed = {"observation"} if name != "pair" else {"observation", "action"}
        if not needed & _template_fields(e.env.prompt[name]):
            out.append(f"env.prompt.{name} has no {{observation}}: the policy is not shown what it stands before")
    if e.env.history == "window" and e.env.window and "history" not in _template_fields(e.env.prompt["window"]):
        out.append(f"env.prompt.window has no {{history}}: env.window={e.env.window} shows nothing")
    if e.model.path and not e.model.lora and t.learning_rate > 1e-4:
        out.append(
            f"trainer.learning_rate={t.learning_rate:g} is for a tiny policy; for weights that are loaded, 1e-6 or so"
        )
    if e.env.history == "window" and e.env.window == 0:
        out.append("env.window=0: the policy is shown nothing of the past turns")
    if e.env.make.get("split") == "verl_agent":
        out.append(
            "env.make.split=verl_agent: for comparing with its published numbers alone; dev is drawn as it draws it"
        )
    if e.env.make.get("nouns") == "words":
        out.append("env.make.nouns=words: which product is of the right kind is approximate, and so are rewards")
    if e.launch.sampler == "served" and not e.launch.workers:
        out.append(
            "launch.workers=0: environments are stepped one after another, while servers generate; see idle_share"
        )
    if e.evaluation.every == 0:
        out.append("evaluation.every=0: the dev panel is not read while training")
    return out


def _progress_schedules(e: Experiment) -> list[str]:
    """What follows the progress of a run."""
    lam, shape = e.modulation.lam or {}, e.trainer.lr_scheduler_type
    fields = {"modulation.lam": lam.get("_target_", CONSTANT_SCHEDULE), "trainer.lr_scheduler_type": shape}
    return [f"{field}={value}" for field, value in fields.items() if value not in (CONSTANT_SCHEDULE, "constant")]


def _check_name(e: Experiment) -> None:
    if not NAME_PATTERN.fullmatch(e.name):
        raise ConfigError("name", e.name, "must be a file name: letters, digits, and . _ + = - (at most 100)")


def _check_tracking(e: Experiment) -> None:
    if not e.tracking:
        return
    from aem_exp.core.errors import redact

    if (safe := redact(e.tracking)) != e.tracking:
        remedy = "holds credentials; those come from the environment: MLFLOW_TRACKING_USERNAME and _PASSWORD or _TOKEN,"
        raise ConfigError("tracking", safe, f"{remedy} or the URI in MLFLOW_TRACKING_URI")


def _check_model(e: Experiment) -> None:
    model = e.model
    if (model.path is None) == (model.make is None):
        given = "neither is set" if model.path is None else "both are set"
        raise ConfigError("model.path", model.path, f"a model is loaded (model.path) or made (model.make): {given}")
    if model.path is None and model.revision is not None:
        raise ConfigError("model.revision", model.revision, "only read with model.path")
    if model.trust_remote_code and not model.code_sha256:
        remedy = "running code from the hub needs model.code_sha256: the hash of the code that you reviewed"
        raise ConfigError("model.trust_remote_code", True, remedy)
    if model.code_sha256 and not model.trust_remote_code:
        raise ConfigError("model.code_sha256", model.code_sha256, "only read with model.trust_remote_code=true")
    if model.lora and model.lora.get("r", 1) < 1:
        raise ConfigError("model.lora.r", model.lora["r"], "must be a whole number of at least 1")


def _check_modulation(e: Experiment) -> None:
    m, neutral = e.modulation, type(e.modulation)()
    for key, value in vars(m).items():
        if m.lam is None and key not in ("name", "lam") and value != getattr(neutral, key):
            raise ConfigError(
                f"modulation.{key}", value, "only read with modulation.lam; to switch off: modulation=none"
            )
    if m.bonus_lam != neutral.bonus_lam and not m.bonus:
        raise ConfigError("modulation.bonus_lam", m.bonus_lam, "only read with modulation.bonus above 0")
    if m.keep != neutral.keep and (m.bonus or m.centred):
        field = "bonus" if m.bonus else "centred"
        remedy = f"would train what modulation.keep={m.keep} leaves out; only read with modulation.keep=all"
        raise ConfigError(f"modulation.{field}", getattr(m, field), remedy)
    if m.bonus and m.unit == "token":
        raise ConfigError("modulation.bonus", m.bonus, "is paid for the next response; needs modulation.unit=response")


def _check_budgets(e: Experiment) -> None:
    env = e.env
    if env.response_tokens >= env.context_tokens:
        remedy = f"must be below env.context_tokens={env.context_tokens}, which also holds the prompt"
        raise ConfigError("env.response_tokens", env.response_tokens, remedy)
    if env.history == "full" and env.window:
        raise ConfigError("env.window", env.window, "only read with env.history=window")


def _check_world(e: Experiment) -> None:
    reward = e.env.make.get("reward", 1.0)
    if str(e.env.make.get("_target_", "")).startswith("aem_exp.envs.") and not (
        isinstance(reward, int | float) and reward > 0
    ):
        raise ConfigError("env.make.reward", reward, "must be above 0: it is what success is paid")


def _check_prompts(e: Experiment) -> None:
    templates = {name: words for history in TEMPLATE_FIELDS.values() for name, words in history.items()}
    for name in TEMPLATE_FIELDS[e.env.history]:
        if name not in e.env.prompt:
            raise ConfigError(f"env.prompt.{name}", None, f"required with env.history={e.env.history}: a template")
    for name, text in e.env.prompt.items():
        field = f"env.prompt.{name}"
        if name not in templates:
            raise unknown_key_error(field, text, templates)
        try:
            quoted = _template_fields(text)
        except ValueError as error:
            raise ConfigError(field, text, f"is not a template ({error}); write {{{{ and }}}} for braces") from error
        for word in sorted(quoted - templates[name]):
            raise ConfigError(field, f"{{{word}}}", sorted(f"{{{known}}}" for known in templates[name]))


def _template_fields(template: str) -> set[str]:
    return {word for _, word, _, _ in Formatter().parse(template) if word is not None}


def _check_sizes(e: Experiment) -> None:
    t, world = e.trainer, e.launch.nodes * max(1, e.launch.gpus_per_node)
    sizes: dict[str, int] = {key: getattr(t, key) for key in ("group_size", "tasks_per_step", "oversample")}
    if (played := prod(sizes.values())) > MAX_EPISODES:
        key = max(sizes, key=sizes.__getitem__)
        remedy = f"makes {played:,} episodes a step, and {MAX_EPISODES:,} is the most"
        raise ConfigError(f"trainer.{key}", sizes[key], remedy)
    episodes = t.tasks_per_step * t.group_size
    asked = f"trainer.tasks_per_step={t.tasks_per_step} x trainer.group_size={t.group_size} = {episodes}"
    if e.env.history == "full" and _rows_per_update(e) > episodes:
        raise ConfigError("trainer.mini_batch", t.mini_batch, f"must be at most the rows of a step: {asked}")
    if episodes % world:
        raise ConfigError("launch", f"{world} processes", f"must divide the trajectories of a step: {asked}")


def _check_resampling(e: Experiment) -> None:
    for key, count in (("rounds", e.trainer.rounds), ("oversample", e.trainer.oversample)):
        if count > 1 and not e.trainer.drop_equal:
            raise ConfigError(f"trainer.{key}", count, "only read with trainer.drop_equal=true")


def _check_loss(e: Experiment) -> None:
    t = e.trainer
    averaged = e.env.history == "full" or e.modulation.unit == "token"
    if t.importance_sampling_level == "sequence" and averaged and e.modulation.lam is not None:
        remedy = "a sequence ratio averages the advantages of a row, which cancels the modulation; "
        remedy += "use env.history=window and env.window=N"
        remedy += " and modulation.unit=response" if e.modulation.unit == "token" else ""
        raise ConfigError("trainer.importance_sampling_level", "sequence", f"{remedy} or modulation=none")
    if t.count_masked and not t.mask_truncated_completions:
        raise ConfigError("trainer.count_masked", True, "only read with trainer.mask_truncated_completions=true")
    if t.count_masked and t.loss_type not in ROW_MEAN_LOSSES:
        remedy = f"only read with a loss that is a mean over rows (trainer.loss_type={', '.join(ROW_MEAN_LOSSES)})"
        raise ConfigError("trainer.count_masked", True, remedy)
    for loss, level in (("luspo", "sequence"), ("vespo", "token")):
        if t.loss_type == loss and t.importance_sampling_level != level:
            raise ConfigError("trainer.loss_type", loss, f"needs trainer.importance_sampling_level={level}")


def _check_sampling(e: Experiment) -> None:
    t = e.trainer
    for key, off in UNFILTERED_SAMPLING.items():
        value = getattr(t, key)
        if value not in (None, off) and e.modulation.lam is not None:
            raise ConfigError(
                f"trainer.{key}", value, f"modulation needs the unfiltered distribution: {off:g}, or modulation=none"
            )
    if t.repetition_penalty != 1 and not e.launch.trainer.get("use_vllm"):
        raise ConfigError(
            "trainer.repetition_penalty", t.repetition_penalty, "only read with launch.trainer.use_vllm=true"
        )


def _check_evaluation(e: Experiment) -> None:
    panels = {"evaluation.panel": e.evaluation.panel, "evaluation.final": e.evaluation.final}
    for field, panel in panels.items():
        if not NAME_PATTERN.fullmatch(panel) or panel == "train":
            raise ConfigError(field, panel, "must name a panel of held-out tasks, such as dev or test")
    if e.evaluation.panel == e.evaluation.final:
        raise ConfigError(
            "evaluation.final", e.evaluation.final, "must differ from evaluation.panel: it is opened once, at the end"
        )


def _check_launch(e: Experiment) -> None:
    launch, t = e.launch, e.launch.trainer
    for key in t:
        corrects = launch.sampler == "served" and key.startswith("vllm_importance_sampling_")
        if key.startswith("vllm_") and not t.get("use_vllm") and not corrects:
            raise ConfigError(f"launch.trainer.{key}", t[key], "only read with launch.trainer.use_vllm=true")
    if t.get("use_vllm") and launch.sampler != "engine":
        raise ConfigError("launch.trainer.use_vllm", True, "only read with launch.sampler=engine")
    if t.get("use_vllm") and t.get("vllm_mode", "colocate") != "colocate":
        raise ConfigError(
            "launch.trainer.vllm_mode", t["vllm_mode"], "vLLM in other processes is launch.sampler=served"
        )
    if t.get("use_vllm") and (size := t.get("vllm_tensor_parallel_size") or 1) > 1:
        remedy = (
            "must be 1: its processes would have to ask alike, and each plays its own episodes; for larger models, "
        )
        raise ConfigError("launch.trainer.vllm_tensor_parallel_size", size, remedy + "launch.sampler=served")
    if launch.gpus_per_node == 0 and t.get("use_vllm"):
        raise ConfigError("launch.trainer.use_vllm", True, "vLLM needs GPUs, and launch.gpus_per_node=0")
    if launch.gpus_per_node and t.get("use_cpu"):
        raise ConfigError("launch.trainer.use_cpu", True, f"collides with launch.gpus_per_node={launch.gpus_per_node}")
    if launch.workers_at is not None and not launch.workers:
        raise ConfigError("launch.workers_at", launch.workers_at, "only read with launch.workers above 0")
    if launch.env_seconds != type(launch)().env_seconds and not launch.workers:
        raise ConfigError("launch.env_seconds", launch.env_seconds, "only read with launch.workers above 0")
    tests = e.env.make.get("tests_seconds", 0.0)
    needed = tests + 240.0  # to read, lay out, and apply a patch, before it is tested
    if launch.workers and tests and launch.env_seconds < needed:
        remedy = f"must be at least {needed:g}, env.make.tests_seconds and 240: grading would be taken for hanging"
        raise ConfigError("launch.env_seconds", launch.env_seconds, remedy)
    if launch.where == "local" and launch.nodes > 1:
        raise ConfigError("launch.nodes", launch.nodes, "several nodes need launch.where=slurm")
    if launch.where == "slurm" and not launch.hours:
        raise ConfigError("launch.hours", launch.hours, "launch.where=slurm needs a time limit above 0")


def _check_servers(e: Experiment) -> None:
    launch, neutral = e.launch, type(e.launch)()
    for key in ("servers", "server_nodes", "server_weights", "server_seconds"):
        if launch.sampler != "served" and getattr(launch, key) != getattr(neutral, key):
            raise ConfigError(f"launch.{key}", getattr(launch, key), "only read with launch.sampler=served")
    if launch.sampler != "served":
        return
    if launch.servers is None and not launch.server_nodes:
        remedy = "launch.sampler=served needs the folder that says where they are, or launch.server_nodes above 0"
        raise ConfigError("launch.servers", None, remedy)
    if launch.servers is not None and launch.server_nodes:
        raise ConfigError(
            "launch.servers", launch.servers, "are those that launch.server_nodes starts, or others: not both"
        )
    if launch.server_nodes and launch.where != "slurm":
        raise ConfigError(
            "launch.server_nodes", launch.server_nodes, "needs launch.where=slurm; elsewhere, launch.servers"
        )
    if launch.server_weights == "nccl" and not launch.gpus_per_node:
        raise ConfigError("launch.server_weights", "nccl", "goes from GPU to GPU, and launch.gpus_per_node=0: files")


def _check_fsdp(e: Experiment) -> None:
    launch, t = e.launch, e.launch.trainer
    how = t.get("fsdp_config") or {}
    if not t.get("fsdp"):
        if how:
            raise ConfigError("launch.trainer.fsdp_config", how, "only read with launch.trainer.fsdp=true")
        return
    if launch.nodes * max(1, launch.gpus_per_node) < 2:
        raise ConfigError("launch.trainer.fsdp", True, "needs a run of several processes: launch.gpus_per_node above 1")
    if how.get("version", 2) != 2:
        raise ConfigError("launch.trainer.fsdp_config.version", how["version"], "must be 2: a policy is played whole")
    if e.model.lora and how.get("state_dict_type", "FULL_STATE_DICT") != "FULL_STATE_DICT":
        remedy = "of an adapter, it must be FULL_STATE_DICT: in pieces, peft does not find its weights again"
        raise ConfigError("launch.trainer.fsdp_config.state_dict_type", how["state_dict_type"], remedy)
    if how.get("cpu_ram_efficient_loading") and e.trainer.beta:
        remedy = (
            "leaves TRL's reference policy, which trainer.beta asks for, without its weights on all processes but one"
        )
        raise ConfigError("launch.trainer.fsdp_config.cpu_ram_efficient_loading", True, remedy)
    if t.get("gradient_checkpointing"):
        remedy = "of a policy in pieces, it is launch.trainer.fsdp_config.activation_checkpointing"
        raise ConfigError("launch.trainer.gradient_checkpointing", True, remedy)
    if launch.sampler == "engine" and not t.get("use_vllm"):
        remedy = "of a policy in pieces, HF generate would wait for other processes for ever: choose local, or vLLM"
        raise ConfigError("launch.sampler", "engine", remedy)


def _rows_per_update(e: Experiment) -> int:
    """Rows per update; with `mini_batch: all`, the trajectories of a step."""
    t = e.trainer
    return t.tasks_per_step * t.group_size if t.mini_batch == "all" else t.mini_batch


RULES: Final[tuple[Callable[[Experiment], None], ...]] = (
    *(
        _check_name,
        _check_tracking,
        _check_model,
        _check_modulation,
        _check_budgets,
        _check_prompts,
        _check_world,
        _check_sizes,
        _check_resampling,
        _check_loss,
        _check_sampling,
        _check_evaluation,
        _check_launch,
        _check_servers,
        _check_fsdp,
    ),
)


def check_machine(experiment: Experiment) -> None:
    """Refuse what another machine, or another number of processes, would have to run."""
    launch, here = experiment.launch, int(os.environ.get("WORLD_SIZE", "1"))
    wanted = launch.nodes * max(1, launch.gpus_per_node)
    if here != wanted:
        asked = f"{launch.nodes} nodes x {launch.gpus_per_node} GPUs"
        remedy = f"is a run of {wanted} processes, and here are {here}: choose launch=gpu1 or launch=local, submit it"
        raise MissingResource("launch", asked, f"{remedy} (launch.where=slurm), or start them with torchrun")
    vllm = "vLLM is not installed: pip install 'vllm>=0.22,<=0.31.0' (Linux, CUDA), or"
    if launch.trainer.get("use_vllm") and find_spec("vllm") is None:
        raise MissingResource("launch.trainer.use_vllm", True, f"{vllm} false")
    if launch.server_weights == "nccl" and find_spec("vllm") is None:
        raise MissingResource("launch.server_weights", "nccl", f"{vllm} files")
