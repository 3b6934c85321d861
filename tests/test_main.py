"""The command `aem-exp` for one experiment: its mistakes, its help, its plan, and what it imports."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT
from support.configs import FIXED, GROUPS

from aem_exp import config
from aem_exp.__main__ import main
from aem_exp.config import load

pytestmark = pytest.mark.usefixtures("clean")


@pytest.mark.parametrize(
    ("argv", "field", "fact"),
    [
        (["--cgf", "job"], "option=--cgf", "did you mean --cfg?"),
        (["--cfg"], "option=-c/--cfg", "one argument"),
        (["--cfg", "all"], "--cfg=all", "job"),
        (["--resolve"], "--resolve=true", "--cfg job"),
        (["-m", "seed=0"], "-m=seed=0", "seed=0,1"),
        (["--submit"], "--submit=true", "-m"),
        (["-m", "seed=0,1", "--cfg", "job"], "--cfg=job", "-m"),
        (["plan=maybe"], "plan=maybe", "true, false"),
        (["--config-dir", "nowhere"], "--config-dir=nowhere", "folder"),
        (["--config-dir", "nowhere", "--help"], "--config-dir=nowhere", "folder"),
        (["+experimnt=x", "--cfg", "job"], "experimnt=x", "did you mean experiment?"),
        (["launch.nodes=2", "launch.where=slurm"], "launch.hours=0.0", "launch.where=slurm"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence_and_exit_2(capsys, argv, field, fact):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"aem_exp: {field}: ") and fact in err


def test_help_lists_every_choice(capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    for group, files in GROUPS.items():
        assert f"{group}=" in page
        for name in files:
            lines = [line for line in page.splitlines() if line.startswith(f"  {name} ")]
            assert lines and all(len(line.split()) > 3 for line in lines)
    assert max(map(len, page.splitlines())) < 132


def test_cfg_job_prints_what_was_composed(capsys):
    assert main(["trainer.steps=7", "--cfg", "job"]) == 0
    page = capsys.readouterr().out
    assert "steps: 7" in page and "${model.name}" in page
    assert main(["--cfg", "job", "--resolve", "seed=4"]) == 0
    assert "name: household-tiny" in capsys.readouterr().out


@pytest.mark.slow
def test_plan_shows_and_runs_nothing(capsys, tmp_path):
    words = [*FIXED, "trainer.mini_batch=all"]
    assert main([*words, "plan=true"]) == 0
    page = capsys.readouterr().out
    assert str(tmp_path / "outputs") in page and "state   new" in page and "trainer.mini_batch=all" in page
    assert not (tmp_path / "outputs").exists()
    folder = config.run_dir(load(words))
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(json.dumps(config.to_dict(load(words))))
    main([*words, "plan=true"])
    assert "state   started" in capsys.readouterr().out
    main([*FIXED, "plan=true"])
    assert "trainer.mini_batch: all -> 32" in capsys.readouterr().out


HEAVY = ("torch", "transformers", "trl", "mlflow", "optuna", "datasets", "pandas", "matplotlib", "peft", "submitit")


LAZY = f"""
import sys
from aem_exp.__main__ import main
assert main(["--help"]) == 0
assert not {{"hydra", "omegaconf"}} & set(sys.modules)
assert main(["+experiment=alfworld_1_5b", "--cfg", "job"]) == main(["model.lora={{r: 8}}", "plan=true"]) == 0
assert main(["trainer.max_steps=1"]) == main(["env=alfworld"]) == 2
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
"""


@pytest.mark.slow
def test_nothing_heavy_is_imported_before_a_run(tmp_path):
    subprocess.run([sys.executable, "-c", LAZY], check=True, capture_output=True, cwd=tmp_path, env=environment())


@pytest.mark.slow
def test_works_from_any_folder(tmp_path):
    (tmp_path / "own_world.py").write_text(
        "import torch\nfrom aem_exp.envs import Task\nclass World:\n    def __init__(self, size: int = 1): ...\n"
        "    external = True\n    fingerprint, splits = 'own', ('train', 'dev', 'test')\n"
        "    def tasks(self, split): return [Task(f'{split}-{i}') for i in range(9)]\n"
        "    def env(self): ...\n"
        "    def words(self): ...\n"
        "    def expert(self, *_): ...\n"
    )
    argv = [sys.executable, "-m", "aem_exp", "env.make={_target_: own_world.World, size: 3}", "plan=true"]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert str(tmp_path / "outputs") in done.stdout
    done = subprocess.run([*argv, "seed=x"], capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 2 and done.stderr.startswith("aem_exp: seed=x: ") and done.stderr.count("\n") == 1


def environment() -> dict[str, str]:
    """The environment of a process that finds the package although it is not installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
