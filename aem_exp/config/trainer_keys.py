"""Decides which GRPOConfig keywords an experiment may set, and in which block.

`trainer` holds those that decide results and are hashed, `launch.trainer` those of execution; TRL's batch sizes are derived
from the fields of `StepSettings`. A key that is left out has its neutral value, whatever TRL's default.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from aem_exp.config.library_keywords import grpo_keywords
from aem_exp.config.schema import neutral_values
from aem_exp.config.trainer_schema import LaunchTrainer, StepSettings, Trainer
from aem_exp.core.errors import ConfigError, closest_match, unknown_key_error
from aem_exp.core.typed import convert, describe_type, type_hints

OWN_KEYS: Final = type_hints(StepSettings)
GRPO_KEYS: Final = {key: hint for key, hint in type_hints(Trainer).items() if key not in OWN_KEYS}
LAUNCH_KEYS: Final = type_hints(LaunchTrainer)
REPLACEMENTS: Final[dict[str, str]] = {
    "per_device_train_batch_size": "launch.device_rows",
    "gradient_accumulation_steps": "launch.device_rows",
    "auto_find_batch_size": "launch.device_rows",
    "generation_batch_size": "trainer.tasks_per_step and trainer.group_size",
    "steps_per_generation": "trainer.mini_batch",
    "num_generations": "trainer.group_size",
    "num_generations_eval": "evaluation.repeats",
    "max_steps": "trainer.steps",
    "num_train_epochs": "trainer.steps",
    "max_completion_length": "env.response_tokens and env.context_tokens",
    "max_tool_calling_iterations": "env.max_turns",
    "generation_kwargs": "trainer.temperature, top_p, top_k, min_p",
    "chat_template_kwargs": "model.thinking",
    "scale_rewards": "baseline.advantage",
    "reward_weights": "the rewards of the env",
    "multi_objective_aggregation": "the rewards of the env",
    "model_init_kwargs": "model.dtype and model.attention",
    "trust_remote_code": "model.trust_remote_code",
    "fp16": "trainer.bf16",
    "seed": "seed",
    "data_seed": "seed",
    "output_dir": "outputs",
    "run_name": "name",
    "report_to": "tracking",
    "resume_from_checkpoint": "the same command again: it resumes",
    **dict.fromkeys(("deepspeed", "ds3_gather_for_generation"), "launch.trainer.fsdp"),
    **dict.fromkeys(
        ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_group_port"), "launch.servers"
    ),
    "vllm_server_timeout": "launch.server_seconds",
    "vllm_importance_sampling_cap": "launch.trainer.vllm_importance_sampling_clip_max",
    **dict.fromkeys(("save_strategy", "save_steps"), "launch.save_every"),
    **dict.fromkeys(("eval_strategy", "eval_steps", "eval_on_start", "do_eval"), "evaluation.every"),
}
ROW_MEAN_LOSSES: Final = (
    "grpo",
    "sapo",
    "luspo",
    "dr_grpo",
)  # losses that TRL averages over rows; the others, over tokens
LOSS_SPECIFIC_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "sapo": ("sapo_temperature_neg", "sapo_temperature_pos"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    "dr_grpo": ("loss_constant",),
}


def resolve_trainer(block: Mapping[str, Any]) -> Trainer:
    """The `trainer` block: checked, typed, complete. What is null is not set."""
    table = OWN_KEYS | GRPO_KEYS
    given = _convert_block("trainer", block, table)
    loss, defaults = given.get("loss_type"), neutral_values(Trainer)
    for key in table:
        needed = key in GRPO_KEYS and key in LOSS_SPECIFIC_KEYS.get(str(loss), ())
        if key not in given and (needed or key not in defaults):
            raise ConfigError(f"trainer.{key}", None, f"must be {describe_type(table[key])}; nothing sets it")
    for other, keys in LOSS_SPECIFIC_KEYS.items():
        for key in keys:
            if other != loss and key in given:
                raise ConfigError(
                    f"trainer.{key}", given[key], f"only read with trainer.loss_type={other}, here {loss}"
                )
    return Trainer(**given)


def resolve_launch_trainer(block: Mapping[str, Any]) -> dict[str, Any]:
    """The `launch.trainer` block: checked and typed. What is null keeps TRL's default."""
    typed = _convert_block("launch.trainer", block, LAUNCH_KEYS)
    if how := typed.get("fsdp_config"):
        typed["fsdp_config"] = {key: value for key, value in how.items() if value is not None}
    return typed


def _convert_block(at: str, block: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in block.items():
        if key not in table:
            raise _refused_key_error(at, key, value, table)
    typed = {key: convert(table[key], value, f"{at}.{key}") for key, value in block.items() if value is not None}
    return {key: typed[key] for key in table if key in typed}


def _refused_key_error(at: str, key: str, value: Any, table: Iterable[str]) -> ConfigError:
    """Why a keyword cannot stand here, and what can."""
    field = f"{at}.{key}"
    for home, keys in (("trainer", OWN_KEYS | GRPO_KEYS), ("launch.trainer", LAUNCH_KEYS)):
        if key in keys:
            return ConfigError(field, value, f"belongs to {home}.{key}")
    if key in REPLACEMENTS:
        return ConfigError(field, value, f"this GRPOConfig keyword is derived here; use {REPLACEMENTS[key]}")
    if key in grpo_keywords():
        return ConfigError(
            field, value, "this GRPOConfig keyword has no part in what this trainer does, so it would be ignored"
        )
    everywhere = [*OWN_KEYS, *GRPO_KEYS, *LAUNCH_KEYS]
    return unknown_key_error(field, value, table if closest_match(key, table) else everywhere)
