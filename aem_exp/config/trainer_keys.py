"""Decides which GRPOConfig keywords an experiment may set, and in which block.

`trainer` has the keywords that decide results; they are hashed. `launch.trainer` has those of execution. TRL's batch sizes are
derived from the fields of `StepSettings`. They and those of `TokenSettings` are our own keys. A key that is left out has
its neutral value, independent of TRL's default.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from aem_exp.config.library_keywords import grpo_keywords
from aem_exp.config.schema import neutral_values
from aem_exp.config.trainer_schema import LaunchTrainer, StepSettings, TokenSettings, Trainer
from aem_exp.core.errors import ConfigError, closest_match, unknown_key_error
from aem_exp.core.typed import convert, describe_type, type_hints

OWN_KEYS: Final = type_hints(StepSettings) | type_hints(TokenSettings)
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
    "reward_weights": "the rewards of the environment",
    "multi_objective_aggregation": "the rewards of the environment",
    "model_init_kwargs": "model.dtype and model.attention",
    "trust_remote_code": "model.trust_remote_code",
    "fp16": "trainer.bf16",
    "seed": "seed",
    "data_seed": "seed",
    "output_dir": "outputs",
    "run_name": "name",
    "report_to": "tracking",
    "resume_from_checkpoint": "the same command again, which resumes the run",
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
)  # means over rows in TRL; the others are means over tokens
LOSS_SPECIFIC_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "sapo": ("sapo_temperature_neg", "sapo_temperature_pos"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    "dr_grpo": ("loss_constant",),
}


def resolve_trainer(block: Mapping[str, Any]) -> Trainer:
    """Check the `trainer` block and convert it to types. A null counts as not set."""
    table = OWN_KEYS | GRPO_KEYS
    given = _convert_block("trainer", block, table)
    loss, defaults = given.get("loss_type"), neutral_values(Trainer)
    for key in table:
        needed = key in GRPO_KEYS and key in LOSS_SPECIFIC_KEYS.get(str(loss), ())
        if key not in given and (needed or key not in defaults):
            raise ConfigError(
                f"trainer.{key}", None, f"must be {describe_type(table[key])}, but no file or override sets it"
            )
    for other, keys in LOSS_SPECIFIC_KEYS.items():
        for key in keys:
            if other != loss and key in given:
                raise ConfigError(
                    f"trainer.{key}",
                    given[key],
                    f"has no effect without trainer.loss_type={other}; it is {loss}",
                )
    return Trainer(**given)


def resolve_launch_trainer(block: Mapping[str, Any]) -> dict[str, Any]:
    """Check the `launch.trainer` block and convert it to types. A null keeps TRL's default."""
    typed = _convert_block("launch.trainer", block, LAUNCH_KEYS)
    if options := typed.get("fsdp_config"):
        typed["fsdp_config"] = {key: value for key, value in options.items() if value is not None}
    return typed


def _convert_block(block_key: str, block: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in block.items():
        if key not in table:
            raise _refused_key_error(block_key, key, value, table)
    typed = {key: convert(table[key], value, f"{block_key}.{key}") for key, value in block.items() if value is not None}
    return {key: typed[key] for key in table if key in typed}


def _refused_key_error(block_key: str, key: str, value: Any, table: Iterable[str]) -> ConfigError:
    """The error for a keyword that is not allowed in this block; it names the right key."""
    field = f"{block_key}.{key}"
    for block, keys in (("trainer", OWN_KEYS | GRPO_KEYS), ("launch.trainer", LAUNCH_KEYS)):
        if key in keys:
            return ConfigError(field, value, f"is not a key of this block; set {block}.{key}")
    if key in REPLACEMENTS:
        return ConfigError(
            field, value, f"this GRPOConfig keyword is derived from other settings; use {REPLACEMENTS[key]}"
        )
    if key in grpo_keywords():
        return ConfigError(field, value, "this GRPOConfig keyword has no effect on this trainer")
    all_keys = [*OWN_KEYS, *GRPO_KEYS, *LAUNCH_KEYS]
    return unknown_key_error(field, value, table if closest_match(key, table) else all_keys)
