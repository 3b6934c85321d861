"""`python -m aem_exp.tracking sync`: send the missing parts of runs to MLflow."""

import argparse
from pathlib import Path

from aem_exp.core import cli
from aem_exp.tracking import store_uri
from aem_exp.tracking.sync import find_run_dirs, record_ends, sync_run


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return cli.run_cli(lambda: _run_command(_parse_arguments(argv)))


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser("python -m aem_exp.tracking", description="Send the missing parts of runs to MLflow.")
    verb = parser.add_subparsers(metavar="sync", required=True).add_parser(
        "sync", help="send runs to MLflow; nothing is sent twice"
    )
    verb.add_argument("run_dir", type=Path, nargs="+", help="run directories, or a folder that contains them")
    verb.add_argument("--uri", help="MLflow store (default: the store that the run was logged to)")
    verb.add_argument("--reconcile", action="store_true", help="also mark dead runs as ended in MLflow")
    return parser.parse_args(argv)


def _run_command(arguments: argparse.Namespace) -> int:
    uri = arguments.uri and store_uri.resolve_uri(arguments.uri, Path.cwd())
    runs = [run for folder in arguments.run_dir for run in find_run_dirs(folder)]
    if arguments.reconcile:
        record_ends(runs)
    for run_dir in runs:
        print(sync_run(run_dir, uri), flush=True)
    return 0
