"""Door: what runs, what failed, and why. It reads run dirs and the scheduler, and changes nothing.

`python -m aem_exp.status` shows all runs of a folder, or those of a sweep.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from aem_exp import door, members
from aem_exp.values import ConfigError

if TYPE_CHECKING:
    from aem_exp.board import Line

ABOUT = """\
Show how far runs are, what failed, and why; nothing is changed.

  python -m aem_exp.status                  all runs in ./outputs, or $AEM_OUTPUTS
  python -m aem_exp.status household_quick  the runs of a sweep
  python -m aem_exp.status --json | jq      for programs
"""


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; the exit code."""
    return door.answer(lambda: _act(_read(sys.argv[1:] if argv is None else argv)))


def _read(argv: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = door.Parser("python -m aem_exp.status", description=ABOUT, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("sweep", nargs="?", help="a sweep that was begun, by its name")
    parser.add_argument("--outputs", help="the folder of the runs (default: $AEM_OUTPUTS, or ./outputs)")
    parser.add_argument("--once", action="store_true", help="show them once, also on a terminal")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    return parser.parse_args(argv)


def _act(asked: argparse.Namespace) -> int:
    outputs = Path(asked.outputs or os.environ.get("AEM_OUTPUTS") or "outputs").expanduser().absolute()
    if not outputs.is_dir():
        raise ConfigError("--outputs", str(outputs), "there is no such folder, so no run")
    runs = _sweep(outputs, asked.sweep) if asked.sweep else _all(outputs)
    if asked.json:
        from aem_exp import state

        states = state.read([folder for folder, _, _ in runs])
        rows = [
            {"run": str(f), "group": n, "seed": s, **_plain(asdict(states[f])), "missing": states[f].missing}
            for f, n, s in runs
        ]
        print(json.dumps(rows, indent=1))
        return 0
    from rich.console import Console

    from aem_exp import board

    title = f"{asked.sweep or 'all runs'} in {outputs}"
    if asked.once:
        Console(highlight=False).print(board.board(look(runs), title))
    else:
        board.watch(lambda: look(runs), title)
    if asked.sweep and (links := members.links(outputs, asked.sweep)):
        print(f"\n{links}")
    return 0


Runs = Sequence[tuple[Path, str, str]]  # folder, name on the board, seed


def look(runs: Runs) -> list["Line"]:
    """The runs as they are now."""
    from aem_exp import state
    from aem_exp.board import Line

    states = state.read([folder for folder, _, _ in runs])
    return [Line(name, seed, states[folder]) for folder, name, seed in runs]


def _all(outputs: Path) -> Runs:
    found = []
    for file in sorted(outputs.glob("*/experiment.json")):
        data = json.loads(file.read_text())
        name = f"{data['name']}/{data['baseline']['name']}+{data['modulation']['name']}"
        found.append((file.parent, name, str(data["seed"])))
    return found


def _sweep(outputs: Path, name: str) -> Runs:
    return [(outputs / m["run"], m["group"], str(m["seed"])) for m in members.read(outputs, name)]


def _plain(row: dict[str, object]) -> dict[str, object]:
    return {key: None if value != value else value for key, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())
