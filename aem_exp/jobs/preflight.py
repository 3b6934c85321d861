"""Opens the world of an experiment and checks it before the run: interface, number of tasks, panels, user code, grader."""

from aem_exp import config, warm_start
from aem_exp.config import ConfigError, Experiment
from aem_exp.core.user_code import wrap_call_errors
from aem_exp.envs import World, audit, leakage, panel
from aem_exp.envs.opening import open_world
from aem_exp.envs.panel import ENV_TARGET
from aem_exp.jobs import function_check, world_check
from aem_exp.jobs.world_check import TINY_POLICY


def open_checked_world(experiment: Experiment) -> World:
    """Open and check the world of an experiment, and try its user-defined functions (see `function_check`).

    Raises:
        ConfigError: the world has no expert although the model or the warm start needs one, has too few tasks, or its panels
            contain training tasks; or user-defined code fails.
    """
    with wrap_call_errors(ENV_TARGET, experiment.env.make["_target_"], "importing it"):
        kind = config.instantiate(experiment.env.make, partial=True).func
    teachable = not isinstance(kind, type) or (hasattr(kind, "words") and hasattr(kind, "expert"))
    if experiment.model.make and experiment.model.make["_target_"] == TINY_POLICY and not teachable:
        remedy = (
            f"env {experiment.env.name} has no expert for the policy to imitate; load a model instead: model=NAME, or"
        )
        raise ConfigError("model.make", TINY_POLICY, f"{remedy} model.make=null model.path=FOLDER")
    function_check.check_functions(experiment)
    world, settings = open_world(experiment), experiment.trainer
    warm_start.check_world(experiment, world)
    train = panel.list_tasks(world, "train")
    if settings.tasks_per_step * settings.oversample > len(train):
        remedy = f"env {experiment.env.name} has {len(train)} training tasks"
        raise ConfigError("trainer.tasks_per_step", settings.tasks_per_step, remedy)
    how = experiment.evaluation
    panels = {
        split: panel.build_panel(world, split, how.tasks, (field, "evaluation.tasks"))
        for field, split in (("evaluation.panel", how.panel), ("evaluation.final", how.final))
    }
    name, held_out = experiment.env.name, {split: panel.tasks for split, panel in panels.items()}
    some = panel.select_tasks(world, "train", train, leakage.select_indices(train, held_out))
    leakage.check_shared_tasks(name, some, held_out)
    playable = world_check.check_world(experiment, world, some)
    if playable and (played := world_check.play_games(experiment, world, {"train": some, **held_out})):
        leakage.check_identical_games(name, played.pop("train"), played)
    return world


def check_grader(experiment: Experiment, world: World) -> None:
    """Check the grader of a world that offers forgeries, once for each version of the world (see `envs.audit`).

    Raises:
        ConfigError: a solution is not graded as a success, or an episode without a change is.
    """
    if not hasattr(world, "forgeries"):
        return
    tasks = [world.tasks(split)[0] for split in dict.fromkeys(("train", experiment.evaluation.final))]
    audit.check_grader(audit.check_auditable(world, experiment.env.name), tasks, world.fingerprint, experiment.env.name)
