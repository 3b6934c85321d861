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
        module: has a `main`, which reads `sys.argv` and returns the exit code.
        about: what it does, in one line of the help.
        leading_arguments: words that its module is given before those of the user.
    """

    module: str
    about: str
    leading_arguments: tuple[str, ...] = ()


COMMANDS: Final = {
    "run": Command("run.command", "run an experiment (the same as without a command), or go on with RUN_DIR"),
    "sweep": Command("sweep.command", "plan a sweep, then run or submit what is missing of it"),
    "status": Command("status", "show how far runs are, what failed, and why"),
    "report": Command("report.command", "compare the arms of a sweep, on a page"),
    "evaluate": Command("evaluate.command", "score a run's policy, or any model, on held-out tasks"),
    "proxy": Command("proxy", "measure how well token entropy tells relative surprisal"),
    "prepare": Command("prepare", "fetch and build what an experiment or a sweep needs"),
    "sync": Command("tracking.command", "send MLflow what it lacks of runs", leading_arguments=("sync",)),
    "ui": Command("ui", "serve the MLflow store of these runs on this machine, and show its link"),
}


def find_command(words: list[str]) -> str | None:
    """Return the subcommand that a command line begins with; None where it describes an experiment.

    Raises:
        ConfigError: the first word is neither.
    """
    if not words or "=" in words[0] or words[0][:1] in ("-", "+", "~", ""):
        return None
    if words[0] not in COMMANDS:
        raise ConfigError("command", words[0], COMMANDS, "or an experiment: GROUP=CHOICE KEY=VALUE")
    return words[0]


def run_command(name: str, words: list[str]) -> int:
    """Let the module of a subcommand read the user's words; the exit code."""
    command = COMMANDS[name]
    main = import_module(f"aem_exp.{command.module}").main
    sys.argv = [f"aem-exp {name}", *command.leading_arguments, *words]
    return int(main())


def find_run_dir(words: list[str]) -> str | None:
    """Return the run dir among the words after `run`; None where they describe an experiment.

    An override has an equals sign; a path may have one as well, and then begins with a slash or a dot.
    """
    values = {i + 1 for i, word in enumerate(words) if word in ("--config-dir", "-c", "--cfg")}
    plain = [word for i, word in enumerate(words) if i not in values and not word.startswith("-")]
    folders = [word for word in plain if word[:1] in "/." or ("=" not in word and word[:1] not in "+~")]
    if folders and len(plain) > len(folders):
        raise ConfigError("run", folders[0], "takes a run dir, or overrides, not both; from=RUN_DIR continues a run")
    return folders[0] if folders else None
