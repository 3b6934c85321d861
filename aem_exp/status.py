"""Command `aem-exp status`: shows the progress of runs, and why runs failed.

It reads run dirs and asks the scheduler; it changes nothing.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_exp.core import cli
from aem_exp.core.errors import ConfigError
from aem_exp.jobs import labels
from aem_exp.rundir import EXPERIMENT, membership

if TYPE_CHECKING:
    from aem_exp.cluster.run_state import RunState
    from aem_exp.jobs.status_table import StatusRow

ABOUT = """\
Show the progress of runs, and why runs failed. Nothing is changed.

  python -m aem_exp.status                  all runs in ./outputs, or $AEM_OUTPUTS
  python -m aem_exp.status household_quick  the runs of a sweep, by its name or its file, as for sweep and report
  python -m aem_exp.status --json | jq      for programs
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    return cli.run_cli(lambda: _run_command(_parse_arguments(sys.argv[1:] if argv is None else argv)))


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("python -m aem_exp.status", description=ABOUT, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("sweep", nargs="?", help="a sweep: a file, a name in sweeps/, or the name of a started sweep")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="the overrides with which the sweep was started"
    )
    parser.add_argument("--config-dir", help="the config folder with which the sweep was started")
    parser.add_argument("--outputs", help="the folder of the runs (default: $AEM_OUTPUTS, or ./outputs)")
    parser.add_argument("--once", action="store_true", help="print once, also on a terminal")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.config_dir and not arguments.sweep:
        raise ConfigError("--config-dir", arguments.config_dir, "has no effect without a sweep")
    return arguments


def _run_command(arguments: argparse.Namespace) -> int:
    outputs = Path(arguments.outputs or os.environ.get("AEM_OUTPUTS") or "outputs").expanduser().absolute()
    name, runs = _sweep_runs(outputs, arguments) if arguments.sweep else ("all runs", _all_runs(_check_folder(outputs)))
    outputs = runs[0].folder.parent if runs else outputs
    if arguments.json:
        from aem_exp.cluster import run_state

        states = run_state.read([run.folder for run in runs])
        print(json.dumps([_as_json(run, states[run.folder]) for run in runs], indent=1))
        return 0
    from aem_exp.core.console import make_console
    from aem_exp.jobs import status_table

    title = f"{name} in {outputs}"
    if arguments.once:
        make_console().print(status_table.status_table(read_rows(runs), title))
    else:
        status_table.watch_runs(lambda: read_rows(runs), title)
    if arguments.sweep and (links := membership.read_links(outputs, name)):
        print(f"\n{links}")
    return 0


@dataclass(frozen=True)
class ListedRun:
    """A run in the list."""

    folder: Path
    group: str
    """The name of its group in the JSON output."""
    seed: str
    label: str
    """The short name of its group in the table."""


def read_rows(runs: Sequence[ListedRun]) -> list["StatusRow"]:
    """The rows of the table, with the present state of each run."""
    from aem_exp.cluster import run_state
    from aem_exp.jobs.status_table import StatusRow

    states = run_state.read([run.folder for run in runs])
    return [StatusRow(_short_signature(run.folder), run.label, run.seed, states[run.folder]) for run in runs]


def _short_signature(folder: Path) -> str:
    """The first digits of the signature at the end of the name of a run dir."""
    return folder.name.rpartition("-")[2][:6]


def _check_folder(outputs: Path) -> Path:
    if not outputs.is_dir():
        raise ConfigError("--outputs", str(outputs), "there is no such folder")
    return outputs


def _all_runs(outputs: Path) -> list[ListedRun]:
    """All runs in a folder. A run with an unreadable experiment is listed with the name of its folder."""
    folders = [file.parent for file in sorted(outputs.glob(f"*/{EXPERIMENT}"))]
    readable: dict[Path, tuple[dict[str, Any], str]] = {}
    for folder in folders:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            data = json.loads((folder / EXPERIMENT).read_text())
            labels.make_labels([data])
            readable[folder] = data, f"{data['name']}/{data['baseline']['name']}+{data['modulation']['name']}"
    short = dict(zip(readable, labels.make_labels([data for data, _ in readable.values()]), strict=True))
    return [
        ListedRun(folder, readable[folder][1], str(readable[folder][0].get("seed", "?")), short[folder])
        if folder in readable
        else ListedRun(folder, folder.name, "?", folder.name)
        for folder in folders
    ]


def _sweep_runs(outputs: Path, arguments: argparse.Namespace) -> tuple[str, list[ListedRun]]:
    """The name and the runs of a sweep, as recorded at its last start, or else from its file."""
    from aem_exp.sweep import question, sweep_file

    has_options = bool(arguments.overrides or arguments.config_dir)
    if not sweep_file.find_file(arguments.sweep) or (
        not has_options and arguments.sweep in membership.list_sweeps(outputs)
    ):
        return arguments.sweep, _recorded_runs(_check_folder(outputs), arguments.sweep)
    cli.add_user_modules(arguments.config_dir)
    own = [f"outputs='{outputs}'"] if arguments.outputs else []
    sweep = question.load(arguments.sweep, [*arguments.overrides, *own], arguments.config_dir)
    if sweep.search is not None:  # its runs are chosen by the search
        return sweep.name, _recorded_runs(_check_folder(sweep.cells[0].folder.parent), sweep.name)
    return sweep.name, [ListedRun(cell.folder, cell.group, str(cell.seed), cell.group) for cell in sweep.cells]


def _recorded_runs(outputs: Path, name: str) -> list[ListedRun]:
    return [
        ListedRun(outputs / m["run"], m["group"], str(m["seed"]), m["group"]) for m in membership.read(outputs, name)
    ]


def _as_json(run: ListedRun, state: "RunState") -> dict[str, object]:
    row = {"run": str(run.folder), "group": run.group, "seed": run.seed}
    return {**row, **_nan_to_none(asdict(state)), "missing": state.missing}


def _nan_to_none(row: dict[str, object]) -> dict[str, object]:
    return {key: None if value != value else value for key, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())
