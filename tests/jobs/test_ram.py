"""Memory (RAM) on CPUs: typical rows, refusals, warnings, and the correction by the first step."""

import json
import re

import pytest
from support.random_models import SMOLLM2
from support.runs import run_here

from aem_exp import tiny
from aem_exp.__main__ import main
from aem_exp.config import load, run_dir
from aem_exp.core.errors import ConfigError
from aem_exp.envs.opening import open_world
from aem_exp.jobs import ram
from aem_exp.jobs.sizes import RowLengths
from aem_exp.rundir import measured_memory
from aem_exp.rundir.measured_memory import MeasuredMemory

pytestmark = [pytest.mark.usefixtures("clean"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 135 M weights without its weights: config.json and a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    experiment = load(["env=household"])
    tiny.make_tokenizer(open_world(experiment).words(), experiment.env).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SMOLLM2))
    (folder / "model.safetensors").touch()
    return folder


@pytest.fixture
def small_machine(monkeypatch):
    """Sets the memory of this machine, in GB."""
    return lambda size: monkeypatch.setattr(ram.node_memory, "machine_bytes", lambda: size * 1e9)


def words(folder, *more):
    return ["model.make=null", f"model.path={folder}", "tracking=off", "trainer.learning_rate=1e-6", *more]


def test_experiment_that_cannot_fit_is_refused_with_a_value_that_fits(folder, capsys, small_machine):
    small_machine(24)
    chat = words(folder, "env=household_chat", "plan=true")
    assert main(chat) == 2
    said = capsys.readouterr().err
    assert re.match(
        r"aem_exp: launch\.device_rows=0: needs [\d.]+ GB of RAM per process, and 24\.0 GB are available", said
    )
    assert said.count("\n") == 1
    (rows,) = re.findall(r"; (\d+) would fit", said)
    assert main([*chat, f"launch.device_rows={rows}"]) == 0
    said = capsys.readouterr().out
    assert "RAM     about" in said and " of 24.0 GB per process" in said
    assert "if every row is full (env.context_tokens=2048), a process needs" in said


def test_several_changes_are_combined_if_one_is_not_enough(folder, small_machine):
    small_machine(4)
    experiment = load(words(folder, "env=household_chat"))
    with pytest.raises(ConfigError) as caught:
        ram.check_ram(experiment, open_world(experiment))
    assert caught.value.field == "launch.device_rows"
    (changes,) = re.findall(r"; (launch.*) would fit", caught.value.remedy)
    assert "launch.device_rows=" in changes and "launch.device_episodes=" in changes
    changes = [text.replace("launch.trainer", "+launch.trainer") for text in changes.split()]
    lighter = load(words(folder, "env=household_chat", *changes))
    assert ram.check_ram(lighter, open_world(experiment)).typical <= 4e9


def test_typical_rows_have_the_prompts_of_the_env(folder):
    experiment = load(words(folder))
    world, full = open_world(experiment), RowLengths.from_experiment(experiment)
    lengths = ram.check_ram(experiment, world).lengths
    env = experiment.env
    assert env.max_turns * env.response_tokens < lengths.row < full.row and lengths.prompt < full.prompt
    unknown = ram.check_ram(experiment).lengths
    assert unknown.row == env.context_tokens // 4 + env.response_tokens


def test_memory_of_a_cluster_job_is_that_of_the_site(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "site.yaml").write_text("mem_gb: 2\n")
    monkeypatch.setenv("AEM_SITE", str(tmp_path))
    assert main(words(folder, "launch=slurm_cpu", "plan=true")) == 2
    assert "and 2.1 GB are available" in capsys.readouterr().err
    (tmp_path / "site.yaml").write_text("partition: cpu\n")  # the memory of a job is unknown
    assert main(words(folder, "launch=slurm_cpu", "plan=true")) == 0
    assert "RAM     about" in capsys.readouterr().out


def test_plan_for_gpus_shows_the_measured_memory(folder, tmp_path, capsys):
    chosen = words(folder, "launch=slurm1", f"outputs={tmp_path}")
    run = run_dir(load(chosen))
    run.mkdir()
    measured_memory.write(run, MeasuredMemory(3, 6e9, 0.0, 5e9, 8, 512, 64))
    assert main([*chosen, "plan=true"]) == 0
    assert "GB, corrected by step 3, which used 6.0 GB (x 1.20 of its estimate)" in capsys.readouterr().out


def test_first_step_corrects_the_estimate(tmp_path, capsys, caplog, small_machine):
    experiment = load(["env=household"])
    tokenizer = tiny.make_tokenizer(open_world(experiment).words(), experiment.env)
    tiny.make_policy(tokenizer, experiment.env, 32, 2, 2, 0.3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    size = ["trainer.steps=2", "trainer.tasks_per_step=2", "trainer.group_size=4", "trainer.mini_batch=4"]
    small = words(tmp_path / "model", *size, "evaluation.tasks=2", "trainer.entropy_coef=0.001")
    small_machine(0.75)
    run = run_here(tmp_path / "cache", tmp_path / "runs", *small)
    measured = measured_memory.read(run)
    assert measured.step == 1 and measured.rows == 4 and measured.estimate > 0
    before, after = (sentence for sentence in caplog.messages if "if every row is full" in sentence)
    assert before.startswith("if every row") and after.startswith("step 1 used")
    assert "GB of memory; lower launch.device_tokens" in after
    small_machine(1000)
    assert main([*small, f"outputs={tmp_path / 'runs'}", "plan=true"]) == 0
    assert f"corrected by the first step (x {measured.ratio:.2f})" in capsys.readouterr().out
    (run / measured_memory.FILE).write_text("{")
    assert measured_memory.read(run) is None
