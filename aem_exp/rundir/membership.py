"""Sweep membership. `sweeps/NAME.json` lists the runs of a sweep; `sweeps.json` in a run directory maps each sweep to the
run's label in it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aem_exp.core import disk
from aem_exp.core.errors import ConfigError

FOLDER = "sweeps"  # in the outputs folder
LABELS = "sweeps.json"  # in a run directory: sweep -> label of the run


def write(outputs: Path, name: str, question: str, members: Sequence[dict[str, Any]]) -> None:
    """Record a sweep. Each member has `run` (the name of its directory), `arm`, `group` and `seed`."""
    (outputs / FOLDER).mkdir(parents=True, exist_ok=True)
    content = {"question": question, "members": list(members)}
    disk.write_atomically(outputs / FOLDER / f"{name}.json", json.dumps(content, indent=1) + "\n")


def read(outputs: Path, name: str) -> list[dict[str, Any]]:
    """Return the members of a recorded sweep.

    Raises:
        ConfigError: no sweep of this name is recorded.
    """
    names = list_sweeps(outputs)
    if name not in names:
        remedy = (
            f"no sweep of this name was started in {outputs}; start it with: python -m aem_exp.sweep {name} --submit"
        )
        raise ConfigError("sweep", name, names, remedy)
    return json.loads((outputs / FOLDER / f"{name}.json").read_text())["members"]


def list_sweeps(outputs: Path) -> list[str]:
    """Return the names of the recorded sweeps."""
    return sorted(path.stem for path in (outputs / FOLDER).glob("*.json"))


def write_links(outputs: Path, name: str, lines: Sequence[str]) -> None:
    """Save the printed links to a sweep's MLflow views."""
    (outputs / FOLDER).mkdir(parents=True, exist_ok=True)
    disk.write_atomically(outputs / FOLDER / f"{name}.links", "".join(f"{line}\n" for line in lines))


def read_links(outputs: Path, name: str) -> str:
    """Return the saved links to a sweep's MLflow views; "" if there are none."""
    file = outputs / FOLDER / f"{name}.links"
    return file.read_text().rstrip() if file.exists() else ""


def add_label(folder: Path, sweep: str, group: str) -> bool:
    """Record a run's label in a sweep; return whether the label is new."""
    labels = read_labels(folder)
    if labels.get(sweep) == group:
        return False
    disk.write_atomically(folder / LABELS, json.dumps({**labels, sweep: group}) + "\n")
    return True


def read_labels(folder: Path) -> dict[str, str]:
    """Return the label of a run in each of its sweeps."""
    file = folder / LABELS
    return json.loads(file.read_text()) if file.exists() else {}
