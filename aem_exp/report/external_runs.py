"""Runs of other frameworks, read from a CSV file, as arms of a comparison."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from aem_exp.config.rules import NAME_PATTERN
from aem_exp.core.errors import ConfigError
from aem_exp.report.analysis import SeedRun, mean
from aem_exp.rundir.archive import Archive

CSV_COLUMNS: Final = ("arm", "seed", "step", "task", "success")
StepScores = dict[int, dict[str, list[float]]]  # step -> task -> success of each episode


def read_csv_arms(file: Path, panel: Sequence[str]) -> dict[str, tuple[SeedRun, ...]]:
    """Read arms from a CSV file with one row per episode. Each seed is a run, which is scored at its last step.

    Args:
        file: has the columns arm, seed, step, task and success (0 to 1).
        panel: ids of the tasks that our runs were scored on. Each run of the file must have exactly these tasks, each
            with the same number of episodes.

    Raises:
        ConfigError: a column or value is invalid, the tasks differ from the panel, or seeds of an arm end at different steps.
    """
    runs: dict[str, dict[int, StepScores]] = {}
    for row in _read_csv_rows(file):
        steps = runs.setdefault(row["arm"], {}).setdefault(int(row["seed"]), {})
        steps.setdefault(int(row["step"]), {}).setdefault(row["task"], []).append(float(row["success"]))
    out: dict[str, tuple[SeedRun, ...]] = {}
    for arm, seeds in runs.items():
        ends = {max(steps) for steps in seeds.values()}
        if len(ends) > 1:
            problem = f"its seeds end at different steps ({', '.join(map(str, sorted(ends)))}); they must end at the same step"
            raise ConfigError("--csv", f"{file}, {arm}", problem)
        out[arm] = tuple(
            SeedRun(seed, _archive_from_csv(file, arm, seed, seeds[seed], panel)) for seed in sorted(seeds)
        )
    return out


def _read_csv_rows(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            rows = list(csv.DictReader(text))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError("--csv", str(file), f"cannot be read: {error}") from error
    if not rows or not set(CSV_COLUMNS) <= set(rows[0]):
        raise ConfigError(
            "--csv", str(file), f"must have the columns {', '.join(CSV_COLUMNS)}, and one row per episode"
        )
    for number, row in enumerate(rows, 2):
        try:
            int(row["seed"]), int(row["step"])
            good = 0 <= float(row["success"]) <= 1 and bool(row["task"]) and NAME_PATTERN.fullmatch(row["arm"])
        except (TypeError, ValueError):
            good = None
        if not good:
            problem = "seed and step must be integers, success a number from 0 to 1, arm a name of letters, digits and . _ + = -"
            raise ConfigError("--csv", f"{file}, line {number}", problem)
    return rows


def _archive_from_csv(file: Path, arm: str, seed: int, steps: StepScores, panel: Sequence[str]) -> Archive:
    last = max(steps)
    played = steps[last]
    where = f"{file}, {arm}, seed {seed}, step {last}"
    if set(played) != set(panel):
        lacks, more = len(set(panel) - set(played)), len(set(played) - set(panel))
        raise ConfigError(
            "--csv", where, f"lacks {lacks} tasks of the panel and has {more} other tasks; the tasks must be the same"
        )
    if len({len(repeats) for repeats in played.values()}) > 1:
        raise ConfigError("--csv", where, "must have the same number of episodes for each task")
    means = [mean([x for scores in steps[step].values() for x in scores]) for step in sorted(steps)]
    return Archive(
        run=f"{file.name}: {arm}, seed {seed}",
        experiment={"seed": seed},
        what="done",
        result={"steps": last},
        tasks={"id": list(panel), "kind": [""] * len(panel), "success": [played[task] for task in panel]},
        curves={"step": [float(step) for step in sorted(steps)], "eval/success": [*means]},
    )
