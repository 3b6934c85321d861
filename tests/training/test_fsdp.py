"""Runs with sharded weights (FSDP2) in two processes on CPUs, over gloo (see `support.cpu_fsdp`)."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support import cpu_fsdp
from support.runs import SMALL_RUN, read_metrics, run_command, wait_for_run, weights_moved

from aem_exp import config

OVERRIDES = [*SMALL_RUN, "tracking=off", "trainer.steps=4", "launch=slurm_cpu", "launch.nodes=2", "launch.save_every=1"]


def run_dir(outputs, **fsdp_config):
    """Write the experiment of a sharded run for two processes; return its run directory."""
    experiment = config.load([*OVERRIDES, f"outputs={outputs}"])
    settings = experiment.launch.trainer | cpu_fsdp.SETTINGS
    settings["fsdp_config"] = settings["fsdp_config"] | fsdp_config
    experiment = replace(experiment, launch=replace(experiment.launch, trainer=settings))
    folder = config.run_dir(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.json").write_text(json.dumps(config.to_dict(experiment)))
    return folder


def start(cache, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", cpu_fsdp.__file__]
    env = {**os.environ, "AEM_CACHE": str(cache), "COLUMNS": "120"}
    return subprocess.Popen([*command, folder], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_end(process):
    """The exit code and the output of a process."""
    out, err = process.communicate(timeout=600)
    return process.returncode, out + err


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """The run directory of an uninterrupted run."""
    folder = run_dir(tmp_path_factory.mktemp("finished"))
    code, output = wait_for_end(start(cache, folder))
    assert code == 0 and weights_moved(folder), output
    return folder


@pytest.mark.slow
def test_interrupted_sharded_run_resumes_to_the_same_result(cache, tmp_path, finished):
    """It also loads its weights in one process only (cpu_ram_efficient_loading)."""
    folder = run_dir(tmp_path, cpu_ram_efficient_loading=True)
    process = start(cache, folder)
    wait_for_run(process, (folder / "metrics.jsonl").exists, lambda: any(folder.glob("checkpoint-*/step.json")))
    process.send_signal(signal.SIGTERM)
    code, output = wait_for_end(process)
    assert code != 0 and not (folder / "result.json").exists(), output
    code, output = wait_for_end(start(cache, folder))
    assert code == 0, output
    events = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    assert [event["step"] > 0 for event in events if event["event"] == "start"] == [False, True], (
        "it resumes from a step"
    )
    assert read_metrics(folder) == read_metrics(finished)
    weights, resumed = (load_file(path / "model" / "model.safetensors") for path in (finished, folder))
    assert weights.keys() == resumed.keys() and all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert list(folder.glob("checkpoint-*/*_fsdp_0")) and not list(folder.glob("checkpoint-*/model.safetensors"))


@pytest.mark.slow
def test_sharded_checkpoint_is_not_continued_without_sharding(cache, tmp_path, finished):
    overrides = [f"from={finished}", "trainer.steps=5", "launch.trainer={use_cpu: true}", "launch=local"]
    done = run_command(cache, tmp_path, *overrides)
    assert done.returncode == 2 and "launch.trainer.fsdp=" in done.stderr, done.stderr
