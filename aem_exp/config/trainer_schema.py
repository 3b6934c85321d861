"""The type of the `trainer` block: how a policy is optimised. Every field is part of a run's signature."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from aem_exp.core.typed import (
    AT_LEAST_2,
    BELOW_1,
    FRACTION,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
SchedulerType = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt", "cosine_with_min_lr"
]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor", "sgd"]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What TRL's batch arithmetic hides: how much is played in a step, and what of it is trained on."""

    steps: NonNegativeInt
    """Rollout batches."""
    tasks_per_step: PositiveInt
    """Groups that a step trains on."""
    group_size: Annotated[int, AT_LEAST_2]
    """Trajectories per drawn task."""
    mini_batch: Literal["all"] | PositiveInt = "all"
    """Rows per update."""
    oversample: PositiveInt = 1
    """Tasks drawn per round, as a multiple of `tasks_per_step`."""
    rounds: PositiveInt = 1
    """Rounds of play until `tasks_per_step` groups have unequal returns (DAPO's dynamic sampling)."""
    drop_equal: bool = False
    """Groups of equal returns leave the step."""
    count_masked: bool = False
    """Masked trajectories count among the rows that a loss is the mean of."""
    loss_constant: PositiveInt | None = None
    """What `dr_grpo` divides a trajectory's token sum by; null: its token budget; 1: a sum."""


@dataclass(frozen=True, kw_only=True)
class Trainer(StepSettings):
    """GRPOConfig's keywords that decide results. What has no default must be set; what is None is left to TRL."""

    learning_rate: PositiveFloat
    """The highest that `lr_scheduler_type` reaches."""
    lr_scheduler_type: SchedulerType
    """How the learning rate follows the progress of the run."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Further keywords of that schedule."""
    warmup_steps: NonNegativeFloat = 0.0
    """Steps of warm-up; below 1: that fraction of all steps."""
    optim: Optimizer
    """The optimizer, by transformers' name."""
    optim_args: str | None = None
    """Further keywords of the optimizer, as `key=value,key=value`."""
    weight_decay: NonNegativeFloat = 0.0
    """Of the optimizer."""
    adam_beta1: Annotated[float, BELOW_1]
    """Decay of the first moment."""
    adam_beta2: Annotated[float, BELOW_1]
    """Decay of the second moment."""
    adam_epsilon: PositiveFloat
    """Added to the root of the second moment."""
    max_grad_norm: NonNegativeFloat
    """Gradients of a larger norm are scaled down to it."""
    bf16: bool = False
    """Forward and backward passes run under bfloat16 autocast."""
    cast_lm_head_to_fp32: bool = False
    """The language modelling head computes in float32."""
    loss_type: LossType
    """How token losses become one loss."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratios of each token, or of a whole row (GSPO)."""
    epsilon: PositiveFloat
    """The ratio is clipped below 1 - epsilon."""
    epsilon_high: PositiveFloat | None = None
    """The ratio is clipped above 1 + epsilon_high; null: `epsilon`."""
    delta: PositiveFloat | None = None
    """Upper clip of the ratio where the advantage is negative (two-sided clipping); null: none."""
    mask_truncated_completions: bool = False
    """Episodes cut by turns or context leave the loss, and count as 0 in their group."""
    beta: NonNegativeFloat = 0.0
    """Coefficient of the KL divergence from the reference policy; 0: no reference policy is loaded."""
    use_bias_correction_kl: bool = False
    """The KL term is multiplied by the ratio, which makes its gradient unbiased (DeepSeek-V3.2)."""
    entropy_coef: NonNegativeFloat = 0.0
    """Coefficient of an entropy bonus in the loss."""
    top_entropy_quantile: Annotated[float, FRACTION] = 1.0
    """Share of tokens, those of the highest entropy, that the policy loss keeps."""
    off_policy_mask_threshold: PositiveFloat | None = None
    """Rows of negative advantage and a larger KL divergence from the sampler leave the loss; null: none."""
    num_iterations: PositiveInt = 1
    """Passes over the rows of a step."""
    temperature: PositiveFloat = 1.0
    """Of sampling while training."""
    top_p: Annotated[float, FRACTION] = 1.0
    """Sampling keeps the most probable tokens that sum to this."""
    top_k: NonNegativeInt = 0
    """Sampling keeps this many of the most probable tokens; 0: all."""
    min_p: Annotated[float, BELOW_1] | None = None
    """Sampling keeps tokens of at least this share of the highest probability; null: all."""
    repetition_penalty: PositiveFloat = 1.0
    """Of tokens that have occurred; above 1 makes them less probable (vLLM)."""
    sapo_temperature_neg: PositiveFloat | None = None
    """Of SAPO's soft gate, for negative advantages."""
    sapo_temperature_pos: PositiveFloat | None = None
    """Of SAPO's soft gate, for positive advantages."""
    vespo_k_pos: PositiveFloat | None = None
    """VESPO's exponent of small ratios, for positive advantages."""
    vespo_lambda_pos: PositiveFloat | None = None
    """VESPO's decay of large ratios, for positive advantages."""
    vespo_k_neg: PositiveFloat | None = None
    """VESPO's exponent of small ratios, for negative advantages."""
    vespo_lambda_neg: PositiveFloat | None = None
    """VESPO's decay of large ratios, for negative advantages."""


def trainer_keywords(trainer: Trainer) -> dict[str, Any]:
    """The keywords that are set."""
    return {key: value for key, value in asdict(trainer).items() if value is not None}
