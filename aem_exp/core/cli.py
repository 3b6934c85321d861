"""What all commands share: the argument parser, access to a user's own modules, and exit codes.

A user's mistake is printed as one sentence and exits with code 2.
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

JOB_SAFE_PATH = "job"  # PYTHONSAFEPATH as our jobs have it: frozen code comes first, and the current folder may follow


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are ours: one sentence instead of a usage page.

    Under the command `aem-exp`, its usage line names that.
    """

    def __init__(self, prog: str | None = None, **rest: Any) -> None:
        super().__init__(sys.argv[0] if sys.argv[0].startswith("aem-exp ") else prog, **rest)

    def error(self, message: str) -> NoReturn:
        subject, _, why = message.partition(": ")
        if subject == "unrecognized arguments":
            raise ConfigError("option", why, "no such option; see --help")
        if subject == "the following arguments are required":
            raise ConfigError(why, None, "must be given; see --help")
        raise ConfigError("option", subject.removeprefix("argument "), why or "see --help")


def add_user_modules(
    config_dir: str | Path | None = None, runs: Sequence[str | Path] = (), trusted: bool = False
) -> None:
    """Add the user's own modules to `sys.path`, after the standard library: those of the current folder, of `config_dir`,
    and, for modules that are in neither, the copies that are frozen in `runs`.

    Raises:
        ConfigError: a run dir is somebody else's, and not trusted; then nothing is reached.
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
    """Add the copies of the user's own modules that are frozen in a run to `sys.path`: after the standard library, and before
    the current ones.

    Raises:
        ConfigError: the run dir is somebody else's, and not trusted; then nothing is reached.
    """
    trust.check_run_dir(run_dir, trusted)
    code = os.path.abspath(_code_folder(run_dir))
    others = [place for place in sys.path if not _is_standard_library(place) and place != code]
    sys.path[:] = [*filter(_is_standard_library, sys.path), code, *others]
    sys.path.extend(path for path in _current_folder() if path not in sys.path)


def _code_folder(run_dir: str | Path) -> Path:
    return Path(run_dir).expanduser() / "code"


def _current_folder() -> list[str]:
    """The current folder, unless Python was told (-P) to find no modules there."""
    job = os.environ.get("PYTHONSAFEPATH") == JOB_SAFE_PATH
    return [] if sys.flags.safe_path and not job else [os.getcwd()]


def _is_standard_library(place: str) -> bool:
    return place in trust.standard_library_paths()


def run_cli(act: Callable[[], int], onward: Callable[[], str] = str) -> int:
    """Act; the exit code. `onward`: how to go on with what was stopped, such as `to go on: COMMAND`."""
    try:
        code = act()
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _print_error(2, f"aem_exp: {error}")
    except RunError as stop:
        return _print_error(1, f"aem_exp: {stop}")
    except ModuleNotFoundError as error:
        from aem_exp.core import extras  # here, as `--help` needs none of it

        if (why := extras.explain_missing(error)) is None:
            raise
        return _print_error(2, f"aem_exp: {why}")
    except KeyboardInterrupt as stop:
        return _print_error(
            128 + getattr(stop, "signal", signal.SIGINT), "\n" + "; ".join(filter(None, ("stopped", onward())))
        )
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _print_error(1, "aem_exp: the disk is full; " + ", and ".join(filter(None, ("free space", onward()))))


def _print_error(code: int, sentence: str) -> int:
    print(redact(sentence), file=sys.stderr)
    return code
