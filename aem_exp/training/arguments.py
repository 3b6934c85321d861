"""From an experiment to TRL's `GRPOConfig`."""

from pathlib import Path

from trl import GRPOConfig

from aem_exp.config.schema import Experiment
from aem_exp.config.trainer_keys import OWN_KEYS
from aem_exp.config.trainer_schema import trainer_keywords


def build_grpo_config(experiment: Experiment, folder: Path) -> GRPOConfig:
    """TRL's own arguments. Sizes that only its batch arithmetic needs are derived; what is not named is TRL's default.

    One item of our data loader is one update, so TRL sees no accumulation and one generation per update.
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
            "max_steps": 10**9,  # updates; the callback stops after the last step
            "max_completion_length": constant,  # TRL reads it in Dr. GRPO's loss alone, as we generate ourselves
            "ignore_data_skip": True,
            "remove_unused_columns": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "save_total_limit": 2,
            "logging_nan_inf_filter": False,
            "report_to": [],
            "disable_tqdm": True,
            "vllm_importance_sampling_mode": "token_truncate",  # as we correct: TRL's own masks whole rows by a sum
            **{key: value for key, value in settings.items() if key not in (*OWN_KEYS, "num_iterations")},
            **experiment.launch.trainer,
        }
    )


def max_episode_tokens(experiment: Experiment) -> int:
    """The most tokens that an episode can be trained on: Dr. GRPO's constant, where none is given."""
    env = experiment.env
    most = env.max_turns * env.response_tokens
    return most if env.history == "window" else min(most, env.context_tokens)
