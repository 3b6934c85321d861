"""Door: one trial of a study, from asking to telling; `python -m aem_exp.sweep NAME` sends these.

A worker (`python -m aem_exp.sweep.trial WORKER_DIR`, a job or a process of its own) asks the storage for one trial, runs it,
reports the metric while it trains, stops early what is not worth its time, and tells the result. A worker that is started again
has its own trial again, and the run goes on from its newest checkpoint.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from aem_exp import config
from aem_exp.cluster import slurm
from aem_exp.config import Experiment
from aem_exp.core import cli, disk
from aem_exp.core.errors import ConfigError, Stop
from aem_exp.core.typed import build
from aem_exp.sweep.study import (
    ASKED,
    TRIAL,
    Say,
    Search,
    Study,
    ask,
    card_of,
    counted,
    fail,
    held,
    opened_study,
    told,
    twin,
    values_of,
)


def main(argv: list[str] | None = None) -> int:
    """Be a worker; the exit code."""
    return cli.answer(lambda: _act(_read(argv), print), lambda: "to go on, ask the sweep again")


def _read(argv: list[str] | None) -> argparse.Namespace:
    what = "Take one trial of a study and run it; python -m aem_exp.sweep sends these."
    parser = cli.Parser("python -m aem_exp.sweep.trial", description=what, allow_abbrev=False)
    parser.add_argument("worker_dir", type=Path)
    return parser.parse_args(argv)


def _act(asked: argparse.Namespace, say: Say) -> int:
    from aem_exp.cluster import distributed
    from aem_exp.core import console
    from aem_exp.jobs import dispatch
    from aem_exp.rundir import lock

    worker = asked.worker_dir.expanduser().absolute()
    cli.reach_frozen(worker)
    console.quiet()
    study = read(worker)
    config.check_here(study.base)
    if not distributed.first():
        return _follow(worker, study)
    dispatch.check_prepared(study.base)  # a trial is not to blame for a tracker that is away
    try:
        with lock.owning(worker):
            return _lead(worker, study, say)
    except lock.Owned as owned:
        say(str(owned))
        return 0


def read(worker: Path) -> Study:
    """The study that a worker works for.

    Raises:
        ConfigError: it is no worker, or the storage is another one here.
    """
    from aem_exp.core.errors import redact

    file = worker / ASKED
    if not file.is_file():
        raise ConfigError("WORKER_DIR", str(worker), f"must be the folder of a worker, with {ASKED}")
    asked, over = json.loads(file.read_text()), worker / "config"
    os.environ.pop("AEM_ROOT", None)  # conf/ is what was frozen with the code
    search = build(Search, asked["search"], "search")
    study = Study(worker.parent, asked["question"], tuple(asked["overrides"]), over if over.is_dir() else None, search)
    if redact(study.uri or "") != asked["storage"]:
        remedy = (
            f"was {asked['storage'] or 'not set'} where the worker was sent from; does the job get the environment?"
        )
        raise ConfigError("AEM_STUDY", redact(study.uri or "") or None, remedy)
    return study


def _lead(worker: Path, study: Study, say: Say) -> int:
    """Take a trial, run it, tell; the first process of a worker does this, and says to the others what they need."""
    opened = opened_study(study)
    number = _taken(worker, study, opened)
    if number is None:
        _tell_others(worker, {"play": False})
        say("nothing is missing")
        return 0
    frozen = opened.get_trials(deepcopy=False)[number]
    if frozen.state.is_finished():  # killed after it had told
        _tell_others(worker, {"play": False})
        say(f"trial {number} is told: {frozen.state.name.lower()}")
        return 0
    trial = held(opened, frozen)
    try:
        experiment = study.experiment(values_of(frozen))
        _record(study, opened, trial, experiment)
    except ConfigError as error:
        fail(opened, frozen, "config", str(error))
        raise
    say(f"trial    {number}: {' '.join(f'{key}={value}' for key, value in values_of(frozen).items())}")
    say(f"run      {config.run_dir(experiment)}")
    return _played(worker, study, opened, trial, experiment, say)


def _taken(worker: Path, study: Study, opened: Any) -> int | None:
    """The number of the worker's own trial: the one that it had, or a new one; None where none is missing."""
    card = card_of(worker)
    if "number" in card:
        return int(card["number"])
    with study.alone():
        trial = ask(study, opened)
        if trial is None:
            return None
        disk.write(worker / TRIAL, json.dumps({"number": trial.number, "id": trial._trial_id}) + "\n")
        return trial.number


def _record(study: Study, opened: Any, trial: Any, experiment: Experiment) -> None:
    """Write down who belongs to the study, where status, MLflow and the report look."""
    from aem_exp.rundir import membership
    from aem_exp.tracking import publish, views

    folder = config.run_dir(experiment)
    with study.alone():
        trial.set_user_attr("run", folder.name)
        rows = [
            {
                "run": t.user_attrs["run"],
                "arm": f"trial {t.number}",
                "group": f"trial {t.number}",
                "seed": experiment.seed,
            }
            for t in counted(opened.get_trials(deepcopy=False))
            if "run" in t.user_attrs
        ]
        membership.write(study.outputs, study.name, study.question, rows)
    folder.mkdir(parents=True, exist_ok=True)
    group = f"trial {trial.number}"
    if membership.label(folder, study.name, group):
        publish.mark(folder, {views.tag(study.name): group})


def _played(worker: Path, study: Study, opened: Any, trial: Any, experiment: Experiment, say: Say) -> int:
    """Run the trial and tell how it ended; interrupted, tell nothing, and make way."""
    from aem_exp.cluster import distributed
    from aem_exp.cluster.signals import Enough, Interrupted
    from aem_exp.run import execution
    from aem_exp.rundir import attempts, lock

    while True:
        if (other := twin(opened, trial)) is not None:
            _tell_others(worker, {"play": False})
            for step, value in other.intermediate_values.items():
                trial.report(value, step)
            return told(opened, trial, other.state.name, other.value, say)
        _tell_others(worker, {"play": True, "values": values_of(opened.get_trials(deepcopy=False)[trial.number])})
        try:
            with _line() as line:
                execution.run(experiment, _Watch(opened, trial, study.search.metric, line))
            return told(opened, trial, "COMPLETE", _value(study, config.run_dir(experiment)), say)
        except Enough:
            return told(opened, trial, "PRUNED", None, say)
        except Interrupted as stop:
            say(f"{stop}; the trial stays open")
            slurm.make_way(stop.signal)
            raise
        except lock.Owned as owned:  # a trial with the same parameters has it
            if distributed.count() > 1:
                raise Stop(str(owned)) from owned
            _wait(say)
        except Exception as error:
            fail(
                opened, opened.get_trials(deepcopy=False)[trial.number], attempts.kind(error), attempts.sentence(error)
            )
            raise


def _follow(worker: Path, study: Study) -> int:
    """What the other processes of a worker do: wait for the first to take a trial, and run it too."""
    from aem_exp.cluster.signals import Enough, Interrupted
    from aem_exp.run import execution

    while (card := card_of(worker)).get("start") != _start():
        time.sleep(0.5)
    if card["play"]:
        try:
            with suppress(Enough):
                execution.run(study.experiment(card["values"]))
        except Interrupted as stop:
            slurm.make_way(stop.signal)
            raise
    return 0


def _tell_others(worker: Path, news: dict[str, Any]) -> None:
    disk.write(worker / TRIAL, json.dumps({**card_of(worker), "start": _start(), **news}) + "\n")


def _start() -> str:
    """Which start of which job this is."""
    return f"{os.environ.get('SLURM_JOB_ID', os.getpid())}/{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def _line() -> Any:
    from aem_exp.core import console

    return console.Progress()


class _Watch:
    """Reports a trial's metric to the storage, and says when enough was seen; what the untrained policy scored is no news."""

    def __init__(self, opened: Any, trial: Any, metric: str, line: Any):
        self.trial, self.metric, self.line = trial, metric, line
        self.reported = set(opened.get_trials(deepcopy=False)[trial.number].intermediate_values)

    def __call__(self, step: int, steps: int, row: dict[str, float]) -> bool:
        self.line(step, steps, row)
        if self.metric not in row:
            self._check(row)
            return False
        if step > 0 and step not in self.reported:
            self.trial.report(row[self.metric], step)
            self.reported.add(step)
        return 0 < step < steps and self.trial.should_prune()  # at the last step nothing is left to save

    def _check(self, row: Mapping[str, float]) -> None:
        """Say at the first evaluation what would otherwise be found at the end."""
        names = [name for name in row if name.startswith("eval/")]
        if names and self.metric.startswith("eval/"):
            raise ConfigError("search.metric", self.metric, names)


def _value(study: Study, folder: Path) -> float:
    """What a finished run gives: the last value of the metric."""
    from aem_exp.rundir import metrics

    name, rows = metrics.sanitised(study.search.metric), metrics.read(folder)
    found = [row[name] for row in rows if name in row]
    if not found:
        raise ConfigError(
            "search.metric", study.search.metric, sorted({key for row in rows for key in row if "/" in key})
        )
    if not math.isfinite(found[-1]):
        raise Stop(f"{study.search.metric} is {found[-1]} at the end", "nan")
    return found[-1]


def _wait(say: Say, seconds: float = 2.0) -> None:
    from aem_exp.cluster.signals import Signals

    say("its parameters are those of a trial that runs; waiting for its end")
    with Signals():
        time.sleep(seconds)


if __name__ == "__main__":
    sys.exit(main())
