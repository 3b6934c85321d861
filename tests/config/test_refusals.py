"""What cannot be done is refused before any work: one sentence, nothing printed before it, nothing written."""

import json
import os
import shutil
import subprocess

import pytest
import torch

from aem_exp import __main__ as single
from aem_exp.core.errors import ConfigError
from aem_exp.sweep import command as sweep

NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU here")
HUGE = str(10**30)
SLURM = ["household_quick", "launch=slurm_cpu", "--submit"]
SPACE = """
question: Which learning rate?
base: +experiment=household_window
search: {trials: 2, space: {trainer.learning_rate: %s}}
seeds: 0
"""


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """The sentence of a command that is refused; nothing else is printed, and no folder is made."""
    outputs = tmp_path / "outputs"
    monkeypatch.setenv("AEM_OUTPUTS", str(outputs))

    def ask(main, *words):
        assert main([*map(str, words)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and not outputs.exists()
        assert len(said.err.splitlines()) == 1
        return said.err

    return ask


@pytest.mark.parametrize("also", [[], ["plan=true"]], ids=["run", "plan"])
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.group_size=1000000000", "makes 8,000,000,000 episodes a step, and 1,000,000 is the most"),
        ("trainer.oversample=1000000", "makes 64,000,000 episodes a step"),
        (f"trainer.steps={HUGE}", "must be at most 4,294,967,295"),
        (f"trainer.mini_batch={10**10}", "must be at most 4,294,967,295"),
        (f"seed={HUGE}", "must be at most 4,294,967,295"),
        (f"env.max_turns={HUGE}", "must be at most 4,294,967,295"),
        (f"env.make.receptacles={HUGE}", "must be at most 9,223,372,036,854,775,807"),
    ],
)
def test_no_size_is_absurd(refused, word, said, also):
    also = [*also, "trainer.drop_equal=true"]
    err = refused(single.main, word, *also)
    assert word.partition("=")[0] in err and said in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--retry", "foo"], "choose from all, config, crash, "),
        (["--retry", "ooom"], "did you mean oom?"),
        (["--at-once", "0"], "--at-once=0: must be a whole number of at least 1"),
        (["--at-once", "-3"], "--at-once=-3: must be a whole number of at least 1"),
        (["--submit"], "such as launch=slurm_cpu"),
        pytest.param(["launch=gpu1", "--local"], "launch.gpus_per_node=1: this machine has no GPU", marks=NO_GPU),
        (["launch=node1", "--local"], "is a run of 8 processes, and here are 1"),
    ],
)
def test_a_sweep_is_asked_for_what_there_is(refused, words, said):
    assert said in refused(sweep.main, "household_quick", *words)


def test_the_classes_of_failures_are_all_there_are():
    """Each class that a run dir or a scheduler gives can be retried."""
    from aem_exp.cluster import run_state
    from aem_exp.rundir import attempts

    given = {kind for kind, _ in run_state.JOB_FAILURES.values()} | {
        *run_state.RETRYABLE,
        "env",
        "oom",
        "disk",
        "config",
        "crash",
    }
    assert given <= set(attempts.FAILURE_CLASSES)


@pytest.mark.parametrize("words", [SLURM, ["household_search", "launch=slurm_cpu", "--submit"]], ids=["sweep", "study"])
def test_to_submit_there_must_be_a_slurm(refused, monkeypatch, tmp_path, words):
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    assert "sbatch is not on the PATH; submit from a login node" in refused(sweep.main, *words)
    for name in ("sbatch", "srun", "sinfo"):
        (programs / name).write_text(f"#!/bin/sh\necho '{name}: error: no controller' >&2\nexit 1\n")
        (programs / name).chmod(0o755)
    said = refused(sweep.main, *words)
    assert "launch.where=slurm: SLURM does not answer here (sinfo: error: no controller)" in said


@pytest.mark.parametrize("space", ["{low: 1e-4, high: 1e-3}", "[1e-4, 1e-3]", "0.0001"])
def test_a_search_space_is_written_in_text(refused, tmp_path, space):
    (tmp_path / "asked.yaml").write_text(SPACE % space)
    said = refused(sweep.main, tmp_path / "asked.yaml", "--local")
    assert "asked.search.space.trainer.learning_rate=" in said
    assert "must be text such as interval(1e-4, 1e-3), range(1, 9) or choice(a, b)" in said


@pytest.fixture(params=["file", "no permission", "read-only"])
def impossible(request, tmp_path):
    """A folder that takes no runs."""
    folder = tmp_path / "place"
    if request.param == "file":
        folder.touch()
        yield folder / "outputs"
        return
    folder.mkdir()
    if request.param == "no permission":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        folder.chmod(0o500)
        yield folder / "outputs"
        return
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a disk needs root")
    yield folder / "outputs"
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (single.main, ["modulation=none"]),
        (single.main, ["-m", "seed=0,1", "--local"]),
        (sweep.main, ["household_quick", "--local"]),
        (sweep.main, ["household_search", "--local"]),
    ],
    ids=["run", "grid", "sweep", "study"],
)
def test_a_folder_that_takes_no_runs(refused, impossible, main, words):
    said = refused(main, *words, f"outputs={impossible}")
    assert said.startswith(f"aem_exp: outputs={impossible}") and "cannot be written: " in said


def test_an_extra_is_installed_as_the_package_was(monkeypatch, tmp_path):
    """`pip install aem-exp[swe]` would replace a checkout by a wheel."""
    import importlib.metadata

    from aem_exp.core import extras

    info = tmp_path / "aem_exp-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aem-exp\nVersion: 1.0\n")
    found = importlib.metadata.PathDistribution(info)
    monkeypatch.setattr(extras, "distribution", lambda _: found)
    assert extras.install_command("swe") == "pip install 'aem-exp[swe]'"
    place = tmp_path / "a checkout"
    place.mkdir()
    url = info / "direct_url.json"
    url.write_text(json.dumps({"url": place.as_uri(), "dir_info": {"editable": True}}))
    assert extras.install_command("swe") == f"pip install -e '{place}[swe]'"
    monkeypatch.chdir(place)
    assert extras.install_command("swe") == "pip install -e '.[swe]'"
    url.write_text(json.dumps({"url": place.as_uri(), "dir_info": {}}))
    assert extras.install_command("swe") == "pip install '.[swe]'"
    shutil.rmtree(info)
    assert extras.install_command("swe") == "pip install 'aem-exp[swe]'"


def test_a_search_space_names_its_key():
    from aem_exp.sweep import study_spec

    with pytest.raises(ConfigError, match="must be a mapping"):
        study_spec.parse_search({"space": ["trainer.learning_rate"], "trials": 2}, "asked.search")
