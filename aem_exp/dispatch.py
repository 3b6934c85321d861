"""From experiments to jobs: what was asked for is written down, its code frozen beside it, and sent; what is there already,
or on its way, is not sent again.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from aem_exp import attempts, config, disk, door, launch, preflight, provenance
from aem_exp.config import Experiment
from aem_exp.interrupt import Signals
from aem_exp.ownership import owner
from aem_exp.values import ConfigError, Elsewhere

RESULT = "result.json"
LOG = "local.log"  # of a process that is started here


def send(experiments: Sequence[Experiment], name: str, logs: Path, at_once: int = 0) -> list[tuple[Path, str]]:
    """Submit experiments of one size as one array; the run dirs and their jobs.

    Raises:
        ConfigError: something is missing that a job could not fetch, or SLURM refuses; nothing was submitted.
    """
    launch.check()
    check_worlds(experiments)
    for experiment in experiments:
        check_prepared(experiment)
    folders = _written(experiments)
    ids = launch.submit(folders, experiments[0].launch, name, logs, at_once)
    return list(zip(folders, ids, strict=True))


def run_here(experiments: Sequence[Experiment], at_once: int, say: Callable[[str], None]) -> int:
    """Run experiments on this machine, with the code as it is now; how many failed. See `here`."""
    for experiment in experiments:
        config.check_here(experiment)

    def failed(folder: Path, code: int, last: str) -> bool:
        done = (folder / RESULT).exists()
        if not done:
            say(f"failed: {folder.name}: {last}")
        return not done

    return here("aem_exp.run", _written(experiments), at_once, say, failed)


def here(
    room: str,
    folders: Sequence[Path],
    at_once: int,
    say: Callable[[str], None],
    failed: Callable[[Path, int, str], bool],
) -> int:
    """`python -m ROOM FOLDER` for each folder, in processes of their own, so many at a time; how many failed.

    Stopped, it asks those that run to save and end, and waits for them. `failed` is given the folder, the exit code and the
    last line that was printed; it says what is to be said of that.
    """
    waiting, live, failures = list(folders), dict[subprocess.Popen[bytes], Path](), 0
    try:
        with Signals():  # TERM ends as Ctrl-C does
            while waiting or live:
                while waiting and len(live) < at_once:
                    folder = waiting.pop(0)
                    say(f"[{len(folders) - len(waiting)}/{len(folders)}] {folder.name}; log in {folder / LOG}")
                    live[_started(room, folder)] = folder
                time.sleep(0.2)
                for process in [process for process in live if process.poll() is not None]:
                    folder = live.pop(process)
                    failures += failed(folder, process.returncode, _last_line(folder / LOG))
    finally:
        for process in live:
            process.terminate()
        for process in live:
            process.wait()
    return failures


def _started(room: str, folder: Path) -> "subprocess.Popen[bytes]":
    """A process with the code that lies in its folder; Ctrl-C is for its parent."""
    path = os.pathsep.join(filter(None, (str(folder / provenance.CODE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120"}
    environment.setdefault("PYTHONSAFEPATH", door.IN_A_JOB)  # not this folder before the code
    command = [sys.executable, "-u", "-m", room, str(folder)]
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _last_line(log: Path) -> str:
    return next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "no output")


def check_worlds(experiments: Sequence[Experiment]) -> None:
    """Refuse worlds that a job could not open, and functions that would fail in it; what many experiments share is tried once.

    Raises:
        ConfigError: with the command that helps.
    """
    from aem_exp import smoke, worlds

    for experiment in {repr((e.baseline, e.modulation.lam)): e for e in experiments}.values():
        smoke.check_parts(experiment)
    asked = {
        repr((e.env.make, e.model.make, e.evaluation, e.trainer["tasks_per_step"], e.trainer["oversample"])): e
        for e in experiments
    }
    for experiment in asked.values():
        try:
            worlds.fitting(experiment)
        except Elsewhere:
            continue
        except ConfigError:
            raise
        except Exception as error:  # a world's own, of any kind
            told = f"its world cannot be opened: {attempts.sentence(error)}"
            raise ConfigError("env.make", experiment.env.make["_target_"], told) from error


def check_prepared(experiment: Experiment) -> None:
    """Refuse what a job would refuse, or would have to fetch.

    Raises:
        ConfigError: with the command that helps.
    """
    from aem_exp import policy, stores

    if experiment.model.path:
        policy.locate(experiment.model)
        preflight.check(experiment)
        preflight.check_disk(experiment)
    folder = config.run_dir(experiment)
    stores.probe(stores.resolve_uri(experiment.tracking, folder.parent))
    disk.check_writable(folder.parent, "outputs")


def on_its_way(folder: Path) -> str | None:
    """Who has this run, or will have it: a live process, or a job in the queue."""
    if by := owner(folder):
        return by
    job = launch.card(folder).get("job")
    known = launch.jobs([job]).get(job) if job else None
    return f"job {known.id}, {known.state.lower()}" if known and known.live else None


def _written(experiments: Sequence[Experiment]) -> list[Path]:
    """The run dirs, with what the jobs need: the experiment, and the code that runs it."""
    runs = {config.run_dir(experiment): experiment for experiment in experiments}
    provenance.freeze(runs)
    for folder, experiment in runs.items():
        disk.write(folder / "experiment.json", json.dumps(config.to_dict(experiment), indent=1) + "\n")
    return list(runs)
