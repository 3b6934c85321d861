"""Command `python -m aem_exp.branch RUN_DIR`: compares modulations by one update each, from the same weights on the same batch.

Differences between runs contain the noise of all their steps. Here, all arms share weights, optimizer state and episodes, so
that their differences are those of the modulation alone.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aem_exp.config import ConfigError
from aem_exp.core import cli, disk
from aem_exp.rundir import RESULT

if TYPE_CHECKING:
    from pathlib import Path

    from aem_exp.branch.request import BranchSetup
    from aem_exp.evaluate.display import ProgressLine

ARMS = "none,aem,shuffled_state,reversed"
SGD_KL = 1e-3  # nats: the size of an update with --optimizer sgd
FIGURE = "branches.png"
OBSERVED = ("own_entropy", "entropy")
COLUMNS = {  # of the table of means
    "predicted": "A (S - H)",
    "own_entropy": "dH first",
    "entropy": "dH fixed",
    "own_kl": "KL first",
    "kl": "KL fixed",
    "norm": "norm",
}
ABOUT = """\
Compare modulations by one update each: from the same checkpoint of a run, with the same state of the optimizer, on the same
newly played batch of training episodes. Measure the change of the response entropy H(s) and the KL of each update, and compare
the changes with A (S - H(s)), which the theory predicts. A repeated command continues where it stopped, or shows the result;
with more --batches it adds the missing ones.

  python -m aem_exp.branch outputs/household-tiny-grpo-aem-s0-0123456789ab
  python -m aem_exp.branch RUN_DIR --step 0 --arms none,aem,reversed --batches 10
  python -m aem_exp.branch RUN_DIR --optimizer sgd --kl 0.001
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "aem_exp.branch", *argv])
    return cli.run_cli(lambda: _run_command(_parse_arguments(argv)), lambda: f"to continue: {command}")


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("python -m aem_exp.branch", description=ABOUT, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("target", nargs="?", metavar="RUN_DIR", help="run directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of launch or outputs")
    parser.add_argument("--arms", default=ARMS, help=f"files of conf/modulation; the first is the reference ({ARMS})")
    parser.add_argument("--batches", type=int, default=30, help="number of batches (default: 30)")
    parser.add_argument("--step", type=int, help="trained steps; 0: the start of the run (default: newest checkpoint)")
    parser.add_argument("--panel", default="dev", help="panel of tasks whose episodes give the states (default: dev)")
    parser.add_argument("--states", type=int, default=32, help="number of fixed states (default: 32)")
    parser.add_argument("--samples", type=int, default=16, help="number of responses at each state (default: 16)")
    parser.add_argument(
        "--optimizer",
        choices=("run", "sgd"),
        default="run",
        help="run: that of the run, with its state (default); sgd: the plain gradient, scaled to --kl",
    )
    parser.add_argument(
        "--kl", type=float, help=f"scale each update to this KL in nats (default: not scaled; with sgd {SGD_KL:g})"
    )
    parser.add_argument("--json", action="store_true", help="print only the results, as JSON")
    parser.add_argument("--config-dir", help="folder of your own configs, which take precedence over conf/")
    parser.add_argument(
        "--trust", action="store_true", help="read another user's run; its config can call any function"
    )
    arguments = parser.parse_intermixed_args(argv)
    _check_arguments(arguments)
    return arguments


def _check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.target is None or "=" in arguments.target:
        raise ConfigError("RUN_DIR", arguments.target, "the first argument must be a run directory")
    if words := [text for text in arguments.overrides if "=" not in text]:
        raise ConfigError("RUN_DIR", words[0], f"only one run directory is allowed ({arguments.target} is given)")
    for option, least in (("batches", 1), ("states", 1), ("samples", 2)):
        if (value := getattr(arguments, option)) < least:
            raise ConfigError(f"--{option}", value, f"must be a whole number of at least {least}")
    if arguments.kl is not None and not 0 < arguments.kl < float("inf"):
        raise ConfigError("--kl", arguments.kl, "must be above 0, in nats")
    if arguments.optimizer == "sgd" and arguments.kl is None:
        arguments.kl = SGD_KL
    names = arguments.arms.split(",")
    if len(set(names)) < len(names):
        raise ConfigError("--arms", arguments.arms, "must name each arm once")


def _run_command(arguments: argparse.Namespace) -> int:
    from aem_exp.core import console

    console.silence_libraries()
    cli.add_user_modules(arguments.config_dir, [arguments.target], arguments.trust)
    from aem_exp.branch.request import prepare_branches
    from aem_exp.evaluate.display import ProgressLine

    with ProgressLine() as line:
        setup = prepare_branches(arguments)
        result = compare_branches(setup, arguments.batches, line)
    if arguments.json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        print_result(result, setup.folder)
    return 0


def compare_branches(setup: "BranchSetup", batches: int, line: "ProgressLine") -> dict[str, Any]:
    """Take the missing branches, write `result.json` and the figure, and return the result."""
    from aem_exp.branch.result import build_result, differences
    from aem_exp.core import plots
    from aem_exp.evaluate.evaluation import lock_folder

    file = setup.folder / RESULT
    if file.exists() and (result := disk.read_json(file, "batches", "arms"))["batches"] == batches:
        return result
    disk.check_writable(setup.folder, "outputs")
    with lock_folder(setup.folder, line):
        from aem_exp.branch.session import read_batches, take_branches

        done = len(read_batches(setup))
        if done < batches:
            take_branches(setup, range(done, batches), line)
        rows = read_batches(setup)[:batches]
        result = build_result(rows, list(setup.arms), setup.identity)
        if len(setup.arms) > 1:
            titles = {"own_entropy": "first turns of the batch", "entropy": "fixed states"}
            panels = {titles[name]: differences(rows, list(setup.arms), name) for name in OBSERVED}
            plots.draw_predictions(panels, result["reference"], setup.folder / FIGURE)
        disk.write_atomically(file, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def print_result(result: dict[str, Any], folder: "Path") -> None:
    """Print the means of each arm, its differences from the reference, and the files."""
    from aem_exp.core import console

    terminal, reference, arms = console.make_console(), result["reference"], result["arms"]

    def print_table(title: str, headings: Sequence[str], rows: list[tuple[str, ...]]) -> None:
        terminal.print(f"\n[italic]{title}[/italic]")
        terminal.print(console.make_table(("", *headings), rows, left=("",), gap=1))

    rows = [(arm, *(_number(of_arm[name]["mean"]) for name in COLUMNS)) for arm, of_arm in arms.items()]
    print_table(f"one update of each arm: means over {result['batches']} batches", list(COLUMNS.values()), rows)
    compared = {arm: of_arm for arm, of_arm in arms.items() if "difference" in of_arm}
    for suffix, title in (("", "dH"), ("_per_root_kl", "dH / root of KL")) if compared else ():
        names = (f"own_entropy{suffix}", f"entropy{suffix}")
        rows = [(arm, *(_interval(of_arm["difference"][name]) for name in names)) for arm, of_arm in compared.items()]
        print_table(f"{title}, minus {reference} in the same batch [95 %]", ("first turns", "fixed states"), rows)
    rows = [
        (
            f"{arm} - {reference}" if arm in compared else arm,
            *(_agreement(of_arm["agreement"][name]) for name in OBSERVED),
        )
        for arm, of_arm in arms.items()
    ]
    print_table("batches in which dH has the predicted sign; correlation r", ("first turns", "fixed states"), rows)
    share = result["smallest_effective_share"]
    legend = ["dH: change of the response entropy H(s), in nats; at the first turns of the batch, and at fixed states"]
    if share is not None and share < 0.5:
        legend.append(f"the updates are large (effective share of the samples: {share:.0%}); lower --kl")
    terminal.print("", *legend, str(folder / RESULT), sep="\n", soft_wrap=True, markup=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _interval(estimate: dict[str, float | None]) -> str:
    return f"{_number(estimate['mean'])} [{_number(estimate['low'])}, {_number(estimate['high'])}]"


def _agreement(agreement: dict[str, Any]) -> str:
    return f"{agreement['agree']} of {agreement['batches']}, r = {_number(agreement['r'])}"


if __name__ == "__main__":
    sys.exit(main())
