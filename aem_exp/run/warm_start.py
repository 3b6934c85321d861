"""The warm start at the start of a run: made once by a process of its own, which frees its memory when it ends.

The process of a run may be one of many that share a process group. The warm start is trained by one process, so it gets an
environment without ranks. It ends with the run: if the run stops, the next start makes the warm start again.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from aem_exp import config, policy, warm_start
from aem_exp.cluster import distributed
from aem_exp.config import ConfigError, Experiment
from aem_exp.core import cli, console, disk
from aem_exp.core.errors import RunError
from aem_exp.envs import World, opening
from aem_exp.run.resume import ResumePoint
from aem_exp.rundir import WARM_START
from aem_exp.warm_start import WarmStarted

log = logging.getLogger("aem_exp")
LAUNCHER_PREFIXES: Final = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "GROUP_", "ROLE_")
CHILD_PROGRAM: Final = "import sys; from aem_exp.run.warm_start import main; sys.exit(main())"
WAIT_SECONDS: Final = 30.0  # between two signs of life to the other ranks, whose process group has a time limit
GRACE_SECONDS: Final = 10.0


def prepare_weights(
    experiment: Experiment, folder: Path, world: World, weights: str, start: ResumePoint
) -> WarmStarted:
    """Return the initial weights of a run after its warm start. Every process of the run calls this.

    Args:
        weights: folder of the weights of the model.

    Raises:
        ConfigError: the warm start is not possible, or its weights are others than at the first start of the run.
        RunError: the warm start failed.
    """
    if experiment.warm_start.method is None:
        return WarmStarted(weights)
    if distributed.broadcast_from_main(lambda: warm_start.cached(experiment, world, weights)) is None:
        _make_in_child(folder)
    started = distributed.broadcast_from_main(lambda: _read_cached(experiment, folder, world, weights, start))
    return started


def _read_cached(experiment: Experiment, folder: Path, world: World, weights: str, start: ResumePoint) -> WarmStarted:
    started = warm_start.cached(experiment, world, weights)
    if started is None or started.facts is None:
        raise RunError("the warm start has ended without a result")
    _check_record(experiment, folder / WARM_START, started.facts, start)
    return started


def _check_record(experiment: Experiment, file: Path, facts: dict[str, Any], start: ResumePoint) -> None:
    """Record which weights the run starts from; a resumed run must have the same, because an adapter is relative to them."""
    recorded = disk.read_json(file, "weights")["weights"] if file.exists() else None
    if (start.is_scored or start.checkpoint) and recorded not in (None, facts["weights"]):
        change = f"weights of the warm start {recorded}, now {facts['weights']}"
        if experiment.resume == "exact":
            problem = f"the run would continue under other conditions ({change})"
            raise ConfigError("resume", "exact", f"{problem}; resume=inexact continues anyway")
        log.warning("the run continues under other conditions: %s", change)
    disk.write_atomically(file, json.dumps(facts, indent=1) + "\n")


def _make_in_child(folder: Path) -> None:
    """Make the warm start of a run directory in a child process of the first rank; all ranks wait."""
    if not distributed.is_main_process():
        while distributed.broadcast_from_main(lambda: True):
            pass
        return
    with _child_process(folder) as wait:
        while distributed.broadcast_from_main(wait):
            pass


@contextmanager
def _child_process(folder: Path) -> Iterator[Callable[[], bool]]:
    """Start the child; yield a function that waits a little and returns whether the child is still working."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in distributed.RANK_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    paths = [str(disk.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD_PROGRAM, str(folder)],
        stdin=subprocess.PIPE,  # the child ends when this closes, also if this process is killed
        stdout=subprocess.PIPE,
        text=True,
        env=variables,
        start_new_session=True,  # a Ctrl-C reaches only this process, which then stops the child
    )
    assert child.stdout is not None
    errors: list[Exception] = []
    reader = threading.Thread(target=_forward_messages, args=(child.stdout, errors), daemon=True)
    reader.start()

    def wait() -> bool:
        with suppress(subprocess.TimeoutExpired):
            child.wait(WAIT_SECONDS)
        if child.poll() is None:
            return True
        reader.join(GRACE_SECONDS)
        if errors:
            raise errors[0]
        if child.returncode:
            raise RunError(f"the process of the warm start ended with code {child.returncode}")
        return False

    try:
        yield wait
    finally:
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_SECONDS)
            child.kill()
            child.wait()


def _forward_messages(stream: IO[str], errors: list[Exception]) -> None:
    """Log the progress of the child, and collect its error."""
    for line in stream:
        try:
            message = json.loads(line)
        except ValueError:  # printed by a library
            continue
        match message:
            case {"report": str(text)}:
                log.info(text)
            case {"field": str(field), "value": value, "remedy": str(remedy)}:
                errors.append(ConfigError(field, value, remedy))
            case {"error": str(sentence), "kind": str(kind)}:
                errors.append(RunError(sentence, kind))


# In the child.


def main(argv: list[str] | None = None) -> int:
    """Make the warm start of the run directory that the only argument names. Runs start this; users call `prepare`."""
    (folder,) = sys.argv[1:] if argv is None else argv
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes the unfinished folder
    try:
        cli.add_frozen_modules(Path(folder))
        console.silence_libraries()
        experiment = config.read(folder)
        world, model = opening.open_world(experiment), experiment.model
        weights = policy.locate(model) if model.path else policy.make_cached(experiment, world)
        warm_start.make_cached(experiment, world, weights, lambda line: _send({"report": line}))
    except ConfigError as error:
        _send({"field": error.field, "value": str(error.value), "remedy": error.remedy})
        return 2
    except RunError as error:
        _send({"error": str(error), "kind": error.kind})
        return 1
    return 0


def _send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    sys.stdin.read()  # returns when the parent has ended
    os._exit(1)
