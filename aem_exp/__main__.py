"""Door: the command `aem-exp`. One experiment, composed, resolved, and run here; or a subcommand (see `commands`).

Nothing heavy is imported before the experiment is known to be sound, and `--help` does not even import Hydra. A user's
mistake is one sentence and exit code 2.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aem_exp import __version__, commands
from aem_exp.core import cli, disk
from aem_exp.core.errors import ConfigError, Missing
from aem_exp.rundir import RESULT

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
  After `execution`, a word without `=` is a run dir (so is one with `=` that begins with / or .): what it holds is run, or gone
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

SWITCHES = (
    ("-h", "--help"),
    ("--hydra-help",),
    ("-m", "--multirun"),
    ("--submit",),
    ("--local",),
    ("--resolve",),
    ("--trust",),
    ("--version",),
)
VALUED = (("-c", "--cfg"), ("--config-dir",), ("--completion",))
MOST_DIFFERENCES = 8  # of a run that is worth comparing with


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return cli.answer(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> int:
    """Carry out a subcommand, or one experiment; `execution` is a subcommand where it is followed by a run dir."""
    if words[:1] == ["--complete"]:  # a shell asks, see `completion`
        from aem_exp.completion import candidates

        print(*candidates(" ".join(words[1:])), sep="\n")
        return 0
    name = commands.asked(words)
    if name == "run" and commands.run_dir(words[1:]) is None:
        name, words = None, words[1:]
    return commands.carry_out(name, words[1:]) if name else _act(_read(words), words)


def _read(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for switch in SWITCHES:
        parser.add_argument(*switch, action="store_true")
    for option in VALUED:
        parser.add_argument(*option)
    asked, strange = parser.parse_known_intermixed_args(argv)
    if strange:
        raise ConfigError("option", strange[0], [name for names in (*SWITCHES, *VALUED) for name in names])
    plans = [text for text in asked.overrides if text.startswith("plan=")]
    for text in plans:
        if text not in ("plan=true", "plan=false"):
            raise ConfigError("plan", text.removeprefix("plan="), ["true", "false"])
    asked.overrides = [text for text in asked.overrides if text not in plans]
    asked.plan = plans[-1:] == ["plan=true"]
    return asked


def _act(asked: argparse.Namespace, argv: list[str]) -> int:
    if asked.help:
        print(_help(asked.config_dir))
        return 0
    if asked.version:
        print(f"aem-exp {__version__}")
        return 0
    if asked.completion:
        from aem_exp.completion import script

        print(script(asked.completion), end="")
        return 0
    if asked.hydra_help:
        return _hydra_help()
    if asked.multirun:
        for option in ("cfg", "resolve", "trust"):
            if getattr(asked, option):
                raise ConfigError(f"--{option}", getattr(asked, option), "only read for one experiment, without -m")
        return _grid(asked, argv)
    for option in ("submit", "local"):
        if getattr(asked, option):
            raise ConfigError(f"--{option}", True, "only read with -m; one experiment runs where its launch says")
    if asked.cfg not in (None, "job"):
        raise ConfigError("--cfg", asked.cfg, ["job"])
    if asked.resolve and not asked.cfg:
        raise ConfigError("--resolve", True, "only read with --cfg job")
    parents = [text.removeprefix("from=") for text in asked.overrides if text.startswith("from=")]
    cli.reach(asked.config_dir, parents, asked.trust)
    from aem_exp.config import resolve
    from aem_exp.config.compose import compose, to_yaml

    tree = compose(asked.overrides, asked.config_dir, asked.trust)
    experiment = resolve(tree)
    if asked.cfg:
        print(to_yaml(tree, asked.resolve), end="")
        return 0
    return _plan(experiment) if asked.plan else _run(experiment)


def _grid(asked: argparse.Namespace, argv: list[str]) -> int:
    """A grid of the command line is a sweep without a file."""
    import shlex

    from aem_exp.sweep import command as sweep
    from aem_exp.sweep import question

    cli.reach(asked.config_dir)
    how = argparse.Namespace(submit=asked.submit, local=asked.local, at_once=0, retry=[], json=False)
    typed = shlex.join(["python", "-m", "aem_exp", *argv])
    return sweep.carry_out(question.grid(asked.overrides, asked.config_dir), how, typed)


def _run(experiment: "Experiment") -> int:
    """Run the experiment, or leave it alone where it is finished, and show what its folder holds."""
    from aem_exp.config import run_dir

    _check(experiment)
    folder = run_dir(experiment)
    finished = (folder / RESULT).exists()
    if not finished:
        disk.check_writable(folder if folder.exists() else folder.parent, "outputs")
    header = [f"{'finished' if finished else 'run     '}  {folder}", *_about(experiment)]
    if experiment.launch.where == "slurm" and not finished:
        return _submit(experiment, folder, header)
    from aem_exp.run.command import at_terminal

    return at_terminal(experiment, folder, header)


def _check(experiment: "Experiment") -> None:
    """Refuse what cannot run here, where it would."""
    from aem_exp.config import check_here

    if experiment.launch.where != "slurm":
        check_here(experiment)


def _submit(experiment: "Experiment", folder: Path, header: list[str]) -> int:
    """Send the run to the cluster and return; asked twice, it is not sent again."""
    from aem_exp.cluster import slurm
    from aem_exp.jobs import dispatch
    from aem_exp.tracking import store_uri

    if by := dispatch.on_its_way(folder):
        print(*header, f"state   already on its way: {by}; python -m aem_exp.status shows it", sep="\n")
        return 0
    ((_, job),) = dispatch.send([experiment], experiment.name, folder / "slurm")
    print(*header, sep="\n")
    print(f"size    {_size(experiment)}", f"launch  {_machine(experiment)}", f"job     {job}", sep="\n")
    print(f"log     {slurm.card(folder)['log']}")
    uri = store_uri.resolve_uri(experiment.tracking, folder.parent)
    if uri != store_uri.OFF and not store_uri.serverless(uri):
        for heading, text in store_uri.page(uri, "#/experiments").lines():
            print(f"{heading:<7} {text}")
    print("next    python -m aem_exp.status")
    return 0


def _size(experiment: "Experiment") -> str:
    t = experiment.trainer
    return f"{t['steps']} steps x {t['tasks_per_step']} tasks x {t['group_size']} trajectories"


def _machine(experiment: "Experiment") -> str:
    launch = experiment.launch
    hours = f", at most {launch.hours:g} h" if launch.hours else ""
    serve = f" and {launch.server_nodes} that serve" if launch.server_nodes else ""
    return f"{launch.where}, nodes {launch.nodes}{serve}, GPUs per node {launch.gpus_per_node}{hours}"


def _plan(experiment: "Experiment") -> int:
    """Say what would happen."""
    from aem_exp.config import run_dir

    folder = run_dir(experiment)
    print(f"run     {folder}")
    print(f"state   {_state(folder)}")
    print(f"size    {_size(experiment)}")
    print(f"launch  {_machine(experiment)}")
    for line in _about(experiment):
        print(line)
    for ask in (_needs, _could):
        try:
            ask(experiment)
        except Missing as error:
            print(f"note    not here: {error}")
    return 0


def _needs(experiment: "Experiment") -> None:
    """Say what a step takes, and refuse what does not fit."""
    from aem_exp.jobs import fit

    for heading, text in fit.lines(experiment):
        print(f"{heading:<7} {text}")
    fit.check(experiment)


def _could(experiment: "Experiment") -> None:
    from aem_exp.jobs.preflight import fitting

    _check(experiment)
    fitting(experiment)


def _state(folder: Path) -> str:
    from aem_exp.jobs.dispatch import on_its_way

    if (folder / RESULT).exists():
        return "finished: asking shows it"
    if by := on_its_way(folder):
        return f"on its way: {by}"
    return "begun: asking resumes it" if (folder / "experiment.json").exists() else "new"


def _about(experiment: "Experiment") -> list[str]:
    """What is odd about the experiment, and, where it is new, how it differs from the nearest run there is."""
    from aem_exp.config import diff, nearest, notes, read, run_dir
    from aem_exp.jobs import fit

    odd = [f"note    {note}" for note in (*notes(experiment), *fit.notes(experiment))]
    if experiment.parent_dir and not run_dir(experiment).exists():
        parent = read(experiment.parent_dir, trust=True)
        begun = f"from    {Path(experiment.parent_dir).name}, at step {experiment.parent_steps}"
        return [*odd, begun, *(f"        {x}" for x in diff(parent, experiment))]
    near = None if run_dir(experiment).exists() else nearest(experiment)
    if near and 0 < len(near[1]) <= MOST_DIFFERENCES:
        odd += [f"unlike  {near[0].name}", *(f"        {line}" for line in near[1])]
    return odd


def _help(config_dir: str | None) -> str:
    """The page: every group of `conf/`, every choice, and the first comment of its file."""
    from aem_exp.config import choices, config_roots

    roots = config_roots(config_dir)
    default = _description(next(root / "config.yaml" for root in roots if (root / "config.yaml").is_file()))
    known = "\n".join(f"  {name:<9} {command.about}" for name, command in commands.COMMANDS.items())
    lines = [USAGE.format(default=default.rpartition(": ")[2], commands=known)]
    for group, files in choices(roots).items():
        lines.append(f"+{group}=" if group == "experiment" else f"{group}=")
        width = max(22, *map(len, files))
        lines += [f"  {name:<{width}} {_description(file)}" for name, file in files.items()]
        lines.append("")
    return "\n".join([*lines, OPTIONS])


def _description(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        text = stream.read(65536).decode(errors="replace")
    comments = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#"))
    return next((comment for comment in comments if comment and not comment.startswith("@")), "")


def _hydra_help() -> int:
    import warnings

    import hydra

    from aem_exp.config import conf_root

    warnings.simplefilter("ignore")
    sys.argv = [sys.argv[0], "--hydra-help"]
    hydra.main(config_path=str(conf_root()), config_name="config", version_base="1.3")(lambda _: None)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
