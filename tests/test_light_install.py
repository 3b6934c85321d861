"""The package without extras: it plans and reads as with `aem-exp[train]`, and refuses the rest in one sentence."""

import json
import os
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from support import ROOT
from support.environments import build_wheel, make_base_environment
from support.golden import GOLDEN

from aem_exp import config
from aem_exp.core import extras
from aem_exp.core.errors import ConfigError
from aem_exp.rundir import archive

pytestmark = pytest.mark.slow
REMEDY = "pip install 'aem-exp[train]'"
QWEN = ("model=qwen2_5_1_5b", "trainer.learning_rate=1e-6")
SIGNATURES = """
import json, sys
from aem_exp import config
from aem_exp.config import identity
found = {}
for choice in json.load(sys.stdin):
    alone = dict.fromkeys(("baseline=gspo", "baseline=sampo"), ["modulation=none"])
    needed = (alone | {"model=local": ["model.path=any/local"]}).get(choice, [])
    experiment = config.load([choice, *needed])
    found[choice] = {
        "run": config.run_dir(experiment).name,
        "signature": config.signature(experiment),
        "science": identity._science(experiment),
    }
print(json.dumps(found))
"""
RESOLVE = """
import json, sys
from aem_exp import config
def outcome(words):
    try:
        return config.signature(config.load(words))
    except config.ConfigError as error:
        return str(error)
print(json.dumps([outcome(words) for words in json.load(sys.stdin)]))
"""
ARCHIVE = """
import sys
from pathlib import Path
from aem_exp.rundir import archive
archive.write(archive.from_run_dir(Path(sys.argv[1]), "done"), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """The Python of an environment without extras."""
    folder = tmp_path_factory.mktemp("light")
    return make_base_environment(folder / "venv", build_wheel(folder))


@pytest.fixture
def run(light, cache, tmp_path):
    """Run a Python with arguments, in a folder and with outputs of its own."""

    def act(*words, python=light, text=None):
        unset = ("PYTHONPATH", "AEM_SITE", "AEM_ROOT", "MLFLOW_TRACKING_URI")
        env = {name: value for name, value in os.environ.items() if name not in unset}
        env |= {"AEM_OUTPUTS": str(tmp_path / "outputs"), "AEM_CACHE": str(tmp_path / "cache"), "COLUMNS": "120"}
        how = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "check": False, "timeout": 600}
        return subprocess.run([str(python), "-P", *words], input=text, **how)

    return act


@pytest.fixture
def aem(run):
    """Run a command that succeeds; what it prints."""

    def act(*words, **how):
        done = run("-m", "aem_exp", *words, **how)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return act


def test_the_extra_installs_the_modules_that_are_looked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {Requirement(line).name for line in project["optional-dependencies"]["train"]}
    assert set(extras.TRAINING_MODULES) == names
    assert not names & {Requirement(line).name for line in project["dependencies"]}


def test_nothing_heavy_is_installed(run):
    names = sorted({*extras.TRAINING_MODULES} - {"httpx"})  # which huggingface_hub requires
    code = f"from importlib.util import find_spec; print([name for name in {names} if find_spec(name)])"
    assert run("-c", code).stdout.strip() == "[]"


# What plans and reads.


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--help",), "aem-exp run RUN_DIR"),
        (("--cfg", "job"), "context_tokens: 512"),
        (("plan=true",), "64 environments at once"),
        (("plan=true", "launch=gpu1"), "GPUs per node 1"),
        (("-m", "seed=0,1"), "2 of 2 cells"),
        (("sweep",), "household_quick"),
        (("sweep", "household_quick"), "to run  6 of 6 cells"),
        (("sweep", "household_search"), "12 missing"),
        (("sweep", "main", "--json"), "cells"),
        (("status", "household_quick"), "6 new"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_plan_is_the_same(aem, words, says):
    told = aem(*words)
    assert says in told
    assert told == aem(*words, python=sys.executable)


def test_a_plan_of_weights_lacks_the_estimates_alone(aem):
    lines = aem(*QWEN, "launch=slurm1", "plan=true").splitlines()
    missing = [line for line in lines if "needs torch" in line]
    why = "model.path=Qwen/Qwen2.5-1.5B-Instruct: the estimate of memory, disk and cost needs torch"
    assert missing == [f"note    missing on this machine: {why}: {REMEDY}"]
    assert {line.split()[0] for line in lines} >= {"run", "state", "size", "launch", "step"}


def test_a_plan_says_what_of_the_users_own_needs_torch(run, tmp_path):
    half, world = "def half(step):\n    return step.return_M / 2\n", "def world(**settings):\n    pass\n"
    (tmp_path / "mine.py").write_text(f"import torch\n\n\n{half}\n\n{world}")
    words = ("baseline.advantage={_target_: mine.half}", "plan=true")
    done = run("-m", "aem_exp", *words, "--config-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (note,) = done.stderr.splitlines()
    assert note.startswith("mine.half: ")
    assert note.endswith(" needs torch")
    assert "64 environments at once" in done.stdout
    done = run("-m", "aem_exp", "env.make={_target_: mine.world}", "plan=true", "--config-dir", str(tmp_path))
    why = "env.make._target_=mine.world: importing it failed: this needs torch"
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"note    missing on this machine: {why}: {REMEDY}")


def test_a_report_of_archives_is_the_same(aem, tmp_path):
    words = ("report", str(ROOT / "sweeps" / "household_causal_again.yaml"), "--out", str(tmp_path / "report"))
    told = aem(*words)
    assert "archives in" in told
    page = (tmp_path / "report" / "index.html").read_text()
    assert told == aem(*words, python=sys.executable)
    assert page == (tmp_path / "report" / "index.html").read_text()


def test_a_finished_run_is_shown_and_archived(aem, run, unbroken, tmp_path):
    folder, _ = unbroken
    shown = aem("run", str(folder))
    assert "held-out panel" in shown
    assert "test" in shown
    assert folder.name in aem("status", "--outputs", str(folder.parent), "--json")
    for where, python in (("light", None), ("whole", sys.executable)):
        done = run("-c", ARCHIVE, str(folder), str(tmp_path / where), **({"python": python} if python else {}))
        assert done.returncode == 0, done.stderr
    light, whole = (archive.read(next((tmp_path / where).glob("*"))) for where in ("light", "whole"))
    assert light == whole
    assert light.tasks["id"]


# What names a run.


def test_the_science_of_every_choice_is_the_same(run):
    known = json.loads((GOLDEN / "science.json").read_text())
    done = run("-c", SIGNATURES, text=json.dumps(list(known)))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == known


@pytest.mark.usefixtures("clean")
def test_the_keywords_of_libraries_are_the_same(run):
    lora = "model.lora={r: 8, lora_alpha: 16, lora_dropout: 0.1, init_lora_weights: pissa, target_modules: all-linear}"
    experiments = [[*QWEN, words] for words in (lora, "model.lora={r: 8, bias: lora_only, rank_pattern: {a: 4}}")]
    refused = [
        *([*QWEN, f"model.lora={{{words}}}"] for words in ("rr: 8", "r: many", "bias: some", "init_lora_weights: x")),
        *([f"+trainer.{words}"] for words in ("push_to_hub=true", "num_generations=4", "learning_rat=1", "nothing=1")),
        ["+launch.trainer.learning_rate=1"],
    ]
    done = run("-c", RESOLVE, text=json.dumps(experiments + refused))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    for words, outcome in zip(experiments, told, strict=False):
        assert outcome == config.signature(config.load(words))
    for words, outcome in zip(refused, told[len(experiments) :], strict=True):
        with pytest.raises(ConfigError) as error:
            config.load(words)
        assert outcome == str(error.value)


# What needs the rest.


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "launch=local: a run"),
        (("launch=slurm_cpu",), "launch=slurm_cpu: a job runs this Python, which"),
        (("-m", "seed=0,1", "--local"), "launch=local: a run"),
        (("sweep", "household_quick", "--local"), "launch=local: a run"),
        (
            ("sweep", "household_quick", "launch=slurm_cpu", "--submit"),
            "launch=slurm_cpu: a job runs this Python, which",
        ),
        (("sweep", "household_search", "--local"), "launch=local: a run"),
        (("prepare",), "model.make=aem_exp.tiny.make: making this policy"),
        (("evaluate", "Qwen/Qwen2.5-1.5B-Instruct", *QWEN[:1], "env=household"), "playing with it"),
        (("proxy", "Qwen/Qwen2.5-1.5B-Instruct", *QWEN[:1], "env=household"), "playing with it"),
        (("evaluate", "env=household"), "playing it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_rest_is_refused_in_one_sentence(run, tmp_path, words, says):
    done = run("-m", "aem_exp", *words)
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("aem_exp: ")
    assert sentence.endswith(f"{says} needs torch: {REMEDY}")
    assert not [file for file in tmp_path.glob("outputs/**/*") if file.is_file()]


def test_mlflow_is_refused_in_one_sentence(run, unbroken, tmp_path):
    (tmp_path / "mlflow.db").touch()
    for words in (("sync", str(unbroken[0])), ("ui", "--uri", str(tmp_path / "mlflow.db"))):
        done = run("-m", "aem_exp", *words)
        assert (done.returncode, done.stderr) == (2, f"aem_exp: tracking=mlflow: the store needs mlflow: {REMEDY}\n")


def test_any_other_import_is_refused_in_one_sentence(run):
    code = "from aem_exp.core import cli; import sys; sys.exit(cli.run_cli(lambda: __import__('{}').x))"
    done = run("-c", code.format("aem_exp.training.trainer"))
    assert (done.returncode, done.stderr) == (2, f"aem_exp: this needs torch: {REMEDY}\n")
    assert "ModuleNotFoundError: No module named 'aem_exp.nothing'" in run("-c", code.format("aem_exp.nothing")).stderr
