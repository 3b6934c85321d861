"""What every door has in common: a user's mistake is one sentence and exit code 2, and whatever stops says how to go on."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from aem_exp.core import trust
from aem_exp.core.errors import ConfigError, Stop, redact

IN_A_JOB = "job"  # PYTHONSAFEPATH as our jobs have it: frozen code comes first, and the current folder may follow


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


def reach(config_dir: str | Path | None = None, runs: Sequence[str | Path] = (), trusted: bool = False) -> None:
    """Let `_target_` name a user's own modules: where they stand, in `config_dir`, and where they stand nowhere else, as `runs`
    have frozen them. All of these come after the standard library.

    Raises:
        ConfigError: a run dir is somebody else's, and not trusted; then nothing is reached.
    """
    for run_dir in runs:
        trust.check(run_dir, trusted)
    folders = [*_here(), *([] if config_dir is None else [config_dir]), *(_code(run_dir) for run_dir in runs)]
    sys.path.extend(path for path in map(os.path.abspath, folders) if path not in sys.path)


def reach_frozen(run_dir: Path, trusted: bool = False) -> None:
    """Let `_target_` name a user's own modules as a run has frozen them, before those that lie where they stand; the standard
    library comes before both.

    Raises:
        ConfigError: the run dir is somebody else's, and not trusted; then nothing is reached.
    """
    trust.check(run_dir, trusted)
    code = os.path.abspath(_code(run_dir))
    others = [place for place in sys.path if not _standard(place) and place != code]
    sys.path[:] = [*filter(_standard, sys.path), code, *others]
    sys.path.extend(path for path in _here() if path not in sys.path)


def _code(run_dir: str | Path) -> Path:
    return Path(run_dir).expanduser() / "code"


def _here() -> list[str]:
    """The current folder, unless Python was told (-P) to find no modules there."""
    job = os.environ.get("PYTHONSAFEPATH") == IN_A_JOB
    return [] if sys.flags.safe_path and not job else [os.getcwd()]


def _standard(place: str) -> bool:
    return place in trust.standard_library()


def answer(act: Callable[[], int], onward: Callable[[], str] = str) -> int:
    """Act; the exit code. `onward`: how to go on with what was stopped, such as `to go on: COMMAND`."""
    try:
        code = act()
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _told(2, f"aem_exp: {error}")
    except Stop as stop:
        return _told(1, f"aem_exp: {stop}")
    except KeyboardInterrupt as stop:
        return _told(
            128 + getattr(stop, "signal", signal.SIGINT), "\n" + "; ".join(filter(None, ("stopped", onward())))
        )
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _told(1, "aem_exp: the disk is full; " + ", and ".join(filter(None, ("free space", onward()))))


def _told(code: int, sentence: str) -> int:
    print(redact(sentence), file=sys.stderr)
    return code
