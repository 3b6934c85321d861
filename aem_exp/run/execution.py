"""One experiment, on this machine, to a result. The composition root: here the parts meet.

The run dir is the truth, and asking again is safe: what is finished is left alone, what was interrupted continues from its
newest complete checkpoint and ends as if it had never stopped.

Also a door: `python -m aem_exp.run RUN_DIR` runs, by hand, the experiment that a run dir holds.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_exp import METHOD, config, policy, provenance
from aem_exp.cluster import distributed, rendezvous, slurm
from aem_exp.cluster.signals import Signals
from aem_exp.config import ConfigError, Experiment, continuation
from aem_exp.core import console, disk
from aem_exp.core.errors import format_value
from aem_exp.jobs import preflight
from aem_exp.run import session
from aem_exp.run.session import ResumePoint, StepCallback
from aem_exp.rundir import RESULT, checkpoints, membership
from aem_exp.rundir.attempts import record_attempt
from aem_exp.rundir.lock import hold_run_lock
from aem_exp.tracking import store_uri, views

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

log = logging.getLogger("aem_exp")


def run(
    experiment: Experiment,
    watch: StepCallback | None = None,
    folder: Path | None = None,
    begin: Callable[[], None] | None = None,
) -> Path:
    """Train and evaluate one experiment; the run dir.

    Returns at once where the result is there. Where several processes share the run (see `distributed`), each calls this.

    Args:
        folder: the run dir, where it is not the one that `config.run_dir` says.
        begin: called in the first process when nothing is left that could be refused.

    Raises:
        ConfigError: before any work.
        Owned: another process runs it.
        Interrupted: by Ctrl-C, TERM or USR2, at the end of a step, all of which is saved.
        Stop: it cannot go on.
    """
    config.check_machine(experiment)
    folder = folder or config.run_dir(experiment)
    if (folder / RESULT).exists():
        return folder
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
                saved = session.find_resume_point(folder).step
                with record_attempt(
                    folder, saved, lambda: session.find_resume_point(folder).step, experiment.launch.requeues
                ):
                    _run_attempt(experiment, folder, world, weights, watch, signals, begin)
    return folder


def _run_attempt(
    experiment: Experiment,
    folder: Path,
    world: Any,
    weights: str | None,
    watch: StepCallback | None,
    signals: Signals,
    begin: Callable[[], None] | None,
) -> None:
    """A start of the run, in each of its processes, to its result."""
    from aem_exp.run import summary

    start = distributed.broadcast_from_main(lambda: _prepare_run_dir(experiment, folder, weights))
    if begin:
        begin()
    if start.step > 0:
        log.info("going on from step %d", start.step)
    with _open_tracker(experiment, folder, world.fingerprint, start) as tracker:
        weights = weights or distributed.broadcast_from_main(lambda: policy.make_cached(experiment, world))
        playing = session.RunSession(experiment, folder, world, weights, start, tracker, watch, signals)
        try:
            result = playing.play() | {"resumed": start.changes}
        finally:
            playing.close()
        if playing.episodes:
            for path in summary.write_artifacts(folder):
                tracker.log_artifact(path)
            disk.write_atomically(folder / RESULT, json.dumps(result, indent=1) + "\n")
            playing.episodes.remove_parts()
        distributed.shut_down()
    if tracker.trouble:
        log.warning(tracker.trouble)


def _prepare_run_dir(experiment: Experiment, folder: Path, weights: str | None) -> ResumePoint:
    """Make the run dir what this start needs; where it begins."""
    _check_disk_space(folder, weights)
    for sentence in checkpoints.set_aside_damaged(folder):
        log.warning(sentence)
    if experiment.parent_dir and checkpoints.find_newest(folder) is None:
        checkpoints.copy_into_run(continuation.starting_checkpoint(experiment), folder)
    start = session.find_resume_point(folder)
    asked = experiment.launch.trainer.get("fsdp", False)
    if start.checkpoint and (saved := checkpoints.is_sharded(start.checkpoint)) != asked:
        remedy = f"{start.checkpoint} was saved with {format_value(saved)}: go on with that"
        raise ConfigError("launch.trainer.fsdp", asked, remedy)
    if (
        start.is_scored
        and start.checkpoint is None
        and provenance.list_changes(folder, experiment, weights, distributed.world_size())
    ):
        (folder / session.BEFORE_FILE).unlink()  # nothing was trained yet: begin anew, with what there is now
        start = session.find_resume_point(folder)
    session.check_record(folder, start)
    changes = provenance.record_start(
        folder, experiment, weights, start.step if start.is_scored else None, distributed.world_size()
    )
    disk.write_atomically(folder / "experiment.json", json.dumps(config.to_dict(experiment), indent=1) + "\n")
    return replace(start, changes=changes)


def _open_tracker(
    experiment: Experiment, folder: Path, fingerprint: str, start: ResumePoint
) -> "AbstractContextManager[Any]":
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


def _tags(experiment: Experiment, fingerprint: str, commit: str | None, resumed: list[str]) -> dict[str, str]:
    return {
        "aem.group": f"{experiment.baseline.name}+{experiment.modulation.name}",
        "aem.seed": str(experiment.seed),
        "aem.signature": config.signature(experiment),
        "aem.arm": config.arm_signature(experiment),
        "aem.env_fingerprint": fingerprint,
        "aem.method": str(METHOD),
        **({"aem.parent": experiment.parent} if experiment.parent else {}),
        **({"aem.resumed": "inexact"} if resumed else {}),
        **({"git.commit": commit} if commit else {}),
    }


def _check_disk_space(folder: Path, weights: str | None) -> None:
    """Refuse a disk that cannot hold two checkpoints (weights and two moments each) and the final model."""
    size = sum(file.stat().st_size for file in Path(weights).glob("*.safetensors")) if weights else 0
    need, free = 7 * size + session.SPARE_BYTES, shutil.disk_usage(folder).free
    if free < need:
        raise ConfigError(
            "outputs", str(folder), f"has {free / 1e9:.1f} GB free and needs {need / 1e9:.1f} GB; choose another folder"
        )
