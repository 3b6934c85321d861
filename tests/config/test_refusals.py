"""Impossible settings are refused before any work: with one sentence, no output before it, and no files."""

import json
import os
import shutil
import subprocess

import pytest
import torch

from aem_exp import __main__ as single
from aem_exp.core.errors import ConfigError
from aem_exp.sweep import command as sweep

NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
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
    """Run a command that is refused; the sentence that it prints. Nothing else is printed, and no folder is made."""
    outputs = tmp_path / "outputs"
    monkeypatch.setenv("AEM_OUTPUTS", str(outputs))

    def run(main, *words):
        assert main([*map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and not outputs.exists()
        assert len(err.splitlines()) == 1
        return err

    return run


@pytest.mark.slow
@pytest.mark.parametrize("also", [[], ["plan=true"]], ids=["run", "plan"])
@pytest.mark.parametrize(
    ("word", "limit"),
    [
        ("trainer.group_size=1000000000", "1,000,000"),
        ("trainer.oversample=1000000", "64,000,000"),
        (f"trainer.steps={HUGE}", "4,294,967,295"),
        (f"trainer.mini_batch={10**10}", "4,294,967,295"),
        (f"seed={HUGE}", "4,294,967,295"),
        (f"env.max_turns={HUGE}", "4,294,967,295"),
        (f"env.make.receptacles={HUGE}", "9,223,372,036,854,775,807"),
    ],
)
def test_absurd_sizes_are_refused(refused, word, limit, also):
    also = [*also, "trainer.drop_equal=true"]
    err = refused(single.main, word, *also)
    assert word.partition("=")[0] in err and limit in err


@pytest.mark.parametrize(
    ("words", "field", "fact"),
    [
        (["--retry", "foo"], "--retry=foo", "all, config, crash, "),
        (["--retry", "ooom"], "--retry=ooom", "did you mean oom?"),
        (["--at-once", "0"], "--at-once=0", "at least 1"),
        (["--at-once", "-3"], "--at-once=-3", "at least 1"),
        (["--submit"], "launch=local", "launch=slurm_cpu"),
        pytest.param(["launch=gpu1", "--local"], "launch.gpus_per_node=1", "GPU", marks=NO_GPU),
        (["launch=node1", "--local"], "launch=1 nodes x 8 GPUs", "launch.where=slurm"),
    ],
)
def test_a_sweep_refuses_impossible_options(refused, words, field, fact):
    err = refused(sweep.main, "household_quick", *words)
    assert f"{field}: " in err and fact in err


def test_every_failure_class_can_be_retried():
    """A class from a run dir or from the scheduler is a choice of `--retry`."""
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
def test_submitting_needs_slurm(refused, monkeypatch, tmp_path, words):
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    assert "launch.where=slurm: sbatch " in refused(sweep.main, *words)
    for name in ("sbatch", "srun", "sinfo"):
        (programs / name).write_text(f"#!/bin/sh\necho '{name}: error: no controller' >&2\nexit 1\n")
        (programs / name).chmod(0o755)
    err = refused(sweep.main, *words)
    assert "launch.where=slurm: " in err and "(sinfo: error: no controller)" in err


@pytest.mark.parametrize("space", ["{low: 1e-4, high: 1e-3}", "[1e-4, 1e-3]", "0.0001"])
def test_a_search_space_is_text(refused, tmp_path, space):
    (tmp_path / "asked.yaml").write_text(SPACE % space)
    err = refused(sweep.main, tmp_path / "asked.yaml", "--local")
    assert "asked.search.space.trainer.learning_rate=" in err
    assert "interval(1e-4, 1e-3), range(1, 9) or choice(a, b)" in err


@pytest.fixture(params=["file", "no permission", "read-only"])
def impossible(request, tmp_path):
    """A folder that cannot be written."""
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
def test_outputs_that_cannot_be_written_are_refused(refused, impossible, main, words):
    err = refused(main, *words, f"outputs={impossible}")
    assert err.startswith(f"aem_exp: outputs={impossible}") and "written" in err


def test_an_extra_is_installed_like_the_package(monkeypatch, tmp_path):
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

    with pytest.raises(ConfigError) as caught:
        study_spec.parse_search({"space": ["trainer.learning_rate"], "trials": 2}, "asked.search")
    assert caught.value.field == "asked.search.space" and "mapping" in caught.value.remedy
