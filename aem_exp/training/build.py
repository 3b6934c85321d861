"""Creates the trainer of an experiment: passes each setting of the config to the part that uses it."""

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from aem_exp.config import Experiment, Modulation, instantiate
from aem_exp.config.trainer_schema import TokenSettings
from aem_exp.training.arguments import build_grpo_config
from aem_exp.training.callback import AEMCallback
from aem_exp.training.credit import CreditRules
from aem_exp.training.dynamic_sampling import DynamicSampling
from aem_exp.training.modulation import ModulationVariant
from aem_exp.training.token_selection import TokenRules
from aem_exp.training.trainer import NO_HOOKS, AEMTrainer, RolloutSource, TrainerHooks
from aem_exp.training.updates import UpdateSettings
from aem_exp.training.vllm_engine import engine_options

AnyTrainer = TypeVar("AnyTrainer", bound=AEMTrainer)


def build_variant(modulation: Modulation) -> ModulationVariant:
    """The variant that the modulation of an experiment describes."""
    return ModulationVariant(**{f.name: getattr(modulation, f.name) for f in fields(ModulationVariant)})


def build_trainer(
    experiment: Experiment,
    folder: Path,
    model: Any,
    tokenizer: Any,
    callback: AEMCallback,
    source: RolloutSource,
    hooks: TrainerHooks = NO_HOOKS,
    kind: type[AnyTrainer] = AEMTrainer,
) -> AnyTrainer:
    """Create the trainer of an experiment, of the class `kind`; `folder` receives its checkpoints."""
    settings, launch = experiment.trainer, experiment.launch
    with engine_options(experiment, model.name_or_path):
        return kind(
            model,
            build_grpo_config(experiment, folder),
            tokenizer,
            callback=callback,
            source=source,
            dynamic_sampling=DynamicSampling(
                groups=settings.tasks_per_step,
                drop_equal=settings.drop_equal,
                rounds=settings.rounds,
                keep_variance=settings.keep_variance,
            ),
            credit_rules=CreditRules(
                estimator=instantiate(experiment.baseline.advantage, partial=True),
                penalty=experiment.env.invalid_penalty,
                mask_truncated=settings.mask_truncated_completions,
            ),
            update_settings=UpdateSettings(
                mini_batch=0 if settings.mini_batch == "all" else settings.mini_batch,
                epochs=settings.num_iterations,
                device_rows=launch.device_rows,
                device_tokens=launch.device_tokens,
                count_masked=settings.count_masked,
            ),
            variant=build_variant(experiment.modulation),
            token_rules=TokenRules(
                top_entropy=settings.top_entropy_quantile,
                **{f.name: getattr(settings, f.name) for f in fields(TokenSettings)},
            ),
            trust_sampler=launch.sampler == "local" and experiment.model.dtype == "float32" and not settings.bf16,
            hooks=hooks,
        )
