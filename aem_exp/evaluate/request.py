"""Reads the arguments of an evaluation: the run or model, the panel, the agents, and the folder of the results."""

import argparse
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_exp import config
from aem_exp.config.schema import Experiment, Launch
from aem_exp.core import cli, disk, extras
from aem_exp.core.errors import ConfigError
from aem_exp.envs import World, opening
from aem_exp.envs.panel import build_panel
from aem_exp.evaluate.evaluation import EvaluationSetup, env_rules, hash_identity
from aem_exp.rundir import EXPERIMENT, MODEL, RESULT

if TYPE_CHECKING:
    from aem_exp.evaluate.agents import Agent

POLICY, UNTRAINED = "policy", "untrained"  # untrained: the policy at the start of a run, after its warm start
BEFORE_WARM_START = "before_warm_start"
WITHOUT_POLICY = ("random", "scripted", "oracle")
AGENTS = (POLICY, UNTRAINED, *WITHOUT_POLICY)
OVERRIDABLE_GROUPS = {
    "run": ("env", "model", "launch", "outputs"),
    "model": ("env", "model", "launch", "experiment", "outputs"),
    "env": ("env", "launch", "experiment", "outputs"),
}
EVALUATION_LAUNCH_KEYS = (  # keys of launch that an evaluation uses
    *("name", "gpus_per_node", "threads", "sampler", "servers", "server_seconds"),
    *("workers", "worker_prefix", "env_seconds"),
)


def build_parser(command: str, about: str) -> cli.Parser:
    """Build the parser of a command whose target is a run or a model (`evaluate` and `proxy`)."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser(command, description=about, formatter_class=layout, allow_abbrev=False)
    parser.add_argument(
        "target", nargs="?", metavar="RUN_DIR|MODEL", help="a finished run, a hub id, or a folder of weights"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of env, model, launch or outputs")
    parser.add_argument("--at-once", type=int, default=128, help="maximum number of parallel episodes (default: 128)")
    parser.add_argument("--json", action="store_true", help="print only the results, as JSON")
    parser.add_argument("--config-dir", help="folder of your own configs, which take precedence over conf/")
    parser.add_argument(
        "--trust", action="store_true", help="read another user's run; its config can call any function"
    )
    return parser


def parse_target_arguments(
    parser: cli.Parser, argv: list[str], counts: tuple[str, ...], env_alone: bool = False
) -> argparse.Namespace:
    """Parse the arguments of such a command.

    Args:
        counts: its options whose values are whole numbers of at least 1.
        env_alone: `env=NAME` may replace the target, which is then None.
    """
    arguments = parser.parse_intermixed_args(argv)
    if env_alone and arguments.target and "=" in arguments.target:
        arguments.target, arguments.overrides = None, [arguments.target, *arguments.overrides]
    elif arguments.target is None or "=" in arguments.target:
        raise ConfigError(
            "RUN_DIR|MODEL",
            arguments.target,
            "the first argument must be a run directory, a hub id or a folder of weights",
        )
    for text in arguments.overrides:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(
                "RUN_DIR|MODEL",
                text,
                f"only one target is allowed ({arguments.target} is given); settings have the form KEY=VALUE",
            )
    for option in counts:
        if (value := getattr(arguments, option)) is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')}", value, "must be a whole number of at least 1")
    return arguments


def model_path_overrides(target: str) -> list[str]:
    """Return the Hydra overrides that select a model by its path."""
    plain = re.fullmatch(r"[\w./-]+", target) is not None
    quoted = target if plain else "'" + target.replace("'", r"\'") + "'"
    return [f"model.path={quoted}", "model.make=null"]


def prepare_evaluation(
    arguments: argparse.Namespace, evaluation_limits: bool = True
) -> tuple[EvaluationSetup, list["Agent"], dict[str, str]]:
    """Return the setup of the evaluation, its agents, and why other agents are left out.

    Args:
        evaluation_limits: play with the limits of evaluation; else with those of training.
    """
    is_run = is_run_dir(arguments.target)
    kind = "run" if is_run else "model" if arguments.target else "env"
    check_overrides(arguments.overrides, OVERRIDABLE_GROUPS[kind])
    experiment, original = read_run(arguments) if is_run else (_experiment_of_model(arguments), None)
    config.check_machine(experiment)
    if arguments.target:
        extras.require_training("RUN_DIR|MODEL", arguments.target, "playing with it")
    else:
        extras.require_training("env", experiment.env.name, "playing it")
    experiment = config.apply_evaluation_limits(experiment) if evaluation_limits else experiment
    world = opening.open_world(experiment)
    if original and experiment.env.make == original.env.make:
        check_fingerprint(world.fingerprint, _absolute_path(arguments.target))
    fields = ("--panel" if arguments.panel else "evaluation.final", "--tasks")
    chosen = build_panel(world, arguments.panel or experiment.evaluation.final, arguments.tasks or 0, fields)
    policy = _policy(arguments, experiment, original) if arguments.target else None
    temperature = arguments.temperature or experiment.evaluation.temperature
    out = _results_folder(arguments, experiment, world, policy)
    setup = EvaluationSetup(experiment, world, chosen, arguments.repeats, temperature, arguments.at_once, out)
    return setup, *_select_agents(arguments.only, policy, original, setup)


def check_overrides(overrides: Sequence[str], groups: Sequence[str]) -> None:
    """Raise an error if an override sets anything outside of these groups."""
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        if re.split(r"[.@]", key)[0] not in groups:
            raise ConfigError(
                key, value, f"has no effect on this command; use {', '.join(groups)}, or an option (see --help)"
            )


def _absolute_path(target: str) -> Path:
    return Path(target).expanduser().absolute()


def is_run_dir(target: str | None) -> bool:
    return target is not None and (_absolute_path(target) / EXPERIMENT).exists()


def read_run(arguments: argparse.Namespace, finished: bool = True) -> tuple[Experiment, Experiment]:
    """Return the experiment of a run directory with the overrides, and the original one.

    Raises:
        ConfigError: an override is not possible, or the run is not finished and must be (`finished`).
    """
    folder = _absolute_path(arguments.target)
    original = config.read(folder, arguments.trust)
    if finished and not (folder / RESULT).exists():
        command = shlex.join(["python", "-m", "aem_exp.run", str(folder)])
        raise ConfigError("RUN_DIR", str(folder), f"is not finished; finish it first: {command}")
    tree = config.to_dict(original)
    if arguments.overrides:
        from aem_exp.config import compose

        tree = compose.to_container(
            compose.compose([f"from={folder}", *arguments.overrides], arguments.config_dir, arguments.trust)
        )
    tree |= {
        "parent": original.parent,
        "parent_dir": None,
        "launch": evaluation_launch(tree["launch"], arguments.overrides),
    }
    experiment = config.resolve(tree) if arguments.overrides else config.from_dict(tree)
    for key in ("path", "make", "revision", "lora"):
        if (value := getattr(experiment.model, key)) != getattr(original.model, key):
            raise ConfigError(f"model.{key}", value, "cannot be changed: a run is evaluated with its own weights")
    return experiment, original


def _experiment_of_model(arguments: argparse.Namespace) -> Experiment:
    """Return the experiment of a model, or of an env alone, with the overrides."""
    from aem_exp.config import compose

    own = _overrides_of_model(arguments) if arguments.target else []
    tree = compose.to_container(compose.compose([*arguments.overrides, *own], arguments.config_dir))
    return config.resolve({**tree, "launch": evaluation_launch(tree["launch"], arguments.overrides)})


def _overrides_of_model(arguments: argparse.Namespace) -> list[str]:
    """The overrides that select the model of the command.

    Raises:
        ConfigError: there is no such model.
    """
    path = _absolute_path(arguments.target)
    if arguments.trust:
        raise ConfigError("--trust", True, "is used only with a run directory")
    if not (path / "config.json").is_file() and (
        path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.target)
    ):
        why = "contains neither a run nor a model" if path.exists() else "there is no such folder"
        raise ConfigError(
            "RUN_DIR|MODEL", arguments.target, f"{why}; give a run directory, a hub id or a folder of weights"
        )
    from aem_exp.config import model_path

    return [*model_path_overrides(arguments.target), f"model.name='{model_path.model_name(str(path))}'"]


def evaluation_launch(launch: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the launch settings of an evaluation: one process with at most one GPU, or running servers.

    Args:
        launch: the settings of training, which may need a cluster.
        overrides: the overrides of the command line.

    Raises:
        ConfigError: an override has no effect on an evaluation, or is not possible in one.
    """
    from aem_exp.config import compose

    others = {field.name for field in fields(Launch)} - {*EVALUATION_LAUNCH_KEYS}
    typed = {compose.override_key(text): text.partition("=")[2] for text in overrides}
    for key, value in typed.items():
        part = key.removeprefix("launch.").partition(".")[0]
        if key.startswith("launch.") and part in others:
            raise ConfigError(
                key, value, f"has no effect on this command; of launch, use {', '.join(EVALUATION_LAUNCH_KEYS[1:])}"
            )
    own = {key: value for key, value in launch.items() if key not in others}
    sampler, gpus = own.get("sampler", "local"), own.get("gpus_per_node", 0)
    if sampler == "engine" and "launch.sampler" in typed:
        raise ConfigError("launch.sampler", sampler, ("local", "served"), "the engine runs only in the trainer")
    if sampler == "served" and not own.get("servers"):
        raise ConfigError("launch.servers", None, "must be the folder of running servers; or use launch.sampler=local")
    if isinstance(gpus, int) and gpus > 1:
        if "launch.gpus_per_node" in typed:
            raise ConfigError(
                "launch.gpus_per_node", gpus, "must be at most 1; for larger models use launch.sampler=served"
            )
        own["gpus_per_node"] = 1
    if sampler == "served":
        for key in ("model.dtype", "model.attention"):
            if key in typed:
                raise ConfigError(
                    key, typed[key], "has no effect with launch.sampler=served; it is set when a server is started"
                )
        return own
    unread = {key for key in ("servers", "server_seconds") if f"launch.{key}" not in typed}
    local = {key: value for key, value in own.items() if key not in unread}
    return local | ({"sampler": "local"} if sampler == "engine" else {})


def check_fingerprint(fingerprint: str, folder: Path) -> None:
    """Raise an error if the rules of the env have changed since the run: the results could not be compared."""
    trained = disk.read_json(folder / RESULT, "fingerprint")["fingerprint"]
    if fingerprint != trained:
        remedy = f"was trained in the env {trained}, but this version has {fingerprint}; to use the code of the run:"
        command = f"PYTHONPATH={folder / 'code'} python -m aem_exp.evaluate {folder}"
        raise ConfigError("RUN_DIR", str(folder), f"{remedy} {command}")


def _policy(arguments: argparse.Namespace, experiment: Experiment, original: Experiment | None) -> "Agent":
    from aem_exp import policy
    from aem_exp.evaluate.agents import Agent

    model = replace(experiment.model, make=None, lora=None)
    if original is None:
        return Agent(POLICY, model, policy.locate(model))
    model = replace(model, path=str(_absolute_path(arguments.target) / MODEL), revision=None)
    return Agent(POLICY, model, policy.locate(model), original.trainer.steps)


def _select_agents(
    only: list[str] | None, policy: "Agent | None", original: Experiment | None, setup: EvaluationSetup
) -> tuple[list["Agent"], dict[str, str]]:
    """Return the agents, and why other agents are left out."""
    from aem_exp.evaluate.agents import Agent, unavailable_reason

    wanted, agents, left_out = only or AGENTS, [], {}
    if policy is None and only and (with_policy := {*only} - {*WITHOUT_POLICY}):
        raise ConfigError("--only", with_policy.pop(), WITHOUT_POLICY, "needs a run directory or a model")
    if POLICY in wanted and policy:
        agents.append(policy)
    if UNTRAINED in wanted and original and policy:
        agents.append(Agent(UNTRAINED, policy.model, initial_weights(original)))
    elif UNTRAINED in wanted and only:
        raise ConfigError("--only", UNTRAINED, "needs a run directory, which records the initial weights")
    if BEFORE_WARM_START in wanted:
        if original is None or policy is None or original.warm_start.method is None:
            raise ConfigError("--only", BEFORE_WARM_START, "needs a run directory of a run with a warm start")
        agents.append(Agent(BEFORE_WARM_START, policy.model, model_weights(original)))
    for name in WITHOUT_POLICY:
        if name in wanted:
            if why := unavailable_reason(name, setup.experiment, setup.world, setup.panel.tasks[0]):
                left_out[name] = why
            else:
                agents.append(Agent(name))
    if not agents:
        raise ConfigError("--only", *next(iter(left_out.items())))
    if only is None:  # most envs have no scripted agent and no oracle
        left_out = {name: why for name, why in left_out.items() if name == "random"}
    return agents, left_out


def initial_weights(original: Experiment) -> str:
    """Return the folder of the initial weights of a run, after its warm start if it has one."""
    from aem_exp import warm_start

    weights = model_weights(original)
    if original.warm_start.method is None:
        return weights
    world = opening.open_world(original)
    report = logging.getLogger("aem_exp").info
    return warm_start.make_cached(original, world, weights, report).weights


def model_weights(original: Experiment) -> str:
    """Return the folder of the weights of the model of a run, before its warm start if it has one."""
    from aem_exp import policy

    if original.model.path:
        return policy.locate(original.model)
    return policy.make_cached(original, opening.open_world(original))


def _results_folder(
    arguments: argparse.Namespace, experiment: Experiment, world: World, policy: "Agent | None"
) -> Path:
    """Return the folder of the evaluations: the run directory, or a folder named by the model, its weights and the env."""
    if is_run_dir(arguments.target) and not any(text.startswith("outputs=") for text in arguments.overrides):
        return _absolute_path(arguments.target)
    root = config.outputs_root(experiment)
    if is_run_dir(arguments.target):
        return root / _absolute_path(arguments.target).name
    identity = {"env": env_rules(experiment), "world": world.fingerprint, **(policy.identity() if policy else {})}
    return root / f"{experiment.model.name if policy else experiment.env.name}-{hash_identity(identity)}"
