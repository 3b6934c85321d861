"""Names of runs that exist: what a config hashes to, and the hash, are as they were when they were recorded.

`golden/science.json` holds, for each choice of `conf/`, the part of the experiment that is hashed. A choice whose settings are
changed on purpose is recorded anew (python tests/test_identity.py CHOICE); a change that alters others orphans their runs.
"""

import json
import sys
from pathlib import Path

import pytest

from aem_exp import config
from aem_exp.config import identity
from aem_exp.rundir import archive

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "science.json"
ARCHIVES = sorted((ROOT / "sweeps" / "results").rglob("*.json.gz"))


def loaded(choice):
    """The experiment of `group=name`, or of `+experiment=name`."""
    alone = ["modulation=none"] if choice == "baseline=gspo" else []  # its ratio would average modulation away
    return config.load([choice, *alone])


def choices():
    found = config.choices([ROOT / "conf"])
    return [f"{'+' * (group == 'experiment')}{group}={name}" for group, names in found.items() for name in names]


def recorded(choice):
    experiment = loaded(choice)
    return {"signature": config.signature(experiment), "science": identity._science(experiment)}


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("choice", choices())
def test_a_choice_hashes_to_what_it_did(choice):
    assert recorded(choice) == json.loads(GOLDEN.read_text())[choice]


def test_an_archived_run_has_the_signature_that_names_it():
    assert len(ARCHIVES) >= 200
    for file in ARCHIVES:
        kept = archive.read(file)
        experiment = config.from_dict({key: value for key, value in kept.experiment.items() if key != "launch"})
        assert kept.run.endswith(f"-{config.signature(experiment)}"), file


if __name__ == "__main__":
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    known |= {choice: recorded(choice) for choice in sys.argv[1:] or [c for c in choices() if c not in known]}
    GOLDEN.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
