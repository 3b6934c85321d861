"""Command `python -m aem_exp.report SWEEP`: compare the arms of a sweep in one HTML page, Markdown and CSV tables, from
run directories or archives.

It does not change any run, and it lists the missing runs.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from aem_exp.core import cli
from aem_exp.core.disk import nonfinite_to_none
from aem_exp.core.errors import ConfigError
from aem_exp.rundir import EXPERIMENT

if TYPE_CHECKING:
    from aem_exp.cluster.run_state import RunState
    from aem_exp.report.analysis import ArmCell, Difference
    from aem_exp.report.contrasts import ContrastResult
    from aem_exp.report.sections import SweepDescription
    from aem_exp.rundir.archive import Archive
    from aem_exp.sweep.cells import Sweep

ABOUT = """\
Compare the arms of a sweep: differences with intervals and verdicts, curves, breakdowns, and the provenance of each number.

  python -m aem_exp.report household_quick                    from run directories; lists the missing runs
  python -m aem_exp.report household_grpo --from FOLDER       from archives of runs (see --archive)
  python -m aem_exp.report household_quick --archive FOLDER   also write an archive of each run (some kilobytes)
  python -m aem_exp.report alfworld --csv theirs.csv          include other frameworks: arm, seed, step, task, success
"""
RESULTS = "results"  # folder next to the sweep files, with one folder of archives per sweep
PUBLISHED = "published.csv"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    again = shlex.join(["python", "-m", "aem_exp.report", *argv])
    return cli.run_cli(lambda: _run_command(_parse_arguments(argv)), lambda: f"to continue: {again}")


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("python -m aem_exp.report", description=ABOUT, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("sweep", help="a sweep file, or a name in sweeps/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the overrides that the sweep was run with")
    parser.add_argument(
        "--from", dest="archives", type=Path, metavar="FOLDER", help="read archives of runs without a run directory"
    )
    parser.add_argument("--archive", type=Path, metavar="FOLDER", help="write an archive of each finished run")
    parser.add_argument(
        "--csv", type=Path, action="append", default=[], help="runs of other frameworks, as additional arms"
    )
    parser.add_argument(
        "--across-revisions", action="store_true", help="also compare runs of different method revisions"
    )
    parser.add_argument("--out", type=Path, help="folder of the report (default: OUTPUTS/reports/SWEEP)")
    parser.add_argument("--json", action="store_true", help="print only the differences, as JSON")
    parser.add_argument("--no-tracking", action="store_true", help="do not log the report to MLflow")
    parser.add_argument("--config-dir", help="your own configuration folder, searched before conf/")
    return parser.parse_intermixed_args(argv)


def _run_command(arguments: argparse.Namespace) -> int:
    from aem_exp.sweep import question

    cli.add_user_modules(arguments.config_dir)
    sweep = question.load(arguments.sweep, arguments.overrides, arguments.config_dir)
    if sweep.search is not None:
        remedy = (
            f"is a study, which has trials instead of arms; see python -m aem_exp.sweep {shlex.quote(arguments.sweep)}"
        )
        raise ConfigError("sweep", sweep.name, remedy)
    from aem_exp.report import analysis, contrasts, render, sections

    archives, source = _load_archives(sweep, arguments.archives)
    cells = [*build_cells(sweep, archives), *_load_external_arms(sweep, archives, arguments.csv)]
    if not any(cell.done for cell in cells):
        remedy = f"none of its {len(sweep.cells)} runs is finished; "
        remedy += f"run python -m aem_exp.sweep {shlex.quote(arguments.sweep)} --local"
        raise ConfigError("sweep", sweep.name, remedy)
    _check_revisions(sweep, cells, arguments.across_revisions)
    written = _write_archives(archives.values(), arguments.archive) if arguments.archive else []
    design = _describe_sweep(sweep, cells, source)
    differences = analysis.differences(cells, design.families)
    computed = contrasts.compute_contrasts(cells, sweep.contrasts)
    if arguments.json:
        listed = [asdict(c) | {"verdict": c.verdict} for c in computed]
        listed += [asdict(d) | {"verdict": d.verdict} for d in differences]
        print(json.dumps(nonfinite_to_none(listed), indent=1))
        return 0
    published = sweep.file.parent / PUBLISHED if sweep.file else None
    report = sections.build_report(design, cells, differences, published, computed)
    folder = (arguments.out or sweep.cells[0].folder.parent / "reports" / sweep.name).expanduser().absolute()
    files = render.write(report, folder, analysis.curve_rows(cells))
    _show_summary(differences, cells, computed)
    tracked = _log_to_mlflow(sweep, folder, files, arguments)
    for heading, text in [("from", source), *written, ("report", str(folder)), *tracked, ("open", files[0].as_uri())]:
        print(f"{heading:<7} {text}")
    return 0


def _load_archives(sweep: "Sweep", given: Path | None) -> "tuple[dict[Path, Archive], str]":
    """Read each run from its run directory or an archive; also describe the sources.

    The archives next to the sweep file are used only if no run directory of the sweep exists, so that the two never mix.
    """
    from aem_exp.cluster import run_state
    from aem_exp.rundir import archive

    here = [cell.folder for cell in sweep.cells if (cell.folder / EXPERIMENT).is_file()]
    archives = {folder: _read_run_dir(folder, how) for folder, how in run_state.read(here).items()}
    beside = sweep.file.parent / RESULTS / sweep.name if sweep.file else None
    place = given or (beside if beside and beside.is_dir() and not here else None)
    unfinished = [c.folder for c in sweep.cells if not (c.folder in archives and archives[c.folder].done)]
    taken = archive.read_folder(place, unfinished) if place else {}
    places = {f"run directories in {sweep.cells[0].folder.parent}": len(archives), f"archives in {place}": len(taken)}
    return archives | taken, ", ".join(f"{count} {source}" for source, count in places.items() if count)


def _read_run_dir(folder: Path, how: "RunState") -> "Archive":
    """The archive of a run directory. An unreadable directory counts as an unfinished run; the other runs are compared."""
    from aem_exp.rundir import archive, attempts

    try:
        return archive.from_run_dir(folder, how.what, (how.kind, how.sentence))
    except Exception as error:  # of any type: files may be missing, truncated, or from another version
        why = f"its run directory cannot be read: {attempts.describe_error(error)}"
        return archive.Archive(folder.name, {}, "unreadable", ("", why))


def build_cells(sweep: "Sweep", archives: "dict[Path, Archive]") -> "list[ArmCell]":
    """The cells of the sweep, with the reference arm first at each point."""
    from aem_exp.report.analysis import ArmCell, SeedRun

    runs: dict[tuple[str, str], list[SeedRun]] = {}
    where = ["--config-dir", str(sweep.config_dir)] if sweep.config_dir else []
    for cell in sweep.cells:
        command = shlex.join(["python", "-m", "aem_exp", *cell.overrides, *where])
        run = SeedRun(cell.seed, archives.get(cell.folder), command)
        for label in cell.labels:
            point = label.group.removeprefix(label.arm).removeprefix("/")
            runs.setdefault((label.arm, point), []).append(run)
    return [ArmCell(arm, point, tuple(mine)) for (arm, point), mine in runs.items()]


def _load_external_arms(sweep: "Sweep", archives: "dict[Path, Archive]", files: Sequence[Path]) -> "list[ArmCell]":
    """Arms of other frameworks, from CSV files."""
    from aem_exp.report.analysis import ArmCell
    from aem_exp.report.external_runs import read_csv_arms

    if files and len(sweep.points) > 1:
        raise ConfigError(
            "--csv", str(files[0]), f"{sweep.name} has {len(sweep.points)} points; select one of them with an override"
        )
    out: list[ArmCell] = []
    panel = next((a.tasks["id"] for a in archives.values() if a.done), [])
    for file in files:
        for arm, runs in read_csv_arms(file, panel).items():
            if arm in sweep.arms or arm in [cell.arm for cell in out]:
                raise ConfigError("--csv", f"{file}, {arm}", "another arm has this name; rename it in the file")
            out.append(ArmCell(arm, "", runs))
    return out


def _check_revisions(sweep: "Sweep", cells: "Sequence[ArmCell]", across: bool) -> None:
    """Check that all runs have the same method revision, unless `across` allows a comparison.

    Raises:
        ConfigError: the sweep has runs of several revisions.
    """
    from aem_exp.report import analysis

    revisions = analysis.runs_by_revision(archive for cell in cells for archive in cell.done)
    if len(revisions) > 1 and not across:
        counts = [
            f"{len(runs)} of method revision {number} ({_shorten_list(runs)})" for number, runs in revisions.items()
        ]
        remedy = "the same experiment trains differently in each revision; run the older runs again, or add --across-revisions"
        raise ConfigError("sweep", sweep.name, f"has runs {' and '.join(counts)}; {remedy}")


def _shorten_list(runs: Sequence[str], most: int = 3) -> str:
    return ", ".join(runs[:most]) + (f", and {len(runs) - most} more" if len(runs) > most else "")


def _write_archives(archives: "Iterable[Archive]", folder: Path) -> list[tuple[str, str]]:
    from aem_exp.rundir import archive

    done = [each for each in archives if each.done]
    size = sum(archive.write(each, folder).stat().st_size for each in done)
    return [("archive", f"{len(done)} archives, {size / 1000:,.0f} kB in total, in {folder}")]


def _describe_sweep(sweep: "Sweep", cells: "Sequence[ArmCell]", source: str) -> "SweepDescription":
    from aem_exp.report.sections import SweepDescription

    base = [word for word in sweep.cells[0].overrides if not word.startswith(("seed=", "launch="))]
    common = [word for word in base if all(word in cell.overrides for cell in sweep.cells)]
    arms = {arm: " ".join(words) for arm, words in sweep.arms.items()}
    arms |= {cell.arm: "another framework (CSV)" for cell in cells if cell.arm not in arms}
    first, *_ = sweep.arms
    others = [(arm, first) for arm in arms if arm not in sweep.arms]
    file = str(sweep.file) if sweep.file else sweep.name
    return SweepDescription(
        sweep.name, sweep.question, file, source, shlex.join(common), arms, (sweep.pairs, others), sweep.seeds
    )


def _show_summary(
    differences: "Sequence[Difference]", cells: "Sequence[ArmCell]", computed: "Sequence[ContrastResult]"
) -> None:
    """Print scores and verdicts to the terminal."""
    from aem_exp.core.console import make_console, make_table
    from aem_exp.report import analysis

    console = make_console()
    console.print(make_table(("arm", "runs", "success"), _score_rows(cells), left=("arm", "runs")))
    console.print()
    if computed:
        headings = ("contrast in success", "points", "95 %", "verdict")
        console.print(make_table(headings, _contrast_rows(computed), left=("contrast in success", "95 %", "verdict")))
        console.print()
    headings = ("difference in success", "points", "simultaneous 95 %", "verdict")
    left = [heading for heading in headings if heading != "points"]
    console.print(make_table(headings, _verdict_rows(differences), left=left))
    if problems := analysis.list_problems(cells):
        console.print(f"{len(problems)} runs are missing, failed or diverged; the report lists them", style="yellow")
    console.print()


def _score_rows(cells: "Sequence[ArmCell]") -> list[tuple[str, ...]]:
    from aem_exp.report import analysis, sections

    scores = [(cell, cell.scores(analysis.SUCCESS)) for cell in cells]
    return [
        (
            f"{cell.arm} {cell.point}".strip(),
            f"{len(values)} of {len(cell.runs)}",
            sections.format_points(analysis.mean(values)),
        )
        for cell, values in scores
    ]


def _verdict_rows(differences: "Sequence[Difference]") -> list[tuple[str, ...]]:
    from aem_exp.report import sections

    return [
        (
            f"{d.arm} against {d.reference} {d.point}".strip(),
            sections.format_points(d.interval.difference, True) if d.interval else "-",
            sections.format_interval(d.interval),
            d.verdict.partition(";")[0],
        )
        for d in differences
    ]


def _contrast_rows(computed: "Sequence[ContrastResult]") -> list[tuple[str, ...]]:
    from aem_exp.report import sections

    return [
        (
            f"{c.name} ({'primary' if c.primary else 'exploratory'})",
            sections.format_points(c.interval.difference, True) if c.interval else "-",
            sections.format_interval(c.interval),
            c.verdict.partition(";")[0],
        )
        for c in computed
    ]


def _log_to_mlflow(
    sweep: "Sweep", folder: Path, files: Sequence[Path], arguments: argparse.Namespace
) -> list[tuple[str, str]]:
    """Log the report as an artifact of the sweep in the tracking store of its runs."""
    from aem_exp.tracking import publish, store_uri

    outputs = sweep.cells[0].folder.parent
    uri = store_uri.resolve_uri(sweep.cells[0].experiment.tracking, outputs)
    if arguments.no_tracking or uri == store_uri.OFF or not any(cell.folder.is_dir() for cell in sweep.cells):
        return []
    return publish.log_report(outputs, uri, sweep.cells[0].experiment.name, sweep.name, folder, files)
