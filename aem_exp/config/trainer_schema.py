"""The types of the `trainer` block (how a policy is optimised) and of the `launch.trainer` block (how TRL executes that).

Every field of `trainer` is part of a run's signature; no key of `launch.trainer` is.
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
    """What TRL's batch arithmetic hides: how much is played in a step, and what of it is trained on."""

    steps: NonNegativeInt
    """Steps of the run; a step is one rollout batch."""
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
    """The highest learning rate that `lr_scheduler_type` reaches."""
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
    """Weight decay of the optimizer."""
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
    """Sampling temperature while training."""
    top_p: Annotated[float, FRACTION] = 1.0
    """Sampling keeps the most probable tokens that sum to this."""
    top_k: NonNegativeInt = 0
    """Sampling keeps this many of the most probable tokens; 0: all."""
    min_p: Annotated[float, BELOW_1] | None = None
    """Sampling keeps tokens of at least this share of the highest probability; null: all."""
    repetition_penalty: PositiveFloat = 1.0
    """Penalty of tokens that have occurred; above 1 makes them less probable (vLLM)."""
    sapo_temperature_neg: PositiveFloat | None = None
    """Temperature of SAPO's soft gate, for negative advantages."""
    sapo_temperature_pos: PositiveFloat | None = None
    """Temperature of SAPO's soft gate, for positive advantages."""
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


class FSDPKeywords(TypedDict, total=False):
    """The keys that `launch.trainer.fsdp_config` takes; transformers would ignore any other."""

    version: int | None
    """Version of PyTorch's FSDP; must be 2."""
    reshard_after_forward: bool | None
    """Free the gathered weights of a layer after its forward pass, and gather them again for the backward pass."""
    cpu_offload: bool | None
    """Keep weights, gradients and optimizer state in the memory of the node."""
    cpu_ram_efficient_loading: bool | None
    """Only one process of a node reads the weights."""
    activation_checkpointing: bool | None
    """Recompute activations in the backward pass instead of storing them."""
    state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] | None
    """Whether a checkpoint holds whole tensors, or the shards of each process."""
    auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] | None
    """How the model is split into units that are sharded and gathered together."""
    transformer_layer_cls_to_wrap: list[str] | None
    """Class names of the layers that are such units (`TRANSFORMER_BASED_WRAP`)."""
    min_num_params: int | None
    """The smallest number of parameters of such a unit (`SIZE_BASED_WRAP`)."""


class LaunchTrainer(TypedDict, total=False):
    """GRPOConfig's keywords of execution. What is not set keeps TRL's default."""

    use_cpu: bool | None
    """Train on the CPU, also where there is a GPU."""
    tf32: bool | None
    """Compute float32 matrix products in TF32 on the GPU."""
    gradient_checkpointing: bool | None
    """Recompute activations in the backward pass instead of storing them."""
    gradient_checkpointing_kwargs: dict[str, Any] | None
    """Further keywords of gradient checkpointing."""
    fsdp: bool | None
    """Shard weights, gradients and optimizer state over the processes (FSDP)."""
    fsdp_config: FSDPKeywords | None
    """Settings of FSDP."""
    torch_compile: bool | None
    """Compile the model with `torch.compile`."""
    torch_compile_backend: str | None
    """Backend of `torch.compile`."""
    torch_compile_mode: str | None
    """Mode of `torch.compile`."""
    torch_empty_cache_steps: PositiveInt | None
    """Optimizer steps between two calls of `torch.cuda.empty_cache`."""
    full_determinism: bool | None
    """Use deterministic kernels only; slower."""
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
    """Time limit of a collective operation, in seconds."""
    use_vllm: bool | None
    """Generate with vLLM (`launch.sampler: engine`)."""
    vllm_mode: Literal["colocate", "server"] | None
    """Where TRL's vLLM runs: in the trainer's process, or in a server."""
    vllm_model_impl: Literal["vllm", "transformers"] | None
    """Which implementation of the model vLLM uses."""
    vllm_enable_sleep_mode: bool | None
    """vLLM frees the memory of the GPU while the policy is updated."""
    vllm_gpu_memory_utilization: Annotated[float, FRACTION] | None
    """Share of the GPU's memory that vLLM takes."""
    vllm_max_model_length: PositiveInt | None
    """The longest context of vLLM, in tokens."""
    vllm_tensor_parallel_size: PositiveInt | None
    """GPUs that share one copy of the weights in vLLM."""
    vllm_importance_sampling_correction: bool | None
    """Correct for the difference between the log-probs of vLLM and those of the trainer."""
    vllm_importance_sampling_mode: Literal["token_truncate"] | None  # a sum over an agent's tokens masks whole episodes
    """How the correction treats ratios out of bounds: `token_truncate` clips the ratio of each token."""
    vllm_importance_sampling_clip_max: PositiveFloat | None
    """Upper bound of these ratios."""
    vllm_importance_sampling_clip_min: PositiveFloat | None
    """Lower bound of these ratios."""
