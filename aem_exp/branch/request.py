"""What to branch: a run, a step with its weights, the arms, the states, and the folder of the results."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aem_exp import config
from aem_exp.config import ConfigError, Experiment, Modulation
from aem_exp.core import extras
from aem_exp.envs import World, opening
from aem_exp.envs.panel import Panel, build_panel
from aem_exp.evaluate import request
from aem_exp.evaluate.evaluation import hash_identity
from aem_exp.rundir import RESULT, checkpoints

TRAINING_LAUNCH_KEYS = (
    "device_rows",
    "device_tokens",
    "device_episodes",
    "trainer",
)  # of the run; they split an update


@dataclass(frozen=True)
class BranchSetup:
    """The settings of a branch command."""

    experiment: Experiment
    """The experiment of the run, with one update per step."""
    world: World
    panel: Panel
    """Panel whose episodes give the fixed states."""
    step: int
    """Number of steps that the weights were trained for."""
    updates: int
    """Number of updates until then."""
    checkpoint: Path | None
    """The checkpoint of this step; None: the start of the run."""
    weights: str
    """Folder of the initial weights of the run."""
    arms: dict[str, Modulation]
    """Name -> modulation; the other arms are compared with the first one."""
    states: int
    """Number of fixed states."""
    samples: int
    """Number of responses at each state."""
    plain: bool
    """Follow the plain gradient instead of the optimizer of the run."""
    kl: float | None
    """KL at the fixed states that each update is scaled to, in nats; None: not scaled."""
    folder: Path
    """Folder of the results."""
    identity: dict[str, Any]
    """What decides the results."""


def prepare_branches(arguments: argparse.Namespace) -> BranchSetup:
    """Return the settings of a command; all mistakes are found here, before any work."""
    request.check_overrides(arguments.overrides, ("launch", "outputs"))
    limited, original = request.read_run(arguments, finished=False)
    run_dir = Path(arguments.target).expanduser().absolute()
    experiment = _one_update(limited, original, arguments.optimizer == "sgd")
    config.check_machine(experiment)
    extras.require_training("RUN_DIR", arguments.target, "branching it")
    arms = {name: _read_arm(name, original, arguments) for name in arguments.arms.split(",")}
    checkpoint = _find_checkpoint(run_dir, arguments.step, original)
    world = opening.open_world(experiment)
    if (run_dir / RESULT).exists():
        request.check_fingerprint(world.fingerprint, run_dir)
    panel = build_panel(world, arguments.panel, 0, ("--panel", "--tasks"))
    from aem_exp import policy

    step = checkpoints.steps(checkpoint) if checkpoint else 0
    initial = request.initial_weights(original)
    identity = {
        "signature": config.signature(original),
        "step": step,
        "weights": policy.fingerprint(checkpoint or initial),
        "world": world.fingerprint,
        "panel": [panel.name, panel.hash],
        "asked": [arguments.states, arguments.samples],
        "arms": [_changed_settings(arm) for arm in arms.values()],
        "optimizer": arguments.optimizer,
        "kl": arguments.kl,
    }
    outputs = config.outputs_root(experiment) / run_dir.name
    base = outputs if any(text.startswith("outputs=") for text in arguments.overrides) else run_dir
    return BranchSetup(
        experiment=experiment,
        world=world,
        panel=panel,
        step=step,
        updates=checkpoints.updates(checkpoint) if checkpoint else 0,
        checkpoint=checkpoint,
        weights=initial,
        arms=arms,
        states=arguments.states,
        samples=arguments.samples,
        plain=arguments.optimizer == "sgd",
        kl=arguments.kl,
        folder=base / "branches" / f"step-{step}-{'-'.join(arms)[:60]}-{hash_identity(identity)}",
        identity=identity,
    )


def _one_update(limited: Experiment, original: Experiment, plain: bool) -> Experiment:
    """The experiment of a run with one update per step, in one local process.

    Args:
        limited: the experiment with the launch settings of an evaluation.
        plain: with a plain gradient; its learning rate has no effect, because the update is scaled.
    """
    if limited.launch.sampler != "local":
        remedy = "must be local: the policy is updated and sampled in this process"
        raise ConfigError("launch.sampler", limited.launch.sampler, remedy)
    launch = replace(limited.launch, **{key: getattr(original.launch, key) for key in TRAINING_LAUNCH_KEYS})
    for key in ("use_vllm", "fsdp"):
        if launch.trainer.get(key):
            launch = replace(launch, trainer={k: v for k, v in launch.trainer.items() if not k.startswith(key)})
    if not launch.gpus_per_node:
        launch = replace(launch, trainer={**launch.trainer, "use_cpu": True})
    trainer = replace(limited.trainer, mini_batch="all", num_iterations=1)
    if plain:
        constant = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "warmup_steps": 0.0, "weight_decay": 0.0}
        trainer = replace(trainer, optim="sgd", **constant)  # type: ignore[arg-type]
    return replace(limited, trainer=trainer, launch=launch, modulation=Modulation())  # each arm sets its own


def _find_checkpoint(run_dir: Path, step: int | None, original: Experiment) -> Path | None:
    """The checkpoint of a step, by default of the newest one; None: the start of the run.

    Raises:
        ConfigError: the run has no checkpoint of this step, or it is damaged or sharded.
    """
    by_step = {checkpoints.steps(path): path for path in checkpoints.list_complete(run_dir)}
    if original.parent_dir is None and original.parent is None:
        first: dict[int, Path | None] = {0: None}
    else:
        first = {}
    known = first | by_step
    if not known:
        raise ConfigError("RUN_DIR", str(run_dir), "has no checkpoint yet")
    chosen = max(known) if step is None else step
    if chosen not in known:
        raise ConfigError("--step", step, f"the run has no checkpoint of this step; choose from {sorted(known)}")
    checkpoint = known[chosen]
    if checkpoint and (damage := checkpoints.describe_damage(checkpoint)):
        raise ConfigError("--step", chosen, f"{checkpoint.name} is damaged: {damage}")
    if checkpoint and checkpoints.is_sharded(checkpoint):
        raise ConfigError("--step", chosen, f"{checkpoint.name} is sharded over processes; branches use one process")
    return checkpoint


def _read_arm(name: str, original: Experiment, arguments: argparse.Namespace) -> Modulation:
    """Read a file of conf/modulation, and check it together with the run."""
    from aem_exp.config import compose

    choices = config.list_choices(config.config_roots(arguments.config_dir))["modulation"]
    if name not in choices:
        raise ConfigError("--arms", name, choices)
    tree = compose.to_container(compose.compose([f"modulation={name}"], arguments.config_dir))
    changed = config.to_dict(original) | {"parent_dir": None, "modulation": tree["modulation"]}
    modulation = config.resolve(changed).modulation
    if modulation.match:
        raise ConfigError("--arms", name, "is not possible here; --kl scales the updates of all arms to one size")
    return modulation


def _changed_settings(modulation: Modulation) -> Mapping[str, Any]:
    """The settings of a modulation that are not neutral, so that new settings change no hash."""
    neutral = asdict(Modulation())
    return {key: value for key, value in asdict(modulation).items() if value != neutral[key]}
