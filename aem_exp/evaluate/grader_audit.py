"""`python -m aem_exp.evaluate env=NAME --audit`: which forgeries does the grader of an environment believe?"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from aem_exp import config
from aem_exp.core.console import make_console, make_table
from aem_exp.core.errors import ConfigError
from aem_exp.envs import audit, opening
from aem_exp.envs.audit import NO_CHANGE, SOLUTION, Trial

if TYPE_CHECKING:
    from aem_exp.evaluate.display import ProgressLine

HEADINGS = ("class", "episodes", "resolved", "official rule", "expected")


def audit_grader(arguments: argparse.Namespace, line: "ProgressLine") -> int:
    """Play all forgeries of some tasks and print a table. Return 0 if all results are as expected, else 1.

    Raises:
        ConfigError: the environment has no forgeries, or a setting is wrong.
    """
    experiment = config.load(arguments.overrides, arguments.config_dir)
    config.check_machine(experiment)
    name = experiment.env.name
    world = opening.open_world(experiment)
    auditable = audit.check_auditable(world, name)
    panel = arguments.panel or experiment.evaluation.final
    if panel not in world.splits:
        raise ConfigError("--panel", panel, choices=world.splits)
    tasks = world.tasks(panel)[: arguments.tasks or 1]
    total = sum(len(auditable.forgeries(task)) for task in tasks)
    played: list[Trial] = []
    line.start_count("audit", total, "episodes")

    def show(trial: Trial) -> None:
        played.append(trial)
        line.show_count(len(played))

    audit.play_forgeries(auditable, tasks, lambda _: True, show)
    console = make_console()
    wrong = [trial for trial in played if not trial.is_as_expected]
    if arguments.json:
        console.print_json(json.dumps([asdict(trial) | {"as_expected": trial.is_as_expected} for trial in played]))
        return int(bool(wrong))
    count = "1 task" if len(tasks) == 1 else f"{len(tasks)} tasks"
    console.print(f"[bold]audit[/bold]  the grader of {name}: {count} of the panel {panel}", soft_wrap=True)
    console.print(make_table(HEADINGS, list(_rows(played)), left=("class", "expected")))
    for trial in wrong:
        result = "resolved" if trial.succeeded else "not resolved"
        text = f"{result}: {trial.forgery.kind}: {trial.forgery.name} (task {trial.task}){_because(trial)}"
        console.print(text, soft_wrap=True, markup=False)
    if not wrong:
        console.print("all results are as expected")
    return int(bool(wrong))


def _because(trial: Trial) -> str:
    return "" if trial.succeeded else f": {trial.reason}"


def _rows(trials: Sequence[Trial]) -> Iterator[tuple[str, ...]]:
    """For each class: its episodes, how many succeeded, how many the benchmark's own rule resolves, and what is expected."""
    for kind in dict.fromkeys(trial.forgery.kind for trial in trials):
        of_kind = [trial for trial in trials if trial.forgery.kind == kind]
        official = [trial.metrics["end_resolved"] for trial in of_kind if "end_resolved" in trial.metrics]
        expected = "all" if kind == SOLUTION else "none"
        believed = sum(trial.succeeded for trial in of_kind)
        yield kind, str(len(of_kind)), str(believed), f"{sum(official):.0f}" if official else "-", expected
    forged = [trial for trial in trials if trial.forgery.kind not in (SOLUTION, NO_CHANGE)]
    by_official_rule = sum(trial.metrics.get("end_resolved", 0.0) for trial in forged)
    believed = sum(trial.succeeded for trial in forged)
    yield "all forgeries", str(len(forged)), str(believed), f"{by_official_rule:.0f}", "none"
