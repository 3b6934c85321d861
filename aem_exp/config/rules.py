"""Refuses settings of an experiment that contradict each other or have no effect."""

import re
from collections.abc import Callable
from math import prod
from typing import Final

from aem_exp.config.launch_rules import check_fsdp, check_launch, check_servers
from aem_exp.config.model_path import GGUF, wheel_file
from aem_exp.config.prompts import check_prompts
from aem_exp.config.schema import Experiment, Modulation, final_steps
from aem_exp.config.trainer_keys import ROW_MEAN_LOSSES
from aem_exp.core.errors import ConfigError, format_value, redact

NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}")
OPTIMIZER_KEYS: Final = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16")
MATCHED_OPTIMIZERS: Final = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")  # of modulation.match
MAX_EPISODES: Final = 1_000_000  # of a step; more is probably a typo
TOKEN_MEAN_LOSSES: Final = ("dapo", "bnpo", "cispo")  # masks change the denominator of other losses in other ways
UNFILTERED_SAMPLING: Final = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def check(e: Experiment) -> None:
    """Apply all rules.

    Raises:
        ConfigError: the first contradiction, with its field, its value and the other setting.
    """
    for rule in RULES:
        rule(e)


def check_against_parent(e: Experiment, parent: Experiment) -> None:
    """Refuse changes that a run from a parent's checkpoint cannot make, because weights and optimizer state are given."""
    kept = {f"trainer.{key}": (getattr(parent.trainer, key), getattr(e.trainer, key)) for key in OPTIMIZER_KEYS}
    kept |= {f"model.{key}": (value, getattr(e.model, key)) for key, value in vars(parent.model).items()}
    kept |= {f"warm_start.{key}": (value, getattr(e.warm_start, key)) for key, value in vars(parent.warm_start).items()}
    for field, (old, new) in kept.items():
        if old != new:
            raise ConfigError(
                field,
                new,
                f"must stay {format_value(old)}, because the run starts from the checkpoint of {e.parent_dir}",
            )
    if e.trainer.steps <= e.parent_steps:
        remedy = f"must be above {e.parent_steps}, because the steps of the parent {e.parent_dir} count"
        raise ConfigError("trainer.steps", e.trainer.steps, remedy)


def _check_name(e: Experiment) -> None:
    if not NAME_PATTERN.fullmatch(e.name):
        raise ConfigError(
            "name", e.name, "must be a file name: letters, digits, and . _ + = - (at most 100 characters)"
        )


def _check_tracking(e: Experiment) -> None:
    if not e.tracking:
        return
    if (safe := redact(e.tracking)) != e.tracking:
        remedy = "must not contain credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or"
        remedy += " MLFLOW_TRACKING_TOKEN, or the whole URI in MLFLOW_TRACKING_URI"
        raise ConfigError("tracking", safe, remedy)


def _check_model(e: Experiment) -> None:
    model = e.model
    if (model.path is None) == (model.make is None):
        given = "neither is set" if model.path is None else "both are set (model.make=null removes the second)"
        choices = "set either model.path (load weights: a folder or a hub id) or model.make (make a model)"
        raise ConfigError("model.path", model.path, f"{choices}; {given}")
    if model.path is None and model.revision is not None:
        raise ConfigError("model.revision", model.revision, "has no effect without model.path")
    if wheel_file(model) is None and (model.path or "").lower().endswith(GGUF):
        problem = "is a GGUF file, which is quantised and cannot be trained"
        remedy = "set the folder or hub id of the original weights (*.safetensors), or choose model=smollm2_135m_q4"
        raise ConfigError("model.path", model.path, f"{problem}; {remedy}")
    if model.trust_remote_code and not model.code_sha256:
        remedy = "needs model.code_sha256, the hash of the remote code that you have reviewed"
        raise ConfigError("model.trust_remote_code", True, remedy)
    if model.code_sha256 and not model.trust_remote_code:
        raise ConfigError("model.code_sha256", model.code_sha256, "has no effect without model.trust_remote_code=true")
    for key, lora in (("model", model.lora), ("warm_start", e.warm_start.lora)):
        if lora and lora.get("r", 1) < 1:
            raise ConfigError(f"{key}.lora.r", lora["r"], "must be a whole number of at least 1")


def _check_warm_start(e: Experiment) -> None:
    w, neutral = e.warm_start, type(e.warm_start)()
    changed = [key for key, value in vars(w).items() if key != "name" and value != getattr(neutral, key)]
    if w.method is None:
        for key in changed:
            remedy = "has no effect without warm_start.method; choose warm_start=imitate or warm_start=own_successes"
            raise ConfigError(f"warm_start.{key}", getattr(w, key), remedy)
        return
    if not w.episodes:
        raise ConfigError("warm_start.episodes", 0, "must be at least 1")
    for key, method in (("noise", "imitate"), ("temperature", "own_successes")):
        if key in changed and w.method != method:
            raise ConfigError(f"warm_start.{key}", getattr(w, key), f"has no effect without warm_start.method={method}")
    if e.model.trust_remote_code:
        raise ConfigError("warm_start.method", w.method, "cannot train a model with model.trust_remote_code=true")


def _check_modulation(e: Experiment) -> None:
    m, neutral = e.modulation, type(e.modulation)()
    for key, value in vars(m).items():
        if m.lam is None and key not in ("name", "lam") and value != getattr(neutral, key):
            raise ConfigError(
                f"modulation.{key}",
                value,
                "has no effect without modulation.lam; to switch modulation off, use modulation=none",
            )
    if m.bonus_lam != neutral.bonus_lam and not m.bonus:
        raise ConfigError("modulation.bonus_lam", m.bonus_lam, "has no effect without modulation.bonus above 0")
    if m.keep != neutral.keep and (m.bonus or m.centred):
        field = "bonus" if m.bonus else "centred"
        remedy = f"needs modulation.keep=all; with it, responses that modulation.keep={m.keep} leaves out would be trained on"
        raise ConfigError(f"modulation.{field}", getattr(m, field), remedy)
    if m.bonus and m.unit == "token":
        raise ConfigError(
            "modulation.bonus", m.bonus, "needs modulation.unit=response, because it rewards the next response"
        )
    _check_signal(m)
    _check_controls(e)


def _check_signal(m: Modulation) -> None:
    if m.signal not in ("entropy", "surprisal"):
        if m.gate:
            remedy = f"must be 0 with modulation.signal={m.signal}, which is not in nats"
            raise ConfigError("modulation.gate", m.gate, remedy)
        if m.unit == "token":
            raise ConfigError("modulation.signal", m.signal, "needs modulation.unit=response")
    if m.entropy != "mean" and (m.signal, m.unit) != ("entropy", "response"):
        raise ConfigError(
            "modulation.entropy", m.entropy, "needs modulation.signal=entropy and modulation.unit=response"
        )
    if m.gate_complement and not m.gate:
        raise ConfigError("modulation.gate_complement", True, "has no effect without modulation.gate above 0")


def _check_controls(e: Experiment) -> None:
    m = e.modulation
    if m.within != "scope" and not m.shuffle:
        raise ConfigError("modulation.within", m.within, "has no effect without modulation.shuffle=true")
    if m.average != "none" and m.shuffle:
        raise ConfigError("modulation.average", m.average, "cannot be combined with modulation.shuffle=true")
    for key, value in (("keep_by", m.keep_by), ("keep_random", m.keep_random)):
        if m.keep == "all" and value not in ("zero", False):
            raise ConfigError(f"modulation.{key}", value, "has no effect without modulation.keep=raising or lowering")
    losses = {"mask": TOKEN_MEAN_LOSSES, "mask_scaled": (*TOKEN_MEAN_LOSSES, "dr_grpo")}.get(m.keep_by)
    if losses and e.trainer.loss_type not in losses:
        raise ConfigError("modulation.keep_by", m.keep_by, f"needs trainer.loss_type={' or '.join(losses)}")


def _check_match(e: Experiment) -> None:
    match, t = e.modulation.match, e.trainer
    if match is None:
        return
    if e.launch.trainer.get("fsdp"):
        raise ConfigError(
            "modulation.match", match, "needs weights that are not sharded; set launch.trainer.fsdp=false"
        )
    if match == "gradient_norm":
        return
    if t.optim not in MATCHED_OPTIMIZERS:
        remedy = f"needs an optimizer whose steps can be undone: trainer.optim={' or '.join(MATCHED_OPTIMIZERS)}"
        raise ConfigError("modulation.match", match, remedy)
    if e.model.dtype == "bfloat16" and not e.model.lora:
        remedy = (
            "needs float32 weights, because bfloat16 rounds the scaled update; set model.dtype=float32 or model.lora"
        )
        raise ConfigError("modulation.match", match, remedy)


def _check_budgets(e: Experiment) -> None:
    env = e.env
    if env.response_tokens >= env.context_tokens:
        remedy = f"must be below env.context_tokens={env.context_tokens}, which includes the prompt"
        raise ConfigError("env.response_tokens", env.response_tokens, remedy)
    if env.history == "full" and env.window:
        raise ConfigError("env.window", env.window, "has no effect without env.history=window")


def _check_world(e: Experiment) -> None:
    reward = e.env.make.get("reward", 1.0)
    if str(e.env.make.get("_target_", "")).startswith("aem_exp.envs.") and not (
        isinstance(reward, int | float) and reward > 0
    ):
        raise ConfigError("env.make.reward", reward, "must be above 0, because it is the reward of a success")


def _check_sizes(e: Experiment) -> None:
    t, world = e.trainer, e.launch.nodes * max(1, e.launch.gpus_per_node)
    sizes: dict[str, int] = {key: getattr(t, key) for key in ("group_size", "tasks_per_step", "oversample")}
    if (played := prod(sizes.values())) > MAX_EPISODES:
        key = max(sizes, key=sizes.__getitem__)
        remedy = f"makes {played:,} episodes per step; the limit is {MAX_EPISODES:,}"
        raise ConfigError(f"trainer.{key}", sizes[key], remedy)
    episodes = t.tasks_per_step * t.group_size
    batch = f"trainer.tasks_per_step={t.tasks_per_step} x trainer.group_size={t.group_size} = {episodes}"
    if e.env.history == "full" and rows_per_update(e) > episodes:
        raise ConfigError("trainer.mini_batch", t.mini_batch, f"must be at most the number of rows of a step: {batch}")
    if episodes % world:
        raise ConfigError("launch", f"{world} processes", f"must divide the number of trajectories of a step: {batch}")


def _check_resampling(e: Experiment) -> None:
    for key, count in (("rounds", e.trainer.rounds), ("oversample", e.trainer.oversample)):
        if count > 1 and not e.trainer.drop_equal:
            raise ConfigError(f"trainer.{key}", count, "has no effect without trainer.drop_equal=true")
    if e.trainer.keep_variance is not None and e.trainer.drop_equal:
        remedy = "drops groups with equal returns too; set trainer.drop_equal=false, trainer.rounds=1 and trainer.oversample=1"
        raise ConfigError("trainer.keep_variance", e.trainer.keep_variance, remedy)


def _check_loss(e: Experiment) -> None:
    t = e.trainer
    averaged = e.env.history == "full" or e.modulation.unit == "token"
    if t.importance_sampling_level == "sequence" and averaged and e.modulation.lam is not None:
        remedy = "a sequence ratio averages the advantages of a row, which cancels the modulation; "
        remedy += "set env.history=window and env.window=N"
        remedy += " and modulation.unit=response" if e.modulation.unit == "token" else ""
        raise ConfigError("trainer.importance_sampling_level", "sequence", f"{remedy} or modulation=none")
    if t.count_masked and not t.mask_truncated_completions:
        raise ConfigError("trainer.count_masked", True, "has no effect without trainer.mask_truncated_completions=true")
    if t.count_masked and t.loss_type not in ROW_MEAN_LOSSES:
        remedy = f"has no effect without trainer.loss_type={' or '.join(ROW_MEAN_LOSSES)}, which are means over rows"
        raise ConfigError("trainer.count_masked", True, remedy)
    for loss, level in (("luspo", "sequence"), ("vespo", "token")):
        if t.loss_type == loss and t.importance_sampling_level != level:
            raise ConfigError("trainer.loss_type", loss, f"needs trainer.importance_sampling_level={level}")


def _check_tokens(e: Experiment) -> None:
    t = e.trainer
    for ratio, keys in (("clip_cov_ratio", ("clip_cov_min", "clip_cov_max")), ("kl_cov_ratio", ("kl_cov_coef",))):
        for key in keys:
            value, needed = getattr(t, key), getattr(t, ratio) is not None
            if needed != (value is not None):
                remedy = f"must be set with trainer.{ratio}" if needed else f"has no effect without trainer.{ratio}"
                raise ConfigError(f"trainer.{key}", value, remedy)
    if t.clip_cov_min is not None and t.clip_cov_max is not None and t.clip_cov_min >= t.clip_cov_max:
        raise ConfigError(
            "trainer.clip_cov_min", t.clip_cov_min, f"must be below trainer.clip_cov_max={t.clip_cov_max:g}"
        )
    for key, off in (("clip_cov_ratio", None), ("kl_cov_ratio", None), ("top_entropy_quantile", 1.0)):
        value = getattr(t, key)
        if value != off and t.importance_sampling_level == "sequence":
            remedy = "needs trainer.importance_sampling_level=token, because a sequence ratio averages over the tokens of a row"
            raise ConfigError(f"trainer.{key}", value, remedy)
        if value != off and key != "clip_cov_ratio" and t.loss_type in ROW_MEAN_LOSSES:
            remedy = f"needs a loss that is a mean over tokens, such as trainer.loss_type=dapo, not {t.loss_type}"
            raise ConfigError(f"trainer.{key}", value, remedy)


def _check_sampling(e: Experiment) -> None:
    t = e.trainer
    for key, off in UNFILTERED_SAMPLING.items():
        value = getattr(t, key)
        if value not in (None, off) and e.modulation.lam is not None:
            raise ConfigError(
                f"trainer.{key}",
                value,
                f"must be {off:g}, because modulation needs the unfiltered distribution; or set modulation=none",
            )
    if t.repetition_penalty != 1 and not e.launch.trainer.get("use_vllm"):
        raise ConfigError(
            "trainer.repetition_penalty", t.repetition_penalty, "has no effect without launch.trainer.use_vllm=true"
        )


def _check_evaluation(e: Experiment) -> None:
    panels = {"evaluation.panel": e.evaluation.panel, "evaluation.final": e.evaluation.final}
    for field, panel in panels.items():
        if not NAME_PATTERN.fullmatch(panel) or panel == "train":
            raise ConfigError(field, panel, "must be a panel of held-out tasks, such as dev or test")
    if e.evaluation.panel == e.evaluation.final:
        raise ConfigError(
            "evaluation.final",
            e.evaluation.final,
            "must differ from evaluation.panel, because it is played only at the end",
        )
    if e.evaluation.average == 1 and e.evaluation.average_every > 1:
        raise ConfigError(
            "evaluation.average_every", e.evaluation.average_every, "has no effect without evaluation.average above 1"
        )
    if e.evaluation.average > 1 and (first := final_steps(e)[0]) <= e.parent_steps:
        remedy = f"would begin at step {first}; with trainer.steps={e.trainer.steps}, evaluate less often"
        raise ConfigError("evaluation.average", e.evaluation.average, remedy)


def rows_per_update(e: Experiment) -> int:
    """Rows per update; with `mini_batch: all`, the number of trajectories of a step."""
    t = e.trainer
    return t.tasks_per_step * t.group_size if t.mini_batch == "all" else t.mini_batch


RULES: Final[tuple[Callable[[Experiment], None], ...]] = (
    _check_name,
    _check_tracking,
    _check_model,
    _check_warm_start,
    _check_modulation,
    _check_match,
    _check_budgets,
    check_prompts,
    _check_world,
    _check_sizes,
    _check_resampling,
    _check_loss,
    _check_tokens,
    _check_sampling,
    _check_evaluation,
    check_launch,
    check_servers,
    check_fsdp,
)
