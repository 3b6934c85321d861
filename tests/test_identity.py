"""Names of runs that exist: what a config hashes to, and the hash, are as they were when they were recorded.

`golden/science.json` holds, for each choice of `conf/`, the part of the experiment that is hashed and the name of its run dir. A
choice whose settings are changed on purpose is recorded anew; a change that alters others orphans their runs. One command
records all that tests of `golden/` compare with (-k CHOICE: that choice alone), and git shows what has changed:

  AEM_RECORD=1 python -m pytest -n0 tests/test_identity.py tests/test_compatibility.py
"""

import json

import pytest
from support import ROOT
from support.golden import GOLDEN, RECORD, check_golden

from aem_exp import config
from aem_exp.config import identity
from aem_exp.rundir import archive

SCIENCE = GOLDEN / "science.json"
ARCHIVES = sorted((ROOT / "sweeps" / "results").rglob("*.json.gz"))


def loaded(choice):
    """The experiment of `group=name`, or of `+experiment=name`."""
    alone = ["modulation=none"] if choice == "baseline=gspo" else []  # its ratio would average modulation away
    return config.load([choice, *alone])


def choices():
    found = config.list_choices([ROOT / "conf"])
    return [f"{'+' * (group == 'experiment')}{group}={name}" for group, names in found.items() for name in names]


def recorded(choice):
    experiment = loaded(choice)
    names = {"run": config.run_dir(experiment).name, "signature": config.signature(experiment)}
    return {**names, "science": identity._science(experiment)}


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("choice", choices())
def test_a_choice_hashes_to_what_it_did(choice):
    known, now = json.loads(SCIENCE.read_text()), recorded(choice)
    if RECORD:
        known = {name: kept for name, kept in known.items() if name in choices()} | {choice: now}
        check_golden(SCIENCE.name, json.dumps(known, indent=1, sort_keys=True) + "\n")
    assert now == known[choice]


def test_no_choice_is_gone():
    assert set(choices()) == set(json.loads(SCIENCE.read_text()))


def test_an_archived_run_has_the_signature_that_names_it():
    assert len(ARCHIVES) >= 200
    for file in ARCHIVES:
        kept = archive.read(file)
        experiment = config.from_dict({key: value for key, value in kept.experiment.items() if key != "launch"})
        assert kept.run.endswith(f"-{config.signature(experiment)}"), file
