"""The words of an experiment, and the way from a command line to one frozen, typed value.

Everything that can be wrong with an experiment is found here, before anything heavy is imported. The value is the job:
written to `experiment.json` it can be run by hand, and the hash of its science names its folder.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from aem_exp import disk, keywords, rules, targets
from aem_exp.targets import instantiate
from aem_exp.trust import check as check_owner
from aem_exp.values import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, ConfigError, Missing, build

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["ConfigError", "instantiate"]
Count = Annotated[int, NOT_NEGATIVE]
Size = Annotated[int, AT_LEAST_1]
EXECUTION = (
    "name",
    "launch",
    "outputs",
    "tracking",
    "parent_dir",
    "parent_steps",
    "resume",
)  # recorded, and not hashed
RETIRED: tuple[str, ...] = ()  # dotted keys that older versions wrote into records, and that decide nothing any more


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
    window: Count = 0  # past turns shown in each prompt (history: window)
    max_turns: Size = 1
    response_tokens: Size = 1  # budget of one response
    context_tokens: Size = 1  # budget of a row: prompt and responses
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


@dataclass(frozen=True)
class Evaluation:
    panel: str = "dev"  # read while training; tuning reads only this
    final: str = "test"  # opened once, at the end
    every: Count = 0  # steps between dev evaluations; 0: only before and after
    repeats: Size = 1
    temperature: Annotated[float, POSITIVE] = 1.0
    tasks: Count = 0  # 0: the full panel
    max_turns: Count = 0  # of its episodes; 0: env.max_turns
    context_tokens: Count = 0  # 0: env.context_tokens


@dataclass(frozen=True)
class Launch:
    """How much machine, for how long. Recorded, never hashed: execution decides no result."""

    name: str = ""
    where: Literal["local", "slurm"] = "local"
    nodes: Size = 1
    gpus_per_node: Count = 0
    cpus_per_task: Count = 0
    gpu_memory_gb: Annotated[float, NOT_NEGATIVE] = 0.0  # of each GPU, as its name has it; 0: not known
    gpu_tflops: Annotated[float, NOT_NEGATIVE] = 0.0  # of each GPU, dense bf16, at its best; 0: not known
    hours: Annotated[float, NOT_NEGATIVE] = 0.0
    threads: Count = 0  # torch threads; 0: torch's own choice
    device_rows: Count = 0  # rows per micro-batch and device; 0: all rows of an update at once
    device_tokens: Count = 0  # tokens per micro-batch and device, padding included; 0: no limit
    device_episodes: Count = 0  # episodes played at once per device; 0: all of a round
    # Who generates: the policy itself, TRL's engine in its process (HF generate, vLLM), or servers of other processes.
    sampler: Literal["local", "engine", "served"] = "local"
    servers: str | None = None  # folder with the `urls` and the `key` of servers (sampler: served); see addresses.py
    server_nodes: Count = 0  # nodes of the job that serve, besides `nodes`; then `servers` is in the run dir
    server_weights: Literal["files", "nccl"] = "files"  # how they get the newest weights; see weights.py
    server_seconds: Annotated[float, POSITIVE] = 600.0  # for one answer; and how long none may come
    workers: Count = 0  # processes that environments are stepped in; 0: in the trainer's own
    workers_at: str | None = None  # folder of nodes that lend their cores to them (see lend.py); null: this machine
    env_seconds: Annotated[float, POSITIVE] = (
        120.0  # an environment that answers later than this has hung (workers > 0)
    )
    save_every: Count = 0  # steps between checkpoints; 0: only at the end
    warn_seconds: Count = 0  # before the time limit of a job: it saves and is requeued; longer than a step and a save
    requeues: Count = 0  # starts of a job after its first, at most; 0: no limit
    trainer: dict[str, Any] = field(default_factory=dict)  # GRPOConfig keywords of execution, see keywords.EXECUTION


@dataclass(frozen=True)
class Experiment:
    name: str = ""
    seed: Count = 0
    model: Model = field(default_factory=Model)
    env: Env = field(default_factory=Env)
    baseline: Baseline = field(default_factory=Baseline)
    modulation: Modulation = field(default_factory=Modulation)
    trainer: dict[str, Any] = field(default_factory=dict)  # GRPOConfig keywords that decide results, and keywords.OURS
    evaluation: Evaluation = field(default_factory=Evaluation)
    launch: Launch = field(default_factory=Launch)
    outputs: str | None = None
    tracking: str | None = None
    parent: str | None = (
        None  # the run that this one continues, by `from=RUN_DIR`: its signature, and @STEP where it was stopped
    )
    parent_dir: str | None = None  # where that one lies
    parent_steps: Count = 0  # steps that it has made: the first step of this run is the next one
    resume: Literal["exact", "inexact"] = "exact"  # inexact: go on though code, libraries or machine changed


# From a command line to an experiment.


def load(overrides: list[str], config_dir: str | Path | None = None, trust: bool = False) -> Experiment:
    """What a command line resolves to.

    Args:
        overrides: as typed: `+experiment=alfworld_1_5b`, `modulation=none`, `trainer.steps=10`, `from=RUN_DIR`.
        config_dir: a folder laid over `conf/`: its groups add to ours, its files hide ours of the same name.
        trust: continue a run of somebody else's; its config names functions that are called.

    Raises:
        ConfigError: anything that is wrong with it.
    """
    from aem_exp.compose import compose

    return resolve(compose(overrides, config_dir, trust))


def resolve(cfg: "DictConfig | Mapping[str, Any]") -> Experiment:
    """The typed value of a composed config, with every `_target_` bound and every contradiction refused."""
    from aem_exp.compose import plain

    experiment = _bound(_typed(plain(cfg)))
    rules.check(experiment)
    if experiment.parent_dir is not None:
        rules.check_continued(experiment, read(experiment.parent_dir, trust=True))
    return experiment


def read(folder: str | Path, trust: bool = False) -> Experiment:
    """The experiment of a run dir, as it was resolved.

    Raises:
        ConfigError: there is none, it was edited, or it is somebody else's and not to be trusted.
    """
    folder = Path(folder).expanduser().absolute()
    check_owner(folder, trust)
    file = folder / "experiment.json"
    if not os.access(file, os.R_OK):
        raise ConfigError("RUN_DIR", str(folder), f"must be the folder of a run; no {file.name} can be read there")
    experiment = _bound(from_dict(disk.read(file)))
    if not folder.name.endswith(f"-{signature(experiment)}"):
        remedy = f"{file.name} hashes to {signature(experiment)}: it was edited, or written by another version"
        raise ConfigError("RUN_DIR", str(folder), remedy)
    return experiment


def from_dict(data: Mapping[str, Any]) -> Experiment:
    """The inverse of `to_dict`: typed, complete, and not checked for contradictions again; retired keys are left out."""
    return _typed(_without_retired(data))


def _without_retired(data: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    return {
        key: _without_retired(value, f"{at}{key}.") if isinstance(value, Mapping) else value
        for key, value in data.items()
        if f"{at}{key}" not in RETIRED
    }


def _typed(data: Mapping[str, Any]) -> Experiment:
    """An experiment of blocks and values; a key that is not known is refused."""
    for group, block in data.items():
        if isinstance(block, Mapping) and (group in block or ("trainer" in block and group != "launch")):
            header = "a file that sets more than its own block begins with the line `# @package _global_`"
            raise ConfigError(group, f"{{{', '.join(block)}}}", f"{header}: does the one in conf/{group}/?")
    e = build(Experiment, data)
    launch = replace(e.launch, trainer=keywords.execution(e.launch.trainer))
    return replace(e, trainer=keywords.science(e.trainer), launch=launch)


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """What `experiment.json` holds."""
    return asdict(experiment)


def examined(experiment: Experiment) -> Experiment:
    """The same under the rules that its panels are played by, which may give an episode more room than training does."""
    env, how = experiment.env, experiment.evaluation
    turns, tokens = how.max_turns or env.max_turns, how.context_tokens or env.context_tokens
    return replace(experiment, env=replace(env, max_turns=turns, context_tokens=tokens))


def notes(experiment: Experiment) -> list[str]:
    """What is allowed and yet does nothing, each in a sentence."""
    return rules.notes(experiment)


def check_here(experiment: Experiment) -> None:
    """Refuse what another machine, or another number of processes, would have to run."""
    launch, here = experiment.launch, int(os.environ.get("WORLD_SIZE", "1"))
    wanted = launch.nodes * max(1, launch.gpus_per_node)
    if here != wanted:
        asked = f"{launch.nodes} nodes x {launch.gpus_per_node} GPUs"
        remedy = f"is a run of {wanted} processes, and here are {here}: choose launch=gpu1 or launch=local, submit it"
        raise Missing("launch", asked, f"{remedy} (launch.where=slurm), or start them with torchrun")
    vllm = "vLLM is not installed: pip install 'vllm>=0.22,<=0.31.0' (Linux, CUDA), or"
    if launch.trainer.get("use_vllm") and find_spec("vllm") is None:
        raise Missing("launch.trainer.use_vllm", True, f"{vllm} false")
    if launch.server_weights == "nccl" and find_spec("vllm") is None:
        raise Missing("launch.server_weights", "nccl", f"{vllm} files")


def _bound(e: Experiment) -> Experiment:
    """Every `_target_` checked against its signature, its keywords typed."""
    model, modulation, launch = e.model, e.modulation, e.launch
    if model.path and (Path(model.path).expanduser() / "config.json").is_file():  # one spelling, one signature
        model = replace(model, path=str(Path(model.path).expanduser().resolve()))
    folders = {name: getattr(launch, name) for name in ("servers", "workers_at")}
    whole: dict[str, Any] = {n: str(Path(f).expanduser().absolute()) for n, f in folders.items() if f is not None}
    launch = replace(launch, **whole)  # a job stands elsewhere
    if model.make is not None:
        model = replace(model, make=targets.bind("model.make", model.make, supplied=("world", "env", "folder")))
    if model.lora is not None:
        lora = targets.bind("model.lora", {"_target_": "peft.LoraConfig", **model.lora}, supplied=("task_type",))
        model = replace(model, lora={key: value for key, value in lora.items() if key != "_target_"})
    if modulation.lam is not None:
        modulation = replace(modulation, lam=targets.bind("modulation.lam", modulation.lam))
    advantage = targets.bind("baseline.advantage", e.baseline.advantage, positional=1)
    baseline = replace(e.baseline, advantage=advantage)
    env = replace(e.env, make=targets.bind("env.make", e.env.make))
    return replace(e, model=model, env=env, baseline=baseline, modulation=modulation, launch=launch)


# Identity.


def signature(experiment: Experiment) -> str:
    """Hash of the science. Neutral values are left out, so a new option orphans no run."""
    text = json.dumps(_science(experiment), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def arm(experiment: Experiment) -> str:
    """Hash of the science without the seed: the runs that answer one question."""
    return signature(replace(experiment, seed=0))


def run_dir(experiment: Experiment) -> Path:
    """Where this experiment lives: the same place whenever it is asked for."""
    e = experiment
    return outputs_root(e) / f"{e.name}-{e.baseline.name}-{e.modulation.name}-s{e.seed}-{signature(e)}"


def outputs_root(experiment: Experiment) -> Path:
    return Path(experiment.outputs or os.environ.get("AEM_OUTPUTS") or "outputs").expanduser().absolute()


def diff(a: Experiment, b: Experiment) -> list[str]:
    """How the science of `b` differs from that of `a`, a line per dotted key."""
    old, new = dict(_dotted(_hashed(a))), dict(_dotted(_hashed(b)))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {_worded(old.get(key))} -> {_worded(new.get(key))}" for key in keys]


def nearest(experiment: Experiment) -> tuple[Path, list[str]] | None:
    """The existing run that differs least from this experiment, and how this experiment differs from it."""
    found = []
    for file in outputs_root(experiment).glob("*/experiment.json"):
        try:
            found.append((file.parent, diff(from_dict(disk.read(file)), experiment)))
        except ConfigError:  # written by another version, or damaged
            continue
    return min(found, key=lambda pair: len(pair[1]), default=None)


def _hashed(e: Experiment) -> dict[str, Any]:
    """The science, complete: without execution, and without names, which are only read by people."""
    data = to_dict(e)
    parts = {key: value for key, value in data.items() if key not in EXECUTION}
    for part in ("model", "env", "baseline", "modulation"):
        del parts[part]["name"]
    return parts


def _science(e: Experiment) -> dict[str, Any]:
    neutral = _hashed(Experiment()) | {"trainer": keywords.NEUTRAL}
    out = {}
    for key, value in _hashed(e).items():
        if isinstance(value, dict):
            out[key] = {k: v for k, v in value.items() if k not in neutral[key] or neutral[key][k] != v}
        elif value != neutral[key]:
            out[key] = value
    return {key: value for key, value in out.items() if value != {}}


def _dotted(data: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def _worded(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57].replace("\n", " ") + "..."


# Where configs lie.


def conf_root() -> Path:
    """The folder of our configs: $AEM_ROOT/conf, else the wheel's, else the checkout's."""
    here = Path(__file__).absolute().parent
    bundled = here / "_bundled" / "conf"
    if root := os.environ.get("AEM_ROOT"):
        return Path(root).expanduser().absolute() / "conf"
    return bundled if bundled.is_dir() else here.parent / "conf"


def config_roots(config_dir: str | Path | None = None) -> list[Path]:
    """The folders that configs come from; the first that has a file wins."""
    roots = [conf_root()]
    if not (roots[0] / "config.yaml").is_file():
        raise ConfigError("AEM_ROOT", os.environ.get("AEM_ROOT"), f"there is no {roots[0] / 'config.yaml'}")
    if config_dir is not None:
        user = Path(config_dir).expanduser().absolute()
        if not user.is_dir():
            raise ConfigError("--config-dir", config_dir, "there is no such folder")
        roots.insert(0, user)
    return roots


def choices(roots: list[Path]) -> dict[str, dict[str, Path]]:
    """Group -> choice -> file, over all folders. The groups are ours: a user's folder may hold other things beside."""
    groups = sorted(folder.name for folder in roots[-1].iterdir() if folder.is_dir())
    out: dict[str, dict[str, Path]] = {group: {} for group in groups}
    for root in reversed(roots):
        for group in groups:
            for file in sorted((root / group).glob("**/*.yaml")):
                out[group][str(file.relative_to(root / group).with_suffix(""))] = file
    # A folder that is named as a choice holds parts of it, which are none by themselves: see conf/baseline/gigpo.yaml.
    return {
        group: {name: file for name, file in files.items() if name.rpartition("/")[0] not in files}
        for group, files in out.items()
    }
