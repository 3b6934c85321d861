"""Sweep membership: `sweeps/NAME.json` lists the runs of a sweep, and `sweeps.json` in each run directory holds the label
that each sweep gives it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aem_exp.core import disk
from aem_exp.core.errors import ConfigError

FOLDER = "sweeps"  # of the outputs
LABELS = "sweeps.json"  # of a run dir: sweep -> its label there


def write(outputs: Path, name: str, question: str, members: Sequence[dict[str, Any]]) -> None:
    """Record a sweep. `members`: run (the name of its dir), arm, group and seed of each."""
    (outputs / FOLDER).mkdir(parents=True, exist_ok=True)
    content = {"question": question, "members": list(members)}
    disk.write_atomically(outputs / FOLDER / f"{name}.json", json.dumps(content, indent=1) + "\n")


def read(outputs: Path, name: str) -> list[dict[str, Any]]:
    """The members of a sweep that was recorded.

    Raises:
        ConfigError: it was not.
    """
    names = list_sweeps(outputs)
    if name not in names:
        remedy = f"no sweep of that name was begun in {outputs}; begin it with: python -m aem_exp.sweep {name} --submit"
        raise ConfigError("sweep", name, names, remedy)
    return json.loads((outputs / FOLDER / f"{name}.json").read_text())["members"]


def list_sweeps(outputs: Path) -> list[str]:
    """The names of the sweeps that were recorded."""
    return sorted(path.stem for path in (outputs / FOLDER).glob("*.json"))


def write_links(outputs: Path, name: str, lines: Sequence[str]) -> None:
    """Write the links to a sweep's views in MLflow, as they were printed."""
    (outputs / FOLDER).mkdir(parents=True, exist_ok=True)
    disk.write_atomically(outputs / FOLDER / f"{name}.links", "".join(f"{line}\n" for line in lines))


def read_links(outputs: Path, name: str) -> str:
    """The links to a sweep's views, as they were printed; "" where there are none."""
    file = outputs / FOLDER / f"{name}.links"
    return file.read_text().rstrip() if file.exists() else ""


def add_label(folder: Path, sweep: str, group: str) -> bool:
    """Write into a run dir by which label a sweep calls the run; whether that is new."""
    labels = read_labels(folder)
    if labels.get(sweep) == group:
        return False
    disk.write_atomically(folder / LABELS, json.dumps({**labels, sweep: group}) + "\n")
    return True


def read_labels(folder: Path) -> dict[str, str]:
    """By which label each sweep calls a run."""
    file = folder / LABELS
    return json.loads(file.read_text()) if file.exists() else {}
