"""Names of existing runs stay the same: the hashed part of each config and its hash equal the recorded ones.

`golden/science.json` contains, for each choice of `conf/`, the hashed part of the experiment and the name of its run directory.
If the settings of a choice change on purpose, record that choice again; a change of other choices would orphan their runs. This
command records all files in `golden/` (with -k CHOICE, only that choice), and git shows what has changed:

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
NEEDED_WITH = {
    "baseline=gspo": ["modulation=none"],  # it averages its ratio over a sequence, which cancels modulation
    "baseline=sampo": ["modulation=none"],
    "model=local": ["model.path=any/local"],
}
ARCHIVES = sorted((ROOT / "sweeps" / "results").rglob("*.json.gz"))


def loaded(choice):
    """Return the experiment of `group=name` or `+experiment=name`."""
    return config.load([choice, *NEEDED_WITH.get(choice, [])])


def choices():
    found = config.list_choices([ROOT / "conf"])
    return [f"{'+' * (group == 'experiment')}{group}={name}" for group, names in found.items() for name in names]


def recorded(choice):
    experiment = loaded(choice)
    names = {"run": config.run_dir(experiment).name, "signature": config.signature(experiment)}
    return {**names, "science": identity._science(experiment)}


@pytest.mark.slow
@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("choice", choices())
def test_hash_of_a_choice_is_unchanged(choice):
    known, now = json.loads(SCIENCE.read_text()), recorded(choice)
    if RECORD:
        known = {name: kept for name, kept in known.items() if name in choices()} | {choice: now}
        check_golden(SCIENCE.name, json.dumps(known, indent=1, sort_keys=True) + "\n")
    assert now == known[choice]


def test_all_recorded_choices_exist():
    assert set(choices()) == set(json.loads(SCIENCE.read_text()))


@pytest.mark.slow
def test_archived_runs_keep_their_signatures():
    assert len(ARCHIVES) >= 200
    for file in ARCHIVES:
        kept = archive.read(file)
        experiment = config.from_dict({key: value for key, value in kept.experiment.items() if key != "launch"})
        assert kept.run.endswith(f"-{config.signature(experiment)}"), file
