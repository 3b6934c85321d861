"""A run whose processes share the weights: two of them, over gloo (see `pieces`)."""

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

WORDS = [*SMALL_RUN, "tracking=off", "trainer.steps=4", "launch=slurm_cpu", "launch.nodes=2", "launch.save_every=1"]


def run_dir(outputs, **how):
    """A run for two processes with the weights in pieces, written down."""
    experiment = config.load([*WORDS, f"outputs={outputs}"])
    settings = experiment.launch.trainer | cpu_fsdp.SETTINGS
    settings["fsdp_config"] = settings["fsdp_config"] | how
    experiment = replace(experiment, launch=replace(experiment.launch, trainer=settings))
    folder = config.run_dir(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.json").write_text(json.dumps(config.to_dict(experiment)))
    return folder


def start(cache, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", cpu_fsdp.__file__]
    env = {**os.environ, "AEM_CACHE": str(cache), "COLUMNS": "120"}
    return subprocess.Popen([*command, folder], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(started):
    out, err = started.communicate(timeout=600)
    return started.returncode, out + err


@pytest.fixture(scope="module")
def through(cache, tmp_path_factory):
    folder = run_dir(tmp_path_factory.mktemp("through"))
    code, said = ended(start(cache, folder))
    assert code == 0 and weights_moved(folder), said
    return folder


def test_interrupted_and_read_by_one_process_it_ends_the_same(cache, tmp_path, through):
    folder = run_dir(tmp_path, cpu_ram_efficient_loading=True)
    started = start(cache, folder)
    wait_for_run(started, (folder / "metrics.jsonl").exists, lambda: any(folder.glob("checkpoint-*/step.json")))
    started.send_signal(signal.SIGTERM)
    code, said = ended(started)
    assert code != 0 and not (folder / "result.json").exists(), said
    code, said = ended(start(cache, folder))
    assert code == 0 and "resuming from step" in said, said
    assert read_metrics(folder) == read_metrics(through)
    weights, again = (load_file(path / "model" / "model.safetensors") for path in (through, folder))
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    assert list(folder.glob("checkpoint-*/*_fsdp_0")) and not list(folder.glob("checkpoint-*/model.safetensors"))


def test_what_was_saved_in_pieces_does_not_go_on_whole(cache, tmp_path, through):
    words = [f"from={through}", "trainer.steps=5", "launch.trainer={use_cpu: true}", "launch=local"]
    done = run_command(cache, tmp_path, *words)
    assert done.returncode == 2 and "was saved with true: go on with that" in done.stderr, done.stderr
