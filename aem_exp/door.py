"""What every door has in common: a user's mistake is one sentence and exit code 2, and whatever stops says how to go on."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from aem_exp.values import ConfigError, Stop


class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are ours: one sentence instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        subject, _, why = message.partition(": ")
        if subject == "unrecognized arguments":
            raise ConfigError("option", why, "no such option; see --help")
        if subject == "the following arguments are required":
            raise ConfigError(why, None, "must be given; see --help")
        raise ConfigError("option", subject.removeprefix("argument "), why or "see --help")


def reach(*folders: str | Path | None) -> None:
    """Let `_target_` name a user's own modules: where they stand, also under the console script, and in `folders`."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    sys.path.extend(os.path.abspath(folder) for folder in folders if folder is not None)


def reach_run(run_dir: str | Path) -> None:
    """Let `_target_` name a user's own modules that a run has frozen, where they stand nowhere else."""
    sys.path.append(os.path.abspath(Path(run_dir).expanduser() / "code"))


def reach_frozen(code: Path) -> None:
    """Let `_target_` name a user's own modules as they were frozen in `code`, before those that lie where they stand."""
    sys.path.insert(0, str(code.absolute()))
    sys.path.append(os.getcwd())


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
    from aem_exp.stores import redact

    print(redact(sentence), file=sys.stderr)
    return code
