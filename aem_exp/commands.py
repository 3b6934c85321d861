"""The subcommands of `aem-exp` and the modules that implement them.

A module is imported only when its command is called, so that `--help` is fast.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Final

from aem_exp.core.errors import ConfigError


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Args:
        module: a module with a function `main`, which reads `sys.argv` and returns the exit code.
        about: one line for the help.
        leading_arguments: arguments that are passed to the module before those of the user.
    """

    module: str
    about: str
    leading_arguments: tuple[str, ...] = ()


COMMANDS: Final = {
    "run": Command("run.command", "run an experiment (also without the word run), or continue RUN_DIR"),
    "sweep": Command("sweep.command", "plan a sweep; run or submit its missing runs"),
    "status": Command("status", "show the progress of runs, and why runs failed"),
    "report": Command("report.command", "compare the arms of a sweep, and write a page"),
    "evaluate": Command("evaluate.command", "score the policy of a run, or any model, on held-out tasks"),
    "proxy": Command("proxy.command", "measure how well token entropy predicts relative surprisal"),
    "branch": Command(
        "branch.command", "compare modulations by one update each, from the same weights on the same batch"
    ),
    "serve": Command("jobs.serve", "serve the policy of an experiment with vLLM on this machine"),
    "offer": Command("offer", "serve an environment as an OpenEnv server"),
    "prepare": Command("prepare", "download and build what an experiment or a sweep needs"),
    "sync": Command("tracking.command", "send missing data of runs to MLflow", leading_arguments=("sync",)),
    "ui": Command("ui", "serve the MLflow store of these runs on this machine, and print its link"),
}


def find_command(words: list[str]) -> str | None:
    """Return the subcommand at the start of a command line; None if the line describes an experiment.

    Raises:
        ConfigError: the first word is neither a subcommand nor part of an experiment.
    """
    if not words or "=" in words[0] or words[0][:1] in ("-", "+", "~", ""):
        return None
    if words[0] not in COMMANDS:
        raise ConfigError("command", words[0], COMMANDS, "or describe an experiment with GROUP=CHOICE KEY=VALUE")
    return words[0]


def run_command(name: str, words: list[str]) -> int:
    """Call the module of a subcommand with the words of the user, and return its exit code."""
    command = COMMANDS[name]
    main = import_module(f"aem_exp.{command.module}").main
    sys.argv = [f"aem-exp {name}", *command.leading_arguments, *words]
    return int(main())


def find_run_dir(words: list[str]) -> str | None:
    """Return the run dir among the words after `run`; None if they describe an experiment.

    A word with `=` is an override, unless it begins with a slash or a dot.
    """
    values = {i + 1 for i, word in enumerate(words) if word in ("--config-dir", "-c", "--cfg")}
    plain = [word for i, word in enumerate(words) if i not in values and not word.startswith("-")]
    folders = [word for word in plain if word[:1] in "/." or ("=" not in word and word[:1] not in "+~")]
    if folders and len(plain) > len(folders):
        raise ConfigError(
            "run",
            folders[0],
            "takes either a run dir or overrides; for a new run that continues this one, use from=RUN_DIR",
        )
    return folders[0] if folders else None
