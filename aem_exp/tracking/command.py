"""`python -m aem_exp.tracking sync`: send MLflow what it lacks of runs."""

import argparse
from pathlib import Path

from aem_exp.core import cli
from aem_exp.tracking import store_uri
from aem_exp.tracking.sync import _find_run_dirs, _reconcile, sync_run


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; the exit code."""
    return cli.run_cli(lambda: _run_command(_parse_arguments(argv)))


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser("python -m aem_exp.tracking", description="Send MLflow what it lacks of runs.")
    verb = parser.add_subparsers(metavar="sync", required=True).add_parser("sync", help="rebuild runs in MLflow")
    verb.add_argument("run_dir", type=Path, nargs="+", help="run dirs, or a folder of them")
    verb.add_argument("--uri", help="the store, if not the one that the run was logged to")
    verb.add_argument("--reconcile", action="store_true", help="also end runs there that nobody is at any more")
    return parser.parse_args(argv)


def _run_command(arguments: argparse.Namespace) -> int:
    uri = arguments.uri and store_uri.resolve_uri(arguments.uri, Path.cwd())
    runs = [run for folder in arguments.run_dir for run in _find_run_dirs(folder)]
    if arguments.reconcile:
        _reconcile(runs)
    for run_dir in runs:
        print(sync_run(run_dir, uri), flush=True)
    return 0
