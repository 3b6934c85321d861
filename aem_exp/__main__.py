"""Command `aem-exp`: composes, resolves and runs one experiment, or calls a subcommand (see `commands`).

Nothing heavy is imported before the experiment is valid.
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
       aem-exp COMMAND ...            (COMMAND --help says more; python -m aem_exp does all this as well)

Trains one policy in one world by multi-turn RL, evaluates it on tasks it has not seen, and keeps everything in one
folder. Asked again, it resumes, or shows what is there. Without arguments:
{default}.

  aem-exp modulation=none seed=1
  aem-exp trainer.steps=20 env.make.receptacles=6
  aem-exp +experiment=alfworld_1_5b launch=gpu1 --cfg job

Commands
{commands}
  After `run`, a word without `=` is a run dir (so is one with `=` that begins with / or .): what it holds is run, or gone
  on with, as it was. All other words describe an experiment.
"""
OPTIONS = """\
Options
  from=RUN_DIR      begin where a run ended or was stopped, with its settings: from=RUN_DIR trainer.steps=200
  resume=inexact    go on with a run although code, libraries or machine have changed; the run is marked
  plan=true         show the run's folder, its size, what it needs and what is odd about it; run nothing
  -m                several values (seed=0,1,2 modulation=none,aem): a sweep; --submit or --local carries it out
  --cfg job         print the composed config and stop; --resolve fills in interpolations
  --config-dir DIR  lay a folder of your own over conf/: its files add to the groups below
  --trust           continue a run of somebody else's; its config can call any function
  --hydra-help      help of the library that composes the config
  --version         the version, and nothing else
  --completion bash (or zsh) print what completes commands, groups and choices: eval "$(aem-exp --completion bash)"

Folders: $AEM_OUTPUTS or outputs=DIR holds the runs (default ./outputs), $AEM_CACHE the policies that are made here
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
MAX_DIFFERENCES = 8  # of a run that is worth comparing with


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return cli.run_cli(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> int:
    """Carry out a subcommand, or one experiment; `run` is a subcommand where it is followed by a run dir."""
    if words[:1] == ["--complete"]:  # a shell asks, see `completion`
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
    asked, strange = parser.parse_known_intermixed_args(argv)
    if strange:
        raise ConfigError("option", strange[0], [name for names in (*FLAGS, *VALUE_OPTIONS) for name in names])
    plans = [text for text in asked.overrides if text.startswith("plan=")]
    for text in plans:
        if text not in ("plan=true", "plan=false"):
            raise ConfigError("plan", text.removeprefix("plan="), ["true", "false"])
    asked.overrides = [text for text in asked.overrides if text not in plans]
    asked.plan = plans[-1:] == ["plan=true"]
    return asked


def _run_command(asked: argparse.Namespace, argv: list[str]) -> int:
    if asked.help:
        print(_help_page(asked.config_dir))
        return 0
    if asked.version:
        print(f"aem-exp {__version__}")
        return 0
    if asked.completion:
        from aem_exp.completion import script

        print(script(asked.completion), end="")
        return 0
    if asked.hydra_help:
        return _print_hydra_help()
    if asked.multirun:
        for option in ("cfg", "resolve", "trust"):
            if getattr(asked, option):
                raise ConfigError(f"--{option}", getattr(asked, option), "only read for one experiment, without -m")
        return _run_grid(asked, argv)
    for option in ("submit", "local"):
        if getattr(asked, option):
            raise ConfigError(f"--{option}", True, "only read with -m; one experiment runs where its launch says")
    if asked.cfg not in (None, "job"):
        raise ConfigError("--cfg", asked.cfg, ["job"])
    if asked.resolve and not asked.cfg:
        raise ConfigError("--resolve", True, "only read with --cfg job")
    parents = [text.removeprefix("from=") for text in asked.overrides if text.startswith("from=")]
    cli.add_user_modules(asked.config_dir, parents, asked.trust)
    from aem_exp.config import resolve
    from aem_exp.config.compose import compose, to_yaml

    tree = compose(asked.overrides, asked.config_dir, asked.trust)
    experiment = resolve(tree)
    if asked.cfg:
        print(to_yaml(tree, asked.resolve), end="")
        return 0
    return _print_plan(experiment) if asked.plan else _run_experiment(experiment)


def _run_grid(asked: argparse.Namespace, argv: list[str]) -> int:
    """A grid of the command line is a sweep without a file."""
    import shlex

    from aem_exp.sweep import command as sweep
    from aem_exp.sweep import question

    cli.add_user_modules(asked.config_dir)
    how = argparse.Namespace(submit=asked.submit, local=asked.local, at_once=0, retry=[], json=False)
    typed = shlex.join(["python", "-m", "aem_exp", *argv])
    return sweep.execute_sweep(question.parse_grid(asked.overrides, asked.config_dir), how, typed)


def _run_experiment(experiment: "Experiment") -> int:
    """Run the experiment, or leave it alone where it is finished, and show what its folder holds."""
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
    """Refuse what cannot run here, where it would."""
    from aem_exp.config import check_machine

    if experiment.launch.where != "slurm":
        check_machine(experiment)


def _submit(experiment: "Experiment", folder: Path, header: list[str]) -> int:
    """Send the run to the cluster and return; asked twice, it is not sent again."""
    from aem_exp.cluster import slurm
    from aem_exp.jobs import dispatch
    from aem_exp.tracking import store_uri

    if by := dispatch.describe_active_job(folder):
        print(*header, f"state   already on its way: {by}; python -m aem_exp.status shows it", sep="\n")
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
    serve = f" and {launch.server_nodes} that serve" if launch.server_nodes else ""
    return f"{launch.where}, nodes {launch.nodes}{serve}, GPUs per node {launch.gpus_per_node}{hours}"


def _print_plan(experiment: "Experiment") -> int:
    """Say what would happen."""
    from aem_exp.config import run_dir

    folder = run_dir(experiment)
    print(f"run     {folder}")
    print(f"state   {_format_state(folder)}")
    print(f"size    {_format_size(experiment)}")
    print(f"launch  {_format_launch(experiment)}")
    for line in _describe_experiment(experiment):
        print(line)
    for ask in (_check_fit, _check_world):
        try:
            ask(experiment)
        except MissingResource as error:
            print(f"note    not here: {error}")
    return 0


def _check_fit(experiment: "Experiment") -> None:
    """Say what a step takes, and refuse what does not fit."""
    from aem_exp.jobs import fit, plan

    for heading, text in plan.plan_lines(experiment):
        print(f"{heading:<7} {text}")
    fit.check_memory(experiment)


def _check_world(experiment: "Experiment") -> None:
    from aem_exp.jobs.preflight import open_checked_world

    _check_machine(experiment)
    open_checked_world(experiment)


def _format_state(folder: Path) -> str:
    from aem_exp.jobs.dispatch import describe_active_job

    if (folder / RESULT).exists():
        return "finished: asking shows it"
    if by := describe_active_job(folder):
        return f"on its way: {by}"
    return "begun: asking resumes it" if (folder / EXPERIMENT).exists() else "new"


def _describe_experiment(experiment: "Experiment") -> list[str]:
    """What is odd about the experiment, and, where it is new, how it differs from the nearest run there is."""
    from aem_exp.config import diff, nearest_run, notes, read, run_dir
    from aem_exp.jobs import plan

    odd = [f"note    {note}" for note in (*notes(experiment), *plan.context_warnings(experiment))]
    if experiment.parent_dir and not run_dir(experiment).exists():
        parent = read(experiment.parent_dir, trust=True)
        begun = f"from    {Path(experiment.parent_dir).name}, at step {experiment.parent_steps}"
        return [*odd, begun, *(f"        {x}" for x in diff(parent, experiment))]
    near = None if run_dir(experiment).exists() else nearest_run(experiment)
    if near and 0 < len(near[1]) <= MAX_DIFFERENCES:
        odd += [f"unlike  {near[0].name}", *(f"        {line}" for line in near[1])]
    return odd


def _help_page(config_dir: str | None) -> str:
    """The page: every group of `conf/`, every choice, and the first comment of its file."""
    from aem_exp.config import config_roots, list_choices

    roots = config_roots(config_dir)
    default = _first_comment(next(root / "config.yaml" for root in roots if (root / "config.yaml").is_file()))
    known = "\n".join(f"  {name:<9} {command.about}" for name, command in commands.COMMANDS.items())
    lines = [USAGE.format(default=default.rpartition(": ")[2], commands=known)]
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
