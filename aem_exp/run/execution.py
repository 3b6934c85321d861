"""One experiment, on this machine, to a result. The composition root: here the parts meet.

The run dir is the truth, and asking again is safe: what is finished is left alone, what was interrupted continues from its
newest complete checkpoint and ends as if it had never stopped.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from aem_exp import METHOD, config, policy, provenance
from aem_exp.cluster import distributed, rendezvous, slurm
from aem_exp.cluster.signals import Signals
from aem_exp.config import Experiment
from aem_exp.core import console, disk, extras
from aem_exp.envs import World
from aem_exp.jobs import preflight
from aem_exp.run.resume import ResumePoint, find_resume_point, prepare_run_dir
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
    watch: "StepCallback | None" = None,
    folder: Path | None = None,
    begin: Callable[[], None] | None = None,
) -> Path:
    """Train and evaluate one experiment; the run dir.

    Returns at once where the result is there. Where several processes share the run (see `distributed`), each calls this.

    Args:
        watch: called in the first process after each step; where it is a `Watcher` too, it also sees how far the play is.
        folder: the run dir, where it is not the one that `config.run_dir` says.
        begin: called in the first process when nothing is left that could be refused.

    Raises:
        ConfigError: before any work.
        RunLocked: another process runs it.
        Interrupted: by Ctrl-C, TERM or USR2, at the end of a step, all of which is saved.
        RunError: it cannot go on.
    """
    config.check_machine(experiment)
    folder = folder or config.run_dir(experiment)
    if (folder / RESULT).exists():
        return folder
    extras.require_training("launch", experiment.launch.name, "a run")
    console.silence_libraries()
    world = preflight.open_checked_world(experiment)
    policy.select_device(experiment.launch)
    if experiment.launch.servers:
        rendezvous.read_urls(Path(experiment.launch.servers))
    weights = policy.locate(experiment.model) if experiment.model.path else None
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
                    _run_attempt(experiment, folder, world, weights, watch, signals, begin)
    return folder


def _saved_step(folder: Path) -> int:
    return find_resume_point(folder).step


def _run_attempt(
    experiment: Experiment,
    folder: Path,
    world: World,
    weights: str | None,
    watch: "StepCallback | None",
    signals: Signals,
    begin: Callable[[], None] | None,
) -> None:
    """A start of the run, in each of its processes, to its result."""
    start = distributed.broadcast_from_main(lambda: prepare_run_dir(experiment, folder, weights))
    if begin:
        begin()
    if start.step > 0:
        log.info("going on from step %d", start.step)
    with _open_tracker(experiment, folder, world.fingerprint, start) as tracker:
        weights = weights or distributed.broadcast_from_main(lambda: policy.make_cached(experiment, world))
        # These import torch and TRL: a run that is refused, or finished, does not wait for that.
        from aem_exp.rollout.play import Watcher
        from aem_exp.run import summary
        from aem_exp.run.context import RunContext
        from aem_exp.run.recorder import RunRecorder
        from aem_exp.run.session import open_session

        context = RunContext(experiment, folder, world, weights, start)
        recorder = RunRecorder(folder, start.last_measured_step, tracker, watch)
        with open_session(context, recorder, signals, watch if isinstance(watch, Watcher) else None) as session:
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
    """What the first process logs to; the others log nothing."""
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
    """The tags of the run in MLflow; `changes`: of code, libraries or machine since its first start."""
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
