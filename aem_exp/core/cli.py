"""Shared parts of all commands: the argument parser, the user's own modules on `sys.path`, and exit codes.

A mistake of the user is printed as one sentence, and the exit code is 2.
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from aem_exp.core import trust
from aem_exp.core.errors import ConfigError, RunError, redact

JOB_SAFE_PATH = "job"  # PYTHONSAFEPATH in our jobs: the frozen code comes first, and the current folder may follow


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises `ConfigError` instead of printing its usage page.

    When started by the command `aem-exp`, the usage line shows that command.
    """

    def __init__(self, prog: str | None = None, **rest: Any) -> None:
        super().__init__(sys.argv[0] if sys.argv[0].startswith("aem-exp ") else prog, **rest)

    def error(self, message: str) -> NoReturn:
        subject, _, detail = message.partition(": ")
        if subject == "unrecognized arguments":
            raise ConfigError("option", detail, "no such option; see --help")
        if subject == "the following arguments are required":
            raise ConfigError(detail, None, "must be given; see --help")
        raise ConfigError("option", subject.removeprefix("argument "), detail or "see --help")


def add_user_modules(
    config_dir: str | Path | None = None, runs: Sequence[str | Path] = (), trusted: bool = False
) -> None:
    """Append the folders of the user's own modules to `sys.path`.

    They come after the standard library, in this order: the current folder, `config_dir`, and the code copies in `runs`.

    Raises:
        ConfigError: a run dir belongs to another user and is not trusted. `sys.path` is then unchanged.
    """
    for run_dir in runs:
        trust.check_run_dir(run_dir, trusted)
    folders = [
        *_current_folder(),
        *([] if config_dir is None else [config_dir]),
        *(_code_folder(run_dir) for run_dir in runs),
    ]
    sys.path.extend(path for path in map(os.path.abspath, folders) if path not in sys.path)


def add_frozen_modules(run_dir: Path, trusted: bool = False) -> None:
    """Add the code copy of a run to `sys.path`: after the standard library, before the user's current modules.

    Raises:
        ConfigError: the run dir belongs to another user and is not trusted. `sys.path` is then unchanged.
    """
    trust.check_run_dir(run_dir, trusted)
    code = os.path.abspath(_code_folder(run_dir))
    others = [path for path in sys.path if not _is_standard_library(path) and path != code]
    sys.path[:] = [*filter(_is_standard_library, sys.path), code, *others]
    sys.path.extend(path for path in _current_folder() if path not in sys.path)


def _code_folder(run_dir: str | Path) -> Path:
    return Path(run_dir).expanduser() / "code"


def _current_folder() -> list[str]:
    """The current folder, unless the option -P of Python excludes it."""
    job = os.environ.get("PYTHONSAFEPATH") == JOB_SAFE_PATH
    return [] if sys.flags.safe_path and not job else [os.getcwd()]


def _is_standard_library(path: str) -> bool:
    return path in trust.standard_library_paths()


def run_cli(act: Callable[[], int], continue_hint: Callable[[], str] = str) -> int:
    """Call `act`, print its expected errors as one sentence, and return the exit code.

    Args:
        continue_hint: returns how the user continues after a stop, such as `to continue: COMMAND`.
    """
    try:
        code = act()
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _print_error(2, f"aem_exp: {error}")
    except RunError as stop:
        return _print_error(1, f"aem_exp: {stop}")
    except ModuleNotFoundError as error:
        from aem_exp.core import extras  # a late import: `--help` does not need it

        if (explanation := extras.explain_missing(error)) is None:
            raise
        return _print_error(2, f"aem_exp: {explanation}")
    except KeyboardInterrupt as stop:
        return _print_error(
            128 + getattr(stop, "signal", signal.SIGINT), "\n" + "; ".join(filter(None, ("stopped", continue_hint())))
        )
    except BrokenPipeError:  # the reader has ended, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _print_error(
            1, "aem_exp: the disk is full; " + "; ".join(filter(None, ("free some space", continue_hint())))
        )


def _print_error(code: int, sentence: str) -> int:
    print(redact(sentence), file=sys.stderr)
    return code
