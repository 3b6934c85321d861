"""Creates TRL's `GRPOConfig` from an experiment."""

from pathlib import Path

from trl import GRPOConfig

from aem_exp.config.schema import Experiment, max_context
from aem_exp.config.trainer_keys import OWN_KEYS
from aem_exp.config.trainer_schema import trainer_keywords

# Keywords of GRPOConfig that our trainer implements instead of TRL.
REPLACED_KEYWORDS = ("num_iterations", "top_entropy_quantile")


def build_grpo_config(experiment: Experiment, folder: Path) -> GRPOConfig:
    """Create TRL's arguments. Values that are not set here or in the experiment keep TRL's defaults.

    One item of our data loader is one update, so TRL sees no gradient accumulation and one generation per update. Sizes that
    only TRL's batch arithmetic needs are derived from the group size.
    """
    settings = trainer_keywords(experiment.trainer)
    group = experiment.trainer.group_size
    constant = experiment.trainer.loss_constant or max_episode_tokens(experiment)
    return GRPOConfig(
        **{
            "gradient_checkpointing": False,
            "ddp_find_unused_parameters": False,
            "output_dir": str(folder),
            "seed": experiment.seed,
            "per_device_train_batch_size": group,
            "num_generations": group,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": 1,
            "max_steps": 10**9,  # number of updates, unknown in advance; the callback stops after the last step
            "max_completion_length": constant,  # used only by the Dr. GRPO loss, because we do not generate with TRL
            "ignore_data_skip": True,
            "remove_unused_columns": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "save_total_limit": 2,
            "logging_nan_inf_filter": False,
            "report_to": [],
            "disable_tqdm": True,
            "vllm_importance_sampling_mode": "token_truncate",  # our correction is per token; TRL's default masks whole rows
            **({"vllm_max_model_length": max_context(experiment)} if experiment.launch.trainer.get("use_vllm") else {}),
            **{key: value for key, value in settings.items() if key not in (*OWN_KEYS, *REPLACED_KEYWORDS)},
            **experiment.launch.trainer,
        }
    )


def max_episode_tokens(experiment: Experiment) -> int:
    """Maximum number of trained tokens of an episode: the default of Dr. GRPO's loss constant."""
    env = experiment.env
    limit = env.max_turns * env.response_tokens
    return limit if env.history == "window" else min(limit, env.context_tokens)
