"""Sections that explain the scores: curves, breakdowns by task and episode, sanity checks, published numbers."""

import csv
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from aem_exp.report import figures
from aem_exp.report.analysis import SCORE, SUCCESS, ArmCell, mean
from aem_exp.report.render import Block, Figure, Section, Table, Text
from aem_exp.report.sections.formats import drop_empty_column, format_points
from aem_exp.report.sections.step_sizes import step_size_table
from aem_exp.rundir.archive import Archive
from aem_exp.stats import scores

PUBLISHED_CAVEAT: Final = (
    "published with other code, hardware and panels; for orientation only, not part of any comparison"
)
PUBLISHED_KEYS: Final = ("env", "model", "baseline", "modulation")
DoneCell = tuple[ArmCell, Sequence[Archive]]  # a cell, and its finished runs


def curves_section(cells: Sequence[ArmCell]) -> Section:
    band = (
        f"Line: median over the runs that reached the step. Band: middle half of the runs (all runs, if fewer than "
        f"{figures.MIN_RUNS_FOR_QUARTILES}). Not smoothed; every number is in tables/curves.csv. "
    )
    note = band + "Orange: the arm. Blue, dashed: the first arm of the same point."
    blocks: list[Block] = [
        Figure("Success and response entropy", picture, note) for picture in figures.curve_plots(cells)
    ]
    if sum(bool(cell.done) for cell in cells) > figures.MAX_CELLS:
        blocks.append(Text(f"The figure shows the first {figures.MAX_CELLS} cells; tables/curves.csv has all cells."))
    blocks += [
        Figure("Other measurements", picture, note) for picture in figures.curve_plots(cells, figures.MORE_CURVES)
    ]
    return Section("Curves", blocks or [Text("No run has logged a curve yet.")])


def breakdown_section(cells: Sequence[ArmCell]) -> Section:
    done = [(cell, cell.done) for cell in cells if cell.done]
    tables = (_kind_table(done), _repeats_table(done), _endings_table(done), _habits_table(done), step_size_table(done))
    return Section("Breakdown", [table for table in tables if table is not None])


def _kind_table(done: Sequence[DoneCell]) -> Table | None:
    kinds = sorted({kind for _, runs in done for a in runs for kind in a.tasks["kind"] if kind})
    if len(kinds) < 2:
        return None
    rows = [(c.point, c.arm, *(format_points(_success_of_kind(runs, kind)) for kind in kinds)) for c, runs in done]
    sizes = Counter(done[0][1][0].tasks["kind"])
    note = f"Tasks of each kind: {', '.join(f'{kind} {count}' for kind, count in sizes.items())}."
    return drop_empty_column(Table("Success by kind of task", ("point", "arm", *kinds), rows, note))


def _repeats_table(done: Sequence[DoneCell]) -> Table | None:
    repeats = min((len(a.tasks["success"][0]) for _, runs in done for a in runs), default=1)
    if repeats < 2:
        return None
    heads = [f"{name}{k}" for name in ("pass@", "pass^") for k in range(1, repeats + 1)]
    rows = [(c.point, c.arm, *map(format_points, _pass_rates(runs, repeats))) for c, runs in done]
    note = "pass@k: at least one of k episodes of a task succeeds; pass^k: all of them do (unbiased, mean over tasks and runs)."
    return drop_empty_column(Table("Success over repeats", ("point", "arm", *heads), rows, note))


def _endings_table(done: Sequence[DoneCell]) -> Table | None:
    endings = sorted({ending for _, runs in done for a in runs for ending in a.endings})
    if not endings:
        return None
    rows = [(c.point, c.arm, *(format_points(_ending_share(runs, ending)) for ending in endings)) for c, runs in done]
    return drop_empty_column(Table("How episodes ended (%)", ("point", "arm", *endings), rows))


def _habits_table(done: Sequence[DoneCell]) -> Table:
    habits = sorted(
        {name for _, runs in done for a in runs for name in ((a.result.get("final") or {}).get("habits") or {})}
    )
    columns = {
        "turns": "turns",
        "tokens": "tokens",
        "invalid_share": "invalid turns",
        "response_entropy": "entropy (nats)",
    }
    rows = [(c.point, c.arm, *(_format_final_mean(runs, name) for name in (*columns, *habits))) for c, runs in done]
    note = "Means over runs on the final panel. Turns and tokens are per episode."
    return drop_empty_column(Table("Episodes", ("point", "arm", *columns.values(), *habits), rows, note))


def _success_of_kind(runs: Sequence[Archive], kind: str) -> float:
    return mean([s for a in runs for s, k in zip(a.success, a.tasks["kind"], strict=True) if k == kind])


def _pass_rates(runs: Sequence[Archive], repeats: int) -> list[float]:
    wins = [(len(r), sum(x >= 1 for x in r)) for a in runs for r in a.tasks["success"]]
    how = (scores.pass_at, scores.pass_hat)
    return [mean([f(n, c, k) for n, c in wins]) for f in how for k in range(1, repeats + 1)]


def _ending_share(runs: Sequence[Archive], ending: str) -> float:
    episodes = sum(sum(a.endings.values()) for a in runs)
    return sum(a.endings.get(ending, 0) for a in runs) / episodes if episodes else math.nan


def _final_score(archive: Archive) -> Mapping[str, Any]:
    """The score of a run on the final panel, with the metrics of its environment."""
    final = archive.result.get("final") or {}
    return (final.get("habits") or {}) | final


def _format_final_mean(runs: Sequence[Archive], name: str) -> str:
    values = [value for a in runs if (value := _final_score(a).get(name)) is not None]
    return f"{mean(values):.3g}" if values else "-"


def sanity_section(cells: Sequence[ArmCell]) -> Section:
    done = [archive for cell in cells for archive in cell.done]
    rows = [*_reference_rows(done), *_untrained_rows(done), *_control_rows(cells)]
    note = "lambda = 0 equals no modulation bit for bit; a test verifies this."
    blocks: list[Block] = [Table("Reference policies and controls", ("row", "panel", "success", "is"), rows, note)]
    if done and not any("random" in a.players for a in done):
        command = f"python -m aem_exp.evaluate {shlex.quote(f'outputs/{done[0].run}')} --only untrained --only random"
        blocks += [
            Text("To add the untrained and a random policy on the final panel to this table, run:"),
            Text(command, code=True),
        ]
    return Section("Sanity checks", blocks)


def _reference_rows(done: Sequence[Archive]) -> Iterator[tuple[str, ...]]:
    """Scores of other policies on the final panel, from `aem_exp.evaluate`."""
    for name in dict.fromkeys(name for a in done for name in a.players):
        played = {(a.players[name]["success"], a.players[name]["repeats"]) for a in done if name in a.players}
        for success, repeats in sorted(played):
            yield name, "final", format_points(success), f"{repeats} episodes per task, one policy"


def _untrained_rows(done: Sequence[Archive]) -> Iterator[tuple[str, ...]]:
    """The policies before the first step."""
    before = {
        (a.result["before"]["panel"], round(a.result["before"]["success"], 6)) for a in done if a.result.get("before")
    }
    for panel, success in sorted(before):
        yield "before the first step", panel, format_points(success), "the initial policy of the runs"


def _control_rows(cells: Sequence[ArmCell]) -> Iterator[tuple[str, ...]]:
    """Scores of the arms that are controls."""
    for cell in cells:
        if cell.done and (control := _describe_control(cell.done[0].experiment.get("modulation") or {})):
            yield f"{cell.arm} {cell.point}".strip(), "final", format_points(mean(cell.scores(SUCCESS))), control


def _describe_control(modulation: Mapping[str, Any]) -> str:
    """A description of the control that an arm is; "" if it is none."""
    lam = modulation.get("lam")
    if match := modulation.get("match"):
        return f"control: no modulation, in updates as large as with it ({match})"
    if modulation.get("shuffle"):
        return "placebo: the same coefficients, permuted at random"
    constant = isinstance(lam, Mapping) and lam.get("value") == 0
    return "no modulation" if modulation and (lam is None or constant) else ""


def published_section(cells: Sequence[ArmCell], published: Path | None) -> Section:
    title, known = "Published numbers", _read_published(published)
    rows = [row for cell in cells for row in _published_rows(cell, known)]
    if not rows:
        return Section(title, [Text("No published numbers are known for these environments, models and arms.")])
    columns = ("arm", "measure", "ours", "published", "source")
    return Section(title, [Table("Our and published numbers", columns, rows, f"{PUBLISHED_CAVEAT.capitalize()}.")])


def _published_rows(cell: ArmCell, known: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, ...]]:
    """Published numbers for the environment, model and method of a cell."""
    if not (done := cell.done) or not done[0].experiment.get("env"):
        return
    names = tuple(done[0].experiment[key]["name"] for key in PUBLISHED_KEYS)
    for row in known:
        for measure in (SUCCESS, SCORE) if names == tuple(row[key] for key in PUBLISHED_KEYS) else ():
            if row[measure]:
                arm = f"{cell.arm} {cell.point}".strip()
                yield arm, measure, format_points(mean(cell.scores(measure))), row[measure], row["source"]


def _read_published(file: Path | None) -> list[dict[str, str]]:
    if file is None or not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))
