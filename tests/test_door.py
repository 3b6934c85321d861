"""Every door: a mistake is one sentence and exit code 2, whatever stops says how to go on, and no credential is shown."""

import errno
import sys
from importlib.util import find_spec

import pytest

from aem_exp import door, evaluate, run, tracking
from aem_exp.values import ConfigError, Stop


@pytest.mark.parametrize(
    ("main", "argv", "said"),
    [
        (run.main, [], "run_dir=null: must be given"),
        (run.main, ["/nowhere"], "must be the folder of a run"),
        (run.main, ["/nowhere", "--inexct"], "--inexct: no such option"),
        (tracking.main, [], "sync=null: must be given"),
        (tracking.main, ["sink", "x"], "invalid choice: 'sink'"),
        (tracking.main, ["sync", "/nowhere"], "name the folder of a run"),
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
        (Stop("every environment crashed"), 1, "aem_exp: every environment crashed"),
        (KeyboardInterrupt(), 130, "stopped; to go on: COMMAND"),
        (OSError(errno.ENOSPC, "full"), 1, "the disk is full; free space, and to go on: COMMAND"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_stops_says_how_to_go_on(capsys, error, code, said):
    def act():
        raise error

    assert door.answer(act, lambda: "to go on: COMMAND") == code
    err = capsys.readouterr().err
    assert said in err and "=pw" not in err


def test_what_nobody_foresaw_is_not_hidden():
    def act():
        raise OSError(errno.EIO, "a bad disk")

    with pytest.raises(OSError, match="a bad disk"):
        door.answer(act)


def test_frozen_modules_come_before_those_that_lie_here(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    for name in ("both", "only_here"):
        (tmp_path / f"module_{name}.py").touch()
    (tmp_path / "code" / "module_both.py").touch()
    door.reach_frozen(tmp_path / "code")
    assert find_spec("module_both").origin == str(tmp_path / "code" / "module_both.py")
    assert find_spec("module_only_here").origin == str(tmp_path / "module_only_here.py")
