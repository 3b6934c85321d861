"""The types of an experiment: a frozen dataclass per config group. Defaults are neutral and never change."""

from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from aem_exp.config.trainer_schema import Trainer, trainer_keywords
from aem_exp.core.typed import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


@dataclass(frozen=True)
class Model:
    """The policy: loaded from weights (`path`), or made here (`make`)."""

    name: str = ""
    """The file of conf/model; not hashed."""
    path: str | None = None
    """Hub id or local folder, in Hugging Face format."""
    revision: str | None = None
    """Hub commit; resolved and pinned by `prepare`."""
    make: dict[str, Any] | None = None
    """`_target_` of a policy that is made here instead of loaded (then `path` is null)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights."""
    attention: str | None = None
    """transformers' `attn_implementation`; null: its own choice."""
    lora: dict[str, Any] | None = None
    """Keywords of `peft.LoraConfig`; null: all weights are trained."""
    system: str | None = None
    """System message; null: none."""
    thinking: Literal["on", "off", "template"] = "template"
    """Whether responses begin with reasoning; `template`: as the chat template decides."""
    trust_remote_code: bool = False
    """Run the code that comes with the weights."""
    code_sha256: str | None = None
    """Hash of the remote code that was reviewed; required with `trust_remote_code`."""


@dataclass(frozen=True)
class Env:
    """The world, and how its episodes become rows of tokens."""

    name: str = ""
    """The file of conf/env; not hashed."""
    make: dict[str, Any] = field(default_factory=dict)
    """`_target_` of a world (see `aem_exp.envs.World`), and its arguments."""
    history: Literal["full", "window"] = "full"
    """`full`: one row per trajectory; `window`: every turn is its own row."""
    window: NonNegativeInt = 0
    """Past turns in each prompt (`history: window`)."""
    max_turns: PositiveInt = 1
    """Most turns of an episode."""
    response_tokens: PositiveInt = 1
    """Most tokens of one response."""
    context_tokens: PositiveInt = 1
    """Most tokens of a row: prompt and responses."""
    invalid_penalty: NonNegativeFloat = 0.0
    """What an invalid turn subtracts from its own score."""
    prompt: dict[str, str] = field(default_factory=dict)
    """Prompt templates for `str.format`; `aem_exp.config.prompts` lists their fields."""


@dataclass(frozen=True)
class Baseline:
    """The advantage estimator; its file also sets the loss and clips of `trainer`."""

    name: str = ""
    """The file of conf/baseline; not hashed."""
    advantage: dict[str, Any] = field(default_factory=dict)
    """`_target_` of an advantage estimator, such as a function of `aem_exp.advantages`, and its arguments."""


@dataclass(frozen=True)
class Modulation:
    """Adaptive Entropy Modulation, and where it departs from the paper; see `training.modulation`."""

    name: str = ""
    """The file of conf/modulation; not hashed."""
    lam: dict[str, Any] | None = None
    """`_target_` of a schedule of lambda; null: no modulation."""
    gate: NonNegativeFloat = 0.0
    """Range of entropies (nats) below which a group is left as it is; 0: every group is modulated."""
    scope: Literal["group", "trajectory", "batch"] = "group"
    """Which units share one range of entropies, and a mean coefficient of 1."""
    signal: Literal["entropy", "surprisal"] = "entropy"
    """Mean token entropy, or mean -log p of the sampled tokens."""
    unit: Literal["response", "token"] = "response"
    """What gets a coefficient."""
    shuffle: bool = False
    """Permute the coefficients within their scope: a placebo."""
    keep: Literal["all", "raising", "lowering"] = "all"
    """Train all units, or those alone whose training raises, or lowers, the policy's entropy."""
    bonus: NonNegativeFloat = 0.0
    """zeta of EMPG: what the clarity of the next response adds to the advantage."""
    bonus_lam: float = 1.0
    """k' of EMPG: strength of the clarity in the bonus."""
    centred: bool = False
    """Subtract the batch mean from the modulated advantages, as EMPG does."""


@dataclass(frozen=True)
class Evaluation:
    """Which held-out tasks a policy plays, when, and how."""

    panel: str = "dev"
    """The panel that is played while training; tuning reads no other."""
    final: str = "test"
    """The panel that is played once, at the end."""
    every: NonNegativeInt = 0
    """Steps between evaluations on `panel`; 0: only before and after training."""
    repeats: PositiveInt = 1
    """Episodes per task."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature."""
    tasks: NonNegativeInt = 0
    """Tasks of a panel; 0: all of them."""
    max_turns: NonNegativeInt = 0
    """Most turns of an episode; 0: `env.max_turns`."""
    context_tokens: NonNegativeInt = 0
    """Most tokens of a row; 0: `env.context_tokens`."""


@dataclass(frozen=True)
class Launch:
    """Which machine, how much of it, and for how long. Recorded and never hashed: execution decides no result."""

    name: str = ""
    """The file of conf/launch."""
    where: Literal["local", "slurm"] = "local"
    """This machine, or a job."""
    nodes: PositiveInt = 1
    """Nodes that train."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs of each node, one process per GPU; 0: one process on the CPU."""
    cpus_per_task: NonNegativeInt = 0
    """CPU cores per process; 0: the site's default."""
    gpu_memory_gb: NonNegativeFloat = 0.0
    """Memory of each GPU, as its name states it; 0: not known."""
    gpu_tflops: NonNegativeFloat = 0.0
    """Peak dense bfloat16 rate of each GPU; 0: not known."""
    hours: NonNegativeFloat = 0.0
    """Time limit of a job."""
    threads: NonNegativeInt = 0
    """torch threads; 0: torch's own choice."""
    device_rows: NonNegativeInt = 0
    """Rows per micro-batch and device; 0: all rows of an update at once."""
    device_tokens: NonNegativeInt = 0
    """Tokens per micro-batch and device, padding included; 0: no limit."""
    device_episodes: NonNegativeInt = 0
    """Episodes played at once per device; 0: all of a round."""
    sampler: Literal["local", "engine", "served"] = "local"
    """What generates: the policy itself, TRL's engine in its process (HF generate, vLLM), or servers in other processes."""
    servers: str | None = None
    """Folder with the `urls` and the `key` of servers (`sampler: served`); see `cluster.rendezvous`."""
    server_nodes: NonNegativeInt = 0
    """Nodes of the job that serve, besides `nodes`; their addresses are then in the run dir."""
    server_weights: Literal["files", "nccl"] = "files"
    """How servers get the newest weights; see `rollout.sampling.weight_sync`."""
    server_seconds: PositiveFloat = 600.0
    """Time limit of one response, and of a time without any."""
    workers: NonNegativeInt = 0
    """Processes that step environments; 0: the trainer's own."""
    workers_at: str | None = None
    """Folder of the nodes that run those processes (see `jobs.lend`); null: this machine."""
    env_seconds: PositiveFloat = 120.0
    """An environment that answers later than this has hung (`workers` above 0)."""
    save_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only at the end."""
    warn_seconds: NonNegativeInt = 0
    """How long before its time limit a job saves and is requeued; longer than a step and a save."""
    requeues: NonNegativeInt = 0
    """The most starts of a job after its first; 0: no limit."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """GRPOConfig keywords of execution; see `trainer_schema.LaunchTrainer`."""


@dataclass(frozen=True)
class Experiment:
    """One run, complete: what `experiment.json` holds."""

    name: str = ""
    """First part of the run dir's name; not hashed."""
    seed: NonNegativeInt = 0
    """Seed of all random draws."""
    model: Model = field(default_factory=Model)
    """The policy."""
    env: Env = field(default_factory=Env)
    """The world."""
    baseline: Baseline = field(default_factory=Baseline)
    """The advantage estimator."""
    modulation: Modulation = field(default_factory=Modulation)
    """What modulates the advantages."""
    trainer: Trainer = field(kw_only=True)
    """Optimizer, loss, and the size of a step."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """The held-out panels."""
    launch: Launch = field(default_factory=Launch)
    """Execution; not hashed."""
    outputs: str | None = None
    """Folder of run dirs; null: $AEM_OUTPUTS, else ./outputs. Not hashed."""
    tracking: str | None = None
    """MLflow URI; null: sqlite beside the runs. Not hashed."""
    parent: str | None = None
    """The run that this one continues, by `from=RUN_DIR`: its signature, and @STEP where it was stopped."""
    parent_dir: str | None = None
    """The run dir of the parent; not hashed."""
    parent_steps: NonNegativeInt = 0
    """Steps of the parent: the first step of this run is the next one."""
    resume: Literal["exact", "inexact"] = "exact"
    """`inexact`: resume although code, libraries or machine changed."""


def apply_evaluation_limits(experiment: Experiment) -> Experiment:
    """The same under the rules that its panels are played by, which may give an episode more room than training does."""
    env, how = experiment.env, experiment.evaluation
    turns, tokens = how.max_turns or env.max_turns, how.context_tokens or env.context_tokens
    return replace(experiment, env=replace(env, max_turns=turns, context_tokens=tokens))


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """What `experiment.json` holds."""
    return asdict(experiment) | {"trainer": trainer_keywords(experiment.trainer)}


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
