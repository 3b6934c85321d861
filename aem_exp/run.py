"""One experiment, on this machine, to a result. The composition root: here the parts meet.

The run dir is the truth, and asking again is safe: what is finished is left alone, what was interrupted continues from its
newest complete checkpoint and ends as if it had never stopped.

Also a door: `python -m aem_exp.run RUN_DIR` runs, by hand, the experiment that a run dir holds.
"""

import argparse
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_exp import METHOD, config, parts, policy, provenance
from aem_exp.cluster import distributed, rendezvous, slurm
from aem_exp.cluster.signals import Interrupted, Signals
from aem_exp.config import ConfigError, Experiment, continuation
from aem_exp.core import cli, console, disk
from aem_exp.core.errors import Stop, shown
from aem_exp.jobs import preflight
from aem_exp.parts import Start, Watch
from aem_exp.rundir import RESULT, checkpoints, membership
from aem_exp.rundir.attempts import attempt
from aem_exp.rundir.lock import Owned, owning
from aem_exp.tracking import store_uri, views

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

log = logging.getLogger("aem_exp")


def run(
    experiment: Experiment,
    watch: Watch | None = None,
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
    config.check_here(experiment)
    folder = folder or config.run_dir(experiment)
    if (folder / RESULT).exists():
        return folder
    console.quiet()
    world = preflight.fitting(experiment)
    policy.device(experiment.launch)
    if experiment.launch.servers:
        rendezvous.read(Path(experiment.launch.servers))
    weights = policy.locate(experiment.model) if experiment.model.path else None
    distributed.meet(cpu=not experiment.launch.gpus_per_node)
    with Signals() as signals:
        if not distributed.first():
            _play(experiment, folder, world, weights, None, signals, None)
            return folder
        store_uri.probe(store_uri.resolve_uri(experiment.tracking, folder.parent))
        disk.check_writable(folder, "outputs")
        with owning(folder):
            if not (folder / RESULT).exists():
                saved = parts.found(folder).step
                with attempt(folder, saved, lambda: parts.found(folder).step, experiment.launch.requeues):
                    _play(experiment, folder, world, weights, watch, signals, begin)
    return folder


def _play(
    experiment: Experiment,
    folder: Path,
    world: Any,
    weights: str | None,
    watch: Watch | None,
    signals: Signals,
    begin: Callable[[], None] | None,
) -> None:
    """A start of the run, in each of its processes, to its result."""
    from aem_exp import show

    start = distributed.shared(lambda: _begin(experiment, folder, weights))
    if begin:
        begin()
    if start.step > 0:
        log.info("going on from step %d", start.step)
    with _tracker(experiment, folder, world.fingerprint, start) as tracker:
        weights = weights or distributed.shared(lambda: policy.made(experiment, world))
        playing = parts.Parts(experiment, folder, world, weights, start, tracker, watch, signals)
        try:
            result = playing.play() | {"resumed": start.changes}
        finally:
            playing.close()
        if playing.episodes:
            for path in show.artifacts(folder):
                tracker.artifact(path)
            disk.write(folder / RESULT, json.dumps(result, indent=1) + "\n")
            playing.episodes.forget()
        distributed.part()
    if tracker.trouble:
        log.warning(tracker.trouble)


def _begin(experiment: Experiment, folder: Path, weights: str | None) -> Start:
    """Make the run dir what this start needs; where it begins."""
    _room(folder, weights)
    for sentence in checkpoints.set_aside(folder):
        log.warning(sentence)
    if experiment.parent_dir and checkpoints.newest(folder) is None:
        checkpoints.adopt(continuation.checkpoint(experiment), folder)
    start = parts.found(folder)
    asked = experiment.launch.trainer.get("fsdp", False)
    if start.checkpoint and (saved := checkpoints.in_pieces(start.checkpoint)) != asked:
        remedy = f"{start.checkpoint} was saved with {shown(saved)}: go on with that"
        raise ConfigError("launch.trainer.fsdp", asked, remedy)
    if (
        start.scored
        and start.checkpoint is None
        and provenance.changes(folder, experiment, weights, distributed.count())
    ):
        (folder / parts.BEFORE).unlink()  # nothing was trained yet: begin anew, with what there is now
        start = parts.found(folder)
    parts.check_record(folder, start)
    changes = provenance.begin(folder, experiment, weights, start.step if start.scored else None, distributed.count())
    disk.write(folder / "experiment.json", json.dumps(config.to_dict(experiment), indent=1) + "\n")
    return replace(start, changes=changes)


def _tracker(experiment: Experiment, folder: Path, fingerprint: str, start: Start) -> "AbstractContextManager[Any]":
    """What the first process logs to; the others log nothing."""
    from aem_exp.tracking import tracker

    if not distributed.first():
        return tracker.Silent()
    commit, uri = provenance.read(folder)["commit"], store_uri.resolve_uri(experiment.tracking, folder.parent)
    return tracker.Tracker.open(
        folder,
        uri,
        experiment=experiment.name,
        run_name=f"{experiment.baseline.name}+{experiment.modulation.name}/s{experiment.seed}/{config.signature(experiment)[:6]}",
        params=config.to_dict(experiment),
        tags=_tags(experiment, fingerprint, commit, start.changes)
        | {views.tag(sweep): group for sweep, group in membership.labels(folder).items()},
        resume_step=start.measured,
        wait=False,
        live=slurm.OURS not in os.environ or store_uri.sqlite_file(uri) is None,
    )


def _tags(experiment: Experiment, fingerprint: str, commit: str | None, resumed: list[str]) -> dict[str, str]:
    return {
        "aem.group": f"{experiment.baseline.name}+{experiment.modulation.name}",
        "aem.seed": str(experiment.seed),
        "aem.signature": config.signature(experiment),
        "aem.arm": config.arm(experiment),
        "aem.env_fingerprint": fingerprint,
        "aem.method": str(METHOD),
        **({"aem.parent": experiment.parent} if experiment.parent else {}),
        **({"aem.resumed": "inexact"} if resumed else {}),
        **({"git.commit": commit} if commit else {}),
    }


def _room(folder: Path, weights: str | None) -> None:
    """Refuse a disk that cannot hold two checkpoints (weights and two moments each) and the final model."""
    size = sum(file.stat().st_size for file in Path(weights).glob("*.safetensors")) if weights else 0
    need, free = 7 * size + parts.SPARE, shutil.disk_usage(folder).free
    if free < need:
        raise ConfigError(
            "outputs", str(folder), f"has {free / 1e9:.1f} GB free and needs {need / 1e9:.1f} GB; choose another folder"
        )


# The door.


def at_terminal(experiment: Experiment, folder: Path, header: Sequence[str]) -> int:
    """Run with a live line, and show what there is at the end; the exit code.

    Args:
        header: printed first, unless the run is refused: then its sentence stands alone.
    """
    console.quiet()
    again = shlex.join([sys.executable, "-m", "aem_exp.run", str(folder)])  # from any folder, whatever the environment
    return cli.answer(
        lambda: _shown(experiment, folder, header), lambda: f"to go on from step {parts.found(folder).step}: {again}"
    )


def _shown(experiment: Experiment, folder: Path, header: Sequence[str]) -> int:
    from aem_exp import show

    def begin() -> None:
        if distributed.first():
            print(*header, sep="\n", flush=True)

    if (folder / RESULT).exists():
        begin()
        for change in _since(experiment, folder):
            print(f"note      since this run, {change}; to run again, move its folder away")
    else:
        try:
            with console.Progress(enabled=distributed.first()) as line:
                run(experiment, line, folder, begin)
        except Owned as owned:
            begin()
            print(owned)
            return 0 if distributed.count() == 1 else 1  # the other processes of this job end with it
        except Stop as stop:
            raise Stop(
                f"{stop}. The run dir has all up to step {parts.found(folder).step}: {folder}", stop.kind
            ) from stop
        except Interrupted as stop:
            if distributed.first():
                step = parts.found(folder).step
                print(f"{stop}; {f'step {step} is saved' if step else 'no step is saved yet'}", flush=True)
            slurm.make_way(stop.signal)
            raise
    if distributed.first():
        show.summary(folder)
    return 0


def _since(experiment: Experiment, folder: Path) -> list[str]:
    """What has changed since a finished run ran: its result stands for what it was."""
    try:
        weights = policy.locate(experiment.model) if experiment.model.path else None
    except ConfigError:  # moved away since
        weights = None
    return provenance.changes(folder, experiment, weights)


def main() -> int:
    return cli.answer(lambda: _act(_read()))


def _read() -> argparse.Namespace:
    what = "Run, or go on with, what a run dir holds."
    parser = cli.Parser("python -m aem_exp.run", description=what, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--inexact", action="store_true", help="go on though code, libraries or machine changed")
    parser.add_argument("--trust", action="store_true", help="run somebody else's config, which can call any function")
    return parser.parse_args()


def _act(asked: argparse.Namespace) -> int:
    cli.reach_frozen(asked.run_dir, asked.trust)
    experiment, folder = config.read(asked.run_dir, asked.trust), asked.run_dir.expanduser().absolute()
    if asked.inexact:
        experiment = replace(experiment, resume="inexact")
    if distributed.first() and not (folder / RESULT).exists():
        disk.check_writable(folder, "RUN_DIR")
    return at_terminal(experiment, folder, [f"run       {folder}"])


if __name__ == "__main__":
    sys.exit(main())
