"""The types of an experiment: a frozen dataclass per config group. Defaults are neutral and never change."""

from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal

from aem_exp.core.typed import (
    AT_LEAST_2,
    BELOW_1,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
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


@dataclass(frozen=True)
class Model:
    name: str = ""
    path: str | None = None  # hub id or local folder, in Hugging Face format
    revision: str | None = None  # hub commit; resolved and pinned by `prepare`
    make: dict[str, Any] | None = None  # `_target_` of a policy that is made here instead of loaded (then path is null)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    attention: str | None = None  # attn_implementation; null: what transformers picks
    lora: dict[str, Any] | None = None  # peft.LoraConfig keywords
    system: str | None = None  # system message
    thinking: Literal["on", "off", "template"] = "template"  # template: what the chat template does by itself
    trust_remote_code: bool = False
    code_sha256: str | None = None  # required with trust_remote_code: hash of the remote code that was reviewed


@dataclass(frozen=True)
class Env:
    name: str = ""
    make: dict[str, Any] = field(default_factory=dict)  # `_target_` of a World, and its keywords
    history: Literal["full", "window"] = "full"  # full: one row per trajectory | window: every turn is its own row
    window: NonNegativeInt = 0  # past turns shown in each prompt (history: window)
    max_turns: PositiveInt = 1
    response_tokens: PositiveInt = 1  # budget of one response
    context_tokens: PositiveInt = 1  # budget of a row: prompt and responses
    invalid_penalty: Annotated[float, NOT_NEGATIVE] = 0.0  # what an invalid turn subtracts from its own score
    prompt: dict[str, str] = field(default_factory=dict)  # str.format templates, see rules.TEMPLATES


@dataclass(frozen=True)
class Baseline:
    name: str = ""
    advantage: dict[str, Any] = field(default_factory=dict)  # `_target_` of a function in advantages.py, and keywords


@dataclass(frozen=True)
class Modulation:
    name: str = ""
    lam: dict[str, Any] | None = None  # `_target_` of a schedule; null: no modulation
    gate: Annotated[float, NOT_NEGATIVE] = 0.0  # nats; 0: every group is modulated
    # Departures from the paper; see arms.Arm.
    scope: Literal["group", "trajectory", "batch"] = "group"
    signal: Literal["entropy", "surprisal"] = "entropy"
    unit: Literal["response", "token"] = "response"
    shuffle: bool = False
    keep: Literal["all", "raising", "lowering"] = "all"
    bonus: Annotated[float, NOT_NEGATIVE] = 0.0
    bonus_lam: float = 1.0
    centred: bool = False


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


@dataclass(frozen=True)
class Evaluation:
    panel: str = "dev"  # read while training; tuning reads only this
    final: str = "test"  # opened once, at the end
    every: NonNegativeInt = 0  # steps between dev evaluations; 0: only before and after
    repeats: PositiveInt = 1
    temperature: Annotated[float, POSITIVE] = 1.0
    tasks: NonNegativeInt = 0  # 0: the full panel
    max_turns: NonNegativeInt = 0  # of its episodes; 0: env.max_turns
    context_tokens: NonNegativeInt = 0  # 0: env.context_tokens


@dataclass(frozen=True)
class Launch:
    """How much machine, for how long. Recorded, never hashed: execution decides no result."""

    name: str = ""
    where: Literal["local", "slurm"] = "local"
    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
    cpus_per_task: NonNegativeInt = 0
    gpu_memory_gb: Annotated[float, NOT_NEGATIVE] = 0.0  # of each GPU, as its name has it; 0: not known
    gpu_tflops: Annotated[float, NOT_NEGATIVE] = 0.0  # of each GPU, dense bf16, at its best; 0: not known
    hours: Annotated[float, NOT_NEGATIVE] = 0.0
    threads: NonNegativeInt = 0  # torch threads; 0: torch's own choice
    device_rows: NonNegativeInt = 0  # rows per micro-batch and device; 0: all rows of an update at once
    device_tokens: NonNegativeInt = 0  # tokens per micro-batch and device, padding included; 0: no limit
    device_episodes: NonNegativeInt = 0  # episodes played at once per device; 0: all of a round
    # Who generates: the policy itself, TRL's engine in its process (HF generate, vLLM), or servers of other processes.
    sampler: Literal["local", "engine", "served"] = "local"
    servers: str | None = None  # folder with the `urls` and the `key` of servers (sampler: served); see addresses.py
    server_nodes: NonNegativeInt = (
        0  # nodes of the job that serve, besides `nodes`; then `vllm_client` is in the run dir
    )
    server_weights: Literal["files", "nccl"] = "files"  # how they get the newest weights; see weights.py
    server_seconds: Annotated[float, POSITIVE] = 600.0  # for one answer; and how long none may come
    workers: NonNegativeInt = 0  # processes that environments are stepped in; 0: in the trainer's own
    workers_at: str | None = None  # folder of nodes that lend their cores to them (see lend.py); null: this machine
    env_seconds: Annotated[float, POSITIVE] = (
        120.0  # an environment that answers later than this has hung (workers > 0)
    )
    save_every: NonNegativeInt = 0  # steps between checkpoints; 0: only at the end
    warn_seconds: NonNegativeInt = (
        0  # before the time limit of a job: it saves and is requeued; longer than a step and a save
    )
    requeues: NonNegativeInt = 0  # starts of a job after its first, at most; 0: no limit
    trainer: dict[str, Any] = field(default_factory=dict)  # GRPOConfig keywords of execution, see keywords.EXECUTION


@dataclass(frozen=True)
class Experiment:
    name: str = ""
    seed: NonNegativeInt = 0
    model: Model = field(default_factory=Model)
    env: Env = field(default_factory=Env)
    baseline: Baseline = field(default_factory=Baseline)
    modulation: Modulation = field(default_factory=Modulation)
    trainer: Trainer = field(kw_only=True)
    evaluation: Evaluation = field(default_factory=Evaluation)
    launch: Launch = field(default_factory=Launch)
    outputs: str | None = None
    tracking: str | None = None
    parent: str | None = (
        None  # the run that this one continues, by `from=RUN_DIR`: its signature, and @STEP where it was stopped
    )
    parent_dir: str | None = None  # where that one lies
    parent_steps: NonNegativeInt = 0  # steps that it has made: the first step of this run is the next one
    resume: Literal["exact", "inexact"] = "exact"  # inexact: go on though code, libraries or machine changed


def apply_evaluation_limits(experiment: Experiment) -> Experiment:
    """The same under the rules that its panels are played by, which may give an episode more room than training does."""
    env, how = experiment.env, experiment.evaluation
    turns, tokens = how.max_turns or env.max_turns, how.context_tokens or env.context_tokens
    return replace(experiment, env=replace(env, max_turns=turns, context_tokens=tokens))


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """What `experiment.json` holds."""
    return asdict(experiment) | {"trainer": trainer_keywords(experiment.trainer)}


def trainer_keywords(trainer: Trainer) -> dict[str, Any]:
    """The keywords that are set."""
    return {key: value for key, value in asdict(trainer).items() if value is not None}


def neutral_values(block: Any) -> dict[str, Any]:
    """The defaults of a block and of the blocks in it; what has no default is left out."""
    values: dict[str, Any] = {}
    for item in fields(block):
        if is_dataclass(item.type):
            values[item.name] = neutral_values(item.type)
        elif item.default_factory is not MISSING:
            values[item.name] = item.default_factory()
        elif item.default is not MISSING:
            values[item.name] = item.default
    return values
