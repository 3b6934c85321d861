"""All commands: a mistake gives one sentence and exit code 2, a stop says how to continue, and no credential is shown."""

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
    ("main", "argv", "facts"),
    [
        (run.main, [], ["run_dir=null: "]),
        (run.main, ["/nowhere"], ["RUN_DIR=/nowhere: ", "experiment.json"]),
        (run.main, ["/nowhere", "--inexct"], ["option=--inexct: "]),
        (tracking.main, [], ["sync=null: "]),
        (tracking.main, ["sink", "x"], ["option=sync: ", "'sink'"]),
        (tracking.main, ["sync", "/nowhere"], ["=/nowhere: "]),
        (evaluate.main, ["x", "--repeats", "many"], ["option=--repeats: ", "'many'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(monkeypatch, capsys, main, argv, facts):
    monkeypatch.setattr(sys, "argv", ["command", *argv])
    assert main() == 2
    out, err = capsys.readouterr()
    assert all(fact in err for fact in facts), err
    assert len(err.splitlines()) == 1
    assert not out


@pytest.mark.parametrize(
    ("error", "code", "facts"),
    [
        (ConfigError("tracking", "postgresql://h/db?password=pw", "is down"), 2, ["password=***"]),
        (RunError("every environment crashed"), 1, ["aem_exp: every environment crashed"]),
        (KeyboardInterrupt(), 130, ["to continue: COMMAND"]),
        (OSError(errno.ENOSPC, "full"), 1, ["disk", "to continue: COMMAND"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_stop_says_how_to_continue(capsys, error, code, facts):
    def act():
        raise error

    assert cli.run_cli(act, lambda: "to continue: COMMAND") == code
    err = capsys.readouterr().err
    assert all(fact in err for fact in facts) and "=pw" not in err


def test_package_that_does_not_load_beside_torch_is_named(tmp_path):
    """transformers imports torchvision if it is installed, and its own error does not name the remedy."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "AEM_OUTPUTS": str(tmp_path / "out")}
    command = [sys.executable, "-m", "aem_exp", "trainer.steps=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "pip uninstall -y torchvision torchaudio torchcodec" in done.stderr


def test_unexpected_errors_are_not_caught():
    def act():
        raise OSError(errno.EIO, "a bad disk")

    with pytest.raises(OSError, match="a bad disk"):
        cli.run_cli(act)


def test_frozen_modules_come_before_those_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    for name in ("both", "current"):
        (tmp_path / f"module_{name}.py").touch()
    for name in ("module_both", "colorsys"):
        (tmp_path / "code" / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "code")  # jobs start with it on the path
    cli.add_frozen_modules(tmp_path)
    assert find_spec("module_both").origin == str(tmp_path / "code" / "module_both.py")
    assert find_spec("module_current").origin == str(tmp_path / "module_current.py")
    assert find_spec("colorsys").origin == sysconfig.get_paths()["stdlib"] + "/colorsys.py"


PRINT_PATHS = """import sys; from aem_exp.core import cli
cli.add_user_modules(); print([p for p in sys.path if p == sys.argv[1]], sys.path[0])"""


@pytest.mark.parametrize(("options", "present"), [([], True), (["-P"], False)], ids=str)
def test_the_current_folder_comes_last_or_not_at_all(tmp_path, options, present):
    """As in a console script: Python puts the folder of the script first, not the current one. `-P` is respected."""
    script = tmp_path / "bin" / "script.py"
    script.parent.mkdir()
    script.write_text(PRINT_PATHS)
    command = [sys.executable, *options, str(script), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert (str([str(tmp_path)]) in done.stdout) == present
    assert done.stdout.split()[-1] != str(tmp_path)
