"""Runs an experiment to its result: the composition root of a run.

Calling `run` again is safe. A finished run is left unchanged. An interrupted run resumes from its newest complete checkpoint
and ends with the same result as an uninterrupted run.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from aem_exp import METHOD, config, policy, provenance
from aem_exp.cluster import distributed, slurm
from aem_exp.cluster.signals import Signals
from aem_exp.config import Experiment
from aem_exp.core import console, disk, extras
from aem_exp.envs import World
from aem_exp.jobs import preflight
from aem_exp.rollout.sampling import server_check
from aem_exp.run.resume import ResumePoint, find_resume_point, prepare_run_dir
from aem_exp.run.warm_start import prepare_weights
from aem_exp.rundir import RESULT, membership
from aem_exp.rundir.attempts import record_attempt
from aem_exp.rundir.lock import hold_run_lock
from aem_exp.tracking import store_uri, views

if TYPE_CHECKING:
    from aem_exp.run.recorder import StepCallback
    from aem_exp.tracking.tracker import NullTracker, Tracker

log = logging.getLogger("aem_exp")


def run(
    experiment: Experiment,
    callback: "StepCallback | None" = None,
    folder: Path | None = None,
    on_start: Callable[[], None] | None = None,
) -> Path:
    """Train and evaluate one experiment; return the run directory.

    This returns at once if the run is finished. If several processes share the run (see `distributed`), each process calls it.

    Args:
        callback: called in the first process after each step. If it is also a `Watcher`, it receives the progress of rollouts.
        folder: the run directory; by default `config.run_dir(experiment)`.
        on_start: called in the first process once all checks have passed.

    Raises:
        ConfigError: the experiment cannot run; raised before any work.
        RunLocked: another process owns the run.
        Interrupted: the run received SIGINT, SIGTERM or SIGUSR2. In training, the current step is finished and saved first.
        RunError: the run cannot continue.
    """
    config.check_machine(experiment)
    folder = folder or config.run_dir(experiment)
    if (folder / RESULT).exists():
        return folder
    extras.require_training("launch", experiment.launch.name, "a run")
    console.silence_libraries()
    world = preflight.open_checked_world(experiment)
    policy.select_device(experiment.launch)
    weights = policy.locate(experiment.model) if experiment.model.path else None
    if experiment.launch.servers:
        server_check.require_suitable(experiment, weights or str(policy.cached_folder(experiment, world)))
    if distributed.is_main_process():
        preflight.check_grader(experiment, world)
    _check_ram(experiment, world)
    distributed.initialize(cpu=not experiment.launch.gpus_per_node)
    with Signals() as signals:
        if not distributed.is_main_process():
            _run_attempt(experiment, folder, world, weights, None, signals, None)
            return folder
        store_uri.probe(store_uri.resolve_uri(experiment.tracking, folder.parent))
        disk.check_writable(folder, "outputs")
        with hold_run_lock(folder):
            if not (folder / RESULT).exists():
                requeues = experiment.launch.requeues
                with record_attempt(folder, _saved_step(folder), lambda: _saved_step(folder), requeues):
                    _run_attempt(experiment, folder, world, weights, callback, signals, on_start)
    return folder


def _check_ram(experiment: Experiment, world: World) -> None:
    """Refuse an experiment that cannot fit into the memory of this machine; warn if it may not fit."""
    if experiment.launch.gpus_per_node or experiment.model.path is None:
        return
    from aem_exp.jobs import ram

    need = ram.check_ram(experiment, world)
    for warning in need.warnings(experiment) if need and distributed.is_main_process() else ():
        log.warning(warning)


def _saved_step(folder: Path) -> int:
    return find_resume_point(folder).step


def _run_attempt(
    experiment: Experiment,
    folder: Path,
    world: World,
    weights: str | None,
    callback: "StepCallback | None",
    signals: Signals,
    on_start: Callable[[], None] | None,
) -> None:
    """Run from the resume point to the result. Every process of the run calls this."""
    start = distributed.broadcast_from_main(lambda: prepare_run_dir(experiment, folder, weights))
    if on_start:
        on_start()
    if start.step > 0:
        log.info("resuming from step %d", start.step)
    with _open_tracker(experiment, folder, world.fingerprint, start) as tracker:
        weights = weights or distributed.broadcast_from_main(lambda: policy.make_cached(experiment, world))
        started = prepare_weights(experiment, folder, world, weights, start)
        # These modules import torch and TRL. A finished or refused run must not wait for that.
        from aem_exp.rollout.play import Watcher
        from aem_exp.run import summary
        from aem_exp.run.context import RunContext
        from aem_exp.run.recorder import RunRecorder
        from aem_exp.run.session import open_session

        context = RunContext(experiment, folder, world, started.weights, start, started.facts)
        recorder = RunRecorder(folder, start.last_measured_step, tracker, callback)
        with open_session(context, recorder, signals, callback if isinstance(callback, Watcher) else None) as session:
            result = session.train_and_score()
        if distributed.is_main_process():
            for path in summary.write_artifacts(folder):
                tracker.log_artifact(path)
            recorder.write_result(folder / RESULT, result)
        distributed.shut_down()
    if tracker.trouble:
        log.warning(tracker.trouble)


def _open_tracker(
    experiment: Experiment, folder: Path, fingerprint: str, start: ResumePoint
) -> "Tracker | NullTracker":
    """Open the tracker of the first process; the other processes log nothing."""
    from aem_exp.tracking import tracker

    if not distributed.is_main_process():
        return tracker.NullTracker()
    commit, uri = provenance.read(folder)["commit"], store_uri.resolve_uri(experiment.tracking, folder.parent)
    return tracker.Tracker.open(
        folder,
        uri,
        experiment=experiment.name,
        run_name=f"{experiment.baseline.name}+{experiment.modulation.name}/s{experiment.seed}/{config.signature(experiment)[:6]}",
        params=config.to_dict(experiment),
        tags=_tags(experiment, fingerprint, commit, start.changes)
        | {views.sweep_tag(sweep): group for sweep, group in membership.read_labels(folder).items()},
        resume_step=start.last_measured_step,
        wait=False,
        live=slurm.JOB_VARIABLE not in os.environ or store_uri.sqlite_file(uri) is None,
    )


def _tags(experiment: Experiment, fingerprint: str, commit: str | None, changes: list[str]) -> dict[str, str]:
    """Return the MLflow tags of the run. `changes`: changes of code, libraries or machine since its first start."""
    return {
        "aem.group": f"{experiment.baseline.name}+{experiment.modulation.name}",
        "aem.seed": str(experiment.seed),
        "aem.signature": config.signature(experiment),
        "aem.arm": config.arm_signature(experiment),
        "aem.env_fingerprint": fingerprint,
        "aem.method": str(METHOD),
        **({"aem.parent": experiment.parent} if experiment.parent else {}),
        **({"aem.resumed": "inexact"} if changes else {}),
        **({"git.commit": commit} if commit else {}),
    }
