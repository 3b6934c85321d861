"""Starts the vLLM server of a node or of this machine, and ends it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from aem_exp import config, policy, warm_start
from aem_exp.cluster import distributed, slurm
from aem_exp.config import Experiment
from aem_exp.core.errors import RunError
from aem_exp.envs import opening
from aem_exp.rollout.sampling import http, vllm_cpu

GRACE: Final = 20.0  # seconds that a server gets to end
LORA_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the ranks for which vLLM can reserve memory


@dataclass(frozen=True)
class ServerCommand:
    """The command of a server, and its environment."""

    words: list[str]
    variables: dict[str, str]
    """Added to the environment. The key is here, and not on the command line, which other users can read."""

    def start(self, output: IO[Any] | None = None) -> subprocess.Popen[bytes]:
        """Start the server in a process group of its own; `output` receives what it prints."""
        inherited = {name: value for name, value in os.environ.items() if name not in distributed.RANK_VARIABLES}
        return subprocess.Popen(
            self.words,
            env=inherited | self.variables,
            start_new_session=True,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
        )

    def __str__(self) -> str:
        """The command as a user would type it, without the key."""
        shown = {name: value for name, value in self.variables.items() if name not in ("VLLM_API_KEY", "PATH")}
        return " ".join([*(f"{name}={value}" for name, value in shown.items()), *map(shlex.quote, self.words)])


def build_command(experiment: Experiment, host: str, port: int, key: str) -> ServerCommand:
    """The command that serves the initial weights of an experiment with the script of the site.

    Raises:
        ConfigError: vLLM on a CPU cannot serve this model, or its weights are not on this machine.
    """
    launch, weights = experiment.launch, find_weights(experiment)
    dtype = "bfloat16" if experiment.trainer.bf16 else experiment.model.dtype
    context = config.max_context(experiment)
    options, variables = _context_options(weights, context), {"VLLM_API_KEY": key, "VLLM_SERVER_DEV_MODE": "1"}
    if launch.server_weights == "adapter":
        rank = next((size for size in LORA_RANKS if size >= (experiment.model.lora or {}).get("r", 8)), LORA_RANKS[-1])
        options += ["--enable-lora", "--max-lora-rank", str(rank)]
        variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if not launch.gpus_per_node:
        vllm_cpu.check_head_size(weights)
    script = slurm.read_site()[1] / slurm.SERVER_SCRIPT
    arguments = [weights, host, str(port), str(launch.gpus_per_node), str(context), dtype, *options]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # the vLLM of this environment
    return ServerCommand(["bash", str(script), *arguments], variables | {"PATH": path})


def find_weights(experiment: Experiment) -> str:
    """The folder of the initial weights, which are made if the experiment makes its policy or has a warm start."""
    world = opening.open_world(experiment)
    model = experiment.model
    weights = policy.locate(model) if model.path else policy.make_cached(experiment, world)
    return warm_start.make_cached(experiment, world, weights, print).weights


def wait_until_healthy(child: subprocess.Popen[bytes], url: str, seconds: float, place: str) -> None:
    """Wait until a server answers.

    Raises:
        RunError: it has ended, or it did not answer in time and was ended.
    """
    end = time.monotonic() + seconds
    while not http.is_healthy(url):
        if (code := child.poll()) is not None or time.monotonic() > end:
            end_server(child)
            late = f"did not answer within {seconds:g} s (launch.server_seconds)"
            raise RunError(f"the server on {place} {late if code is None else describe_end(code)}", "node")
        time.sleep(0.5)


def describe_end(code: int) -> str:
    """How a process has ended, by its return code."""
    return f"was killed ({signal.Signals(-code).name})" if code < 0 else f"has ended with code {code}"


def end_server(child: subprocess.Popen[bytes]) -> None:
    """End a server and all processes that it started."""
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    with suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _context_options(weights: str, context: int) -> list[str]:
    """vLLM options for a context above the position limit of the model: raise the limit without scaling, as the trainer does."""
    most, scaled = policy.max_positions(json.loads((Path(weights) / "config.json").read_text()))
    if scaled or not 0 < most < context:
        return []
    return ["--hf-overrides", json.dumps({"max_position_embeddings": context})]
