"""Command that jobs run on server nodes: starts a vLLM server, publishes its address, and ends it together with the run."""

import argparse
import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from aem_exp import config
from aem_exp.cluster import rendezvous, slurm
from aem_exp.config import Experiment
from aem_exp.core import cli
from aem_exp.core.errors import RunError
from aem_exp.rollout.sampling import http

GRACE: Final = 20.0  # seconds that a server gets to end


def main() -> int:
    return cli.run_cli(lambda: _run(_parse_arguments()))


def _parse_arguments() -> argparse.Namespace:
    about = "Serve the policy of a run from this node until the run ends. Jobs run this command."
    parser = cli.Parser("python -m aem_exp.serve", description=about, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path)
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> int:
    cli.add_frozen_modules(arguments.run_dir)
    run_dir = arguments.run_dir.expanduser().absolute()
    experiment, folder = config.read(run_dir), rendezvous.job_folder(run_dir)
    received: list[int] = []
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # near the time limit, the run still needs servers to end its step
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    child = None
    try:
        if os.environ.get("SLURM_LOCALID", "0") == "0":  # the other tasks of the node only wait
            child = _start_server(experiment, folder)
        while not (folder / rendezvous.RELEASED).exists():
            if (
                child is not None and child.poll() is not None and not received
            ):  # after a signal, all processes end anyway
                raise RunError(f"the server on {_node_name()} has ended with code {child.returncode}", "node")
            time.sleep(0.5)
    except RunError as stop:
        rendezvous.write_ended(folder, os.environ.get("SLURM_NODEID", "0"), str(stop))
        raise
    finally:
        if child is not None:
            _end_server(child)
    return 0


def _node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _start_server(experiment: Experiment, folder: Path) -> subprocess.Popen[bytes]:
    """Start the server of this node, wait until it answers, and publish its address.

    Raises:
        RunError: the server ended, or did not answer within launch.server_seconds.
    """
    from aem_exp import policy
    from aem_exp.envs import opening

    site, place = slurm.read_site()
    model, how = experiment.model, experiment.launch
    weights = policy.locate(model) if model.path else policy.make_cached(experiment, opening.open_world(experiment))
    host, dtype = (
        rendezvous.private_address(site.interface),
        "bfloat16" if experiment.trainer.bf16 else model.dtype,
    )
    port = rendezvous.find_free_port(host)
    context = max(experiment.env.context_tokens, config.apply_evaluation_limits(experiment).env.context_tokens)
    words = [
        weights,
        host,
        str(port),
        str(max(1, how.gpus_per_node)),
        str(context),
        dtype,
        *_context_options(weights, context),
    ]
    secret = {"VLLM_API_KEY": rendezvous.ensure_key(folder), "VLLM_SERVER_DEV_MODE": "1"}  # not on the command line
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # the server is not a rank of the run
    child = subprocess.Popen(
        ["bash", str(place / slurm.SERVER_SCRIPT), *words], env=os.environ | secret, start_new_session=True
    )
    url = f"http://{host}:{port}"
    end = time.monotonic() + how.server_seconds
    while not http.is_healthy(url):
        if (code := child.poll()) is not None or time.monotonic() > end:
            _end_server(child)
            late = f"did not answer within {how.server_seconds:g} s (launch.server_seconds)"
            raise RunError(
                f"the server on {_node_name()} {late if code is None else f'has ended with code {code}'}", "node"
            )
        time.sleep(0.5)
    rendezvous.write_private(folder / f"{rendezvous.NODE_PREFIX}{os.environ.get('SLURM_NODEID', '0')}", f"{url}\n")
    print(f"serves   {url}", flush=True)
    return child


def _context_options(weights: str, context: int) -> list[str]:
    """vLLM options for a context above the position limit of the model: raise the limit without scaling, as the trainer does."""
    from aem_exp import policy

    most, scaled = policy.max_positions(json.loads((Path(weights) / "config.json").read_text()))
    if scaled or not 0 < most < context:
        return []
    return ["--hf-overrides", json.dumps({"max_position_embeddings": context})]


def _end_server(child: subprocess.Popen[bytes]) -> None:
    """End a server and all processes that it started."""
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    with suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
