"""Every door: a mistake is one sentence and exit code 2, whatever stops says how to go on, and no credential is shown."""

import errno
import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec

import pytest
from support import ROOT

from aem_exp.core import cli
from aem_exp.core.errors import ConfigError, RunError
from aem_exp.evaluate import command as evaluate
from aem_exp.run import command as run
from aem_exp.tracking import command as tracking


@pytest.mark.parametrize(
    ("main", "argv", "said"),
    [
        (run.main, [], "run_dir=null: must be given"),
        (run.main, ["/nowhere"], "must be the folder of a run"),
        (run.main, ["/nowhere", "--inexct"], "--inexct: no such option"),
        (tracking.main, [], "sync=null: must be given"),
        (tracking.main, ["sink", "x"], "invalid choice: 'sink'"),
        (tracking.main, ["sync", "/nowhere"], "RUN_DIR=/nowhere: "),
        (evaluate.main, ["x", "--repeats", "many"], "--repeats: invalid int value: 'many'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(monkeypatch, capsys, main, argv, said):
    monkeypatch.setattr(sys, "argv", ["door", *argv])
    assert main() == 2
    out, err = capsys.readouterr()
    assert said in err
    assert len(err.splitlines()) == 1
    assert not out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("tracking", "postgresql://h/db?password=pw", "is down"), 2, "password=***"),
        (RunError("every environment crashed"), 1, "aem_exp: every environment crashed"),
        (KeyboardInterrupt(), 130, "stopped; to go on: COMMAND"),
        (OSError(errno.ENOSPC, "full"), 1, "the disk is full; free space, and to go on: COMMAND"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_stops_says_how_to_go_on(capsys, error, code, said):
    def act():
        raise error

    assert cli.run_cli(act, lambda: "to go on: COMMAND") == code
    err = capsys.readouterr().err
    assert said in err and "=pw" not in err


def test_what_nobody_foresaw_is_not_hidden():
    def act():
        raise OSError(errno.EIO, "a bad disk")

    with pytest.raises(OSError, match="a bad disk"):
        cli.run_cli(act)


def test_frozen_modules_come_before_those_that_lie_here(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    for name in ("both", "only_here"):
        (tmp_path / f"module_{name}.py").touch()
    for name in ("module_both", "colorsys"):
        (tmp_path / "code" / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "code")  # as a job has it
    cli.add_frozen_modules(tmp_path)
    assert find_spec("module_both").origin == str(tmp_path / "code" / "module_both.py")
    assert find_spec("module_only_here").origin == str(tmp_path / "module_only_here.py")
    assert find_spec("colorsys").origin == sysconfig.get_paths()["stdlib"] + "/colorsys.py"


WHERE = """import sys; from aem_exp.core import cli
cli.add_user_modules(); print([p for p in sys.path if p == sys.argv[1]], sys.path[0])"""


@pytest.mark.parametrize(("options", "found"), [([], True), (["-P"], False)], ids=str)
def test_the_current_folder_comes_last_or_not_at_all(tmp_path, options, found):
    """As under the console script: Python itself puts a script's folder first, not this one. `-P` is heeded."""
    script = tmp_path / "bin" / "script.py"
    script.parent.mkdir()
    script.write_text(WHERE)
    command = [sys.executable, *options, str(script), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert (str([str(tmp_path)]) in done.stdout) == found
    assert done.stdout.split()[-1] != str(tmp_path)
