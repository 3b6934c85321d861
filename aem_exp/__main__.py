"""Command `aem-exp`: composes, resolves and runs one experiment, or calls a subcommand (see `commands`).

Heavy libraries are imported only after the experiment has been checked.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aem_exp import __version__, commands
from aem_exp.core import cli, disk
from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.rundir import EXPERIMENT, RESULT

if TYPE_CHECKING:
    from aem_exp.config import Experiment

USAGE = """\
usage: aem-exp [run] [+experiment=NAME] [GROUP=CHOICE ...] [KEY=VALUE ...] [options]
       aem-exp run RUN_DIR [--inexact] [--trust]
       aem-exp COMMAND ...            (see COMMAND --help; python -m aem_exp is the same command)

Trains one policy in one environment by multi-turn RL, evaluates it on held-out tasks, and saves everything in one folder.
The same command again resumes the run, or shows its result. Without arguments:
{default}.

  aem-exp modulation=none seed=1
  aem-exp trainer.steps=20 env.make.receptacles=5 env.make.openable=2
  aem-exp +experiment=alfworld_1_5b launch=gpu1 --cfg job

Commands
{commands}
  After `run`, a word without `=` is a run dir, and so is a word that begins with / or . : its experiment is run or continued
  unchanged. All other words describe an experiment.
"""
OPTIONS = """\
Options
  from=RUN_DIR      a new run that starts where RUN_DIR ended or was stopped, with its settings: from=RUN_DIR trainer.steps=200
  resume=inexact    continue a run although the code, the libraries or the machine have changed; the run is marked
  plan=true         show the run dir, the size, the requirements and notes on unusual settings; run nothing
  -m                plan a sweep over several values (seed=0,1,2 modulation=none,aem); --submit or --local starts it
  --cfg job         print the composed config and exit; --resolve fills in interpolations
  --config-dir DIR  a config folder of your own; its files add to the groups above, and hide files of the same name
  --trust           continue a run of another user, whose config can call any function
  --hydra-help      the help of Hydra, which composes the config
  --version         print the version
  --completion bash (or zsh) print a script for completion: eval "$(aem-exp --completion bash)"

Folders: $AEM_OUTPUTS or outputs=DIR for runs (default ./outputs), $AEM_CACHE for generated policies
(default ~/.cache/aem_exp)."""

FLAGS = (
    ("-h", "--help"),
    ("--hydra-help",),
    ("-m", "--multirun"),
    ("--submit",),
    ("--local",),
    ("--resolve",),
    ("--trust",),
    ("--version",),
)
VALUE_OPTIONS = (("-c", "--cfg"), ("--config-dir",), ("--completion",))
MAX_DIFFERENCES = 8  # from the nearest run; with more, the comparison is not shown


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    return cli.run_cli(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> int:
    """Run a subcommand or one experiment; `run` is a subcommand only if a run dir follows."""
    if words[:1] == ["--complete"]:  # called by a shell, see `completion`
        from aem_exp.completion import candidates

        print(*candidates(" ".join(words[1:])), sep="\n")
        return 0
    name = commands.find_command(words)
    if name == "run" and commands.find_run_dir(words[1:]) is None:
        name, words = None, words[1:]
    return commands.run_command(name, words[1:]) if name else _run_command(_parse_arguments(words), words)


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for switch in FLAGS:
        parser.add_argument(*switch, action="store_true")
    for option in VALUE_OPTIONS:
        parser.add_argument(*option)
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        raise ConfigError("option", unknown[0], [name for names in (*FLAGS, *VALUE_OPTIONS) for name in names])
    plans = [text for text in arguments.overrides if text.startswith("plan=")]
    for text in plans:
        if text not in ("plan=true", "plan=false"):
            raise ConfigError("plan", text.removeprefix("plan="), ["true", "false"])
    arguments.overrides = [text for text in arguments.overrides if text not in plans]
    arguments.plan = plans[-1:] == ["plan=true"]
    return arguments


def _run_command(arguments: argparse.Namespace, argv: list[str]) -> int:
    if arguments.help:
        print(_help_page(arguments.config_dir))
        return 0
    if arguments.version:
        print(f"aem-exp {__version__}")
        return 0
    if arguments.completion:
        from aem_exp.completion import script

        print(script(arguments.completion), end="")
        return 0
    if arguments.hydra_help:
        return _print_hydra_help()
    if arguments.multirun:
        for option in ("cfg", "resolve", "trust"):
            if getattr(arguments, option):
                raise ConfigError(f"--{option}", getattr(arguments, option), "has no effect with -m")
        return _run_grid(arguments, argv)
    for option in ("submit", "local"):
        if getattr(arguments, option):
            raise ConfigError(
                f"--{option}", True, "has no effect without -m; for one experiment, launch decides where it runs"
            )
    if arguments.cfg not in (None, "job"):
        raise ConfigError("--cfg", arguments.cfg, ["job"])
    if arguments.resolve and not arguments.cfg:
        raise ConfigError("--resolve", True, "has no effect without --cfg job")
    parents = [text.removeprefix("from=") for text in arguments.overrides if text.startswith("from=")]
    cli.add_user_modules(arguments.config_dir, parents, arguments.trust)
    from aem_exp.config import resolve
    from aem_exp.config.compose import compose, to_yaml

    tree = compose(arguments.overrides, arguments.config_dir, arguments.trust)
    experiment = resolve(tree)
    if arguments.cfg:
        print(to_yaml(tree, arguments.resolve), end="")
        return 0
    return _print_plan(experiment) if arguments.plan else _run_experiment(experiment)


def _run_grid(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Run a grid from the command line, which is a sweep without a file."""
    import shlex

    from aem_exp.sweep import command as sweep
    from aem_exp.sweep import question

    cli.add_user_modules(arguments.config_dir)
    options = argparse.Namespace(
        submit=arguments.submit, local=arguments.local, at_once=0, retry=[], archives=None, json=False
    )
    command = shlex.join(["python", "-m", "aem_exp", *argv])
    return sweep.execute_sweep(question.parse_grid(arguments.overrides, arguments.config_dir), options, command)


def _run_experiment(experiment: "Experiment") -> int:
    """Run the experiment unless it is finished, and show its result."""
    from aem_exp.config import run_dir

    _check_machine(experiment)
    folder = run_dir(experiment)
    finished = (folder / RESULT).exists()
    if not finished:
        disk.check_writable(folder if folder.exists() else folder.parent, "outputs")
    header = [f"{'finished' if finished else 'run     '}  {folder}", *_describe_experiment(experiment)]
    if experiment.launch.where == "slurm" and not finished:
        return _submit(experiment, folder, header)
    from aem_exp.run.command import run_in_terminal

    return run_in_terminal(experiment, folder, header)


def _check_machine(experiment: "Experiment") -> None:
    """Refuse an experiment that this machine cannot run, unless it is a job."""
    from aem_exp.config import check_machine

    if experiment.launch.where != "slurm":
        check_machine(experiment)


def _submit(experiment: "Experiment", folder: Path, header: list[str]) -> int:
    """Submit the run to the cluster and return; an active job is not submitted again."""
    from aem_exp.cluster import slurm
    from aem_exp.jobs import dispatch
    from aem_exp.tracking import store_uri

    if by := dispatch.describe_active_job(folder):
        print(*header, f"state   already active: {by}; python -m aem_exp.status shows it", sep="\n")
        return 0
    ((_, job),) = dispatch.submit_runs([experiment], experiment.name, folder / "slurm")
    print(*header, sep="\n")
    print(f"size    {_format_size(experiment)}", f"launch  {_format_launch(experiment)}", f"job     {job}", sep="\n")
    print(f"log     {slurm.read_job_record(folder)['log']}")
    uri = store_uri.resolve_uri(experiment.tracking, folder.parent)
    if uri != store_uri.OFF and not store_uri.is_databricks(uri):
        for heading, text in store_uri.store_page(uri, "#/experiments").lines():
            print(f"{heading:<7} {text}")
    print("next    python -m aem_exp.status")
    return 0


def _format_size(experiment: "Experiment") -> str:
    t = experiment.trainer
    return f"{t.steps} steps x {t.tasks_per_step} tasks x {t.group_size} trajectories"


def _format_launch(experiment: "Experiment") -> str:
    launch = experiment.launch
    hours = f", at most {launch.hours:g} h" if launch.hours else ""
    serve = f" plus {launch.server_nodes} for servers" if launch.server_nodes else ""
    serve += f" plus {launch.worker_nodes} for environments" if launch.worker_nodes else ""
    return f"{launch.where}, nodes {launch.nodes}{serve}, GPUs per node {launch.gpus_per_node}{hours}"


def _print_plan(experiment: "Experiment") -> int:
    """Print what running the experiment would do."""
    from aem_exp.config import run_dir

    folder = run_dir(experiment)
    print(f"run     {folder}")
    print(f"state   {_format_state(folder)}")
    print(f"size    {_format_size(experiment)}")
    print(f"launch  {_format_launch(experiment)}")
    for line in _describe_experiment(experiment):
        print(line)
    for check in (_check_fit, _check_world):
        try:
            check(experiment)
        except MissingResource as error:
            print(f"note    missing on this machine: {error}")
    return 0


def _check_fit(experiment: "Experiment") -> None:
    """Print the cost of a step, and refuse an experiment that does not fit in memory."""
    from aem_exp.jobs import fit, plan

    for heading, text in plan.plan_lines(experiment):
        print(f"{heading:<7} {text}")
    fit.check_memory(experiment)


def _check_world(experiment: "Experiment") -> None:
    from aem_exp.jobs.preflight import open_checked_world

    _check_machine(experiment)
    world = open_checked_world(experiment)
    if experiment.launch.gpus_per_node or experiment.model.path is None:
        return
    from aem_exp.jobs import ram

    if need := ram.check_ram(experiment, world):
        print(f"RAM     {need}", *(f"note    {note}" for note in need.warnings(experiment)), sep="\n")


def _format_state(folder: Path) -> str:
    from aem_exp.jobs.dispatch import describe_active_job

    if (folder / RESULT).exists():
        return "finished; running it shows the result"
    if by := describe_active_job(folder):
        return f"active: {by}"
    return "started; running it again resumes it" if (folder / EXPERIMENT).exists() else "new"


def _describe_experiment(experiment: "Experiment") -> list[str]:
    """Notes on the experiment and, if it is new, its differences from its parent or from the nearest existing run."""
    from aem_exp.config import diff, nearest_run, notes, read, run_dir
    from aem_exp.jobs import plan

    lines = [f"note    {note}" for note in (*notes(experiment), *plan.context_warnings(experiment))]
    if experiment.parent_dir and not run_dir(experiment).exists():
        parent = read(experiment.parent_dir, trust=True)
        start = f"from    {Path(experiment.parent_dir).name}, at step {experiment.parent_steps}"
        return [*lines, start, *(f"        {x}" for x in diff(parent, experiment))]
    near = None if run_dir(experiment).exists() else nearest_run(experiment)
    if near and 0 < len(near[1]) <= MAX_DIFFERENCES:
        lines += [f"unlike  {near[0].name}", *(f"        {line}" for line in near[1])]
    return lines


def _help_page(config_dir: str | None) -> str:
    """The help page: every group of configs, its choices, and the first comment line of each file."""
    from aem_exp.config import config_roots, list_choices

    roots = config_roots(config_dir)
    default = _first_comment(next(root / "config.yaml" for root in roots if (root / "config.yaml").is_file()))
    subcommands = "\n".join(f"  {name:<9} {command.about}" for name, command in commands.COMMANDS.items())
    lines = [USAGE.format(default=default.rpartition(": ")[2], commands=subcommands)]
    for group, files in list_choices(roots).items():
        lines.append(f"+{group}=" if group == "experiment" else f"{group}=")
        width = max(22, *map(len, files))
        lines += [f"  {name:<{width}} {_first_comment(file)}" for name, file in files.items()]
        lines.append("")
    return "\n".join([*lines, OPTIONS])


def _first_comment(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        text = stream.read(65536).decode(errors="replace")
    comments = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#"))
    return next((comment for comment in comments if comment and not comment.startswith("@")), "")


def _print_hydra_help() -> int:
    import warnings

    import hydra

    from aem_exp.config import conf_root

    warnings.simplefilter("ignore")
    sys.argv = [sys.argv[0], "--hydra-help"]
    hydra.main(config_path=str(conf_root()), config_name="config", version_base="1.3")(lambda _: None)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
