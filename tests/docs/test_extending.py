"""Every block of docs/extending.md: its files make experiments, its commands are planned, its Python runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.runs import DEADLINE, SMALL_RUN, run_command

from aem_exp import config
from aem_exp.jobs import function_check

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
FILES = re.findall(r"^`(my/[\w./]+)`:\n\n```\w+\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)  # path, content
COMMANDS = re.findall(r"^python -m aem_exp (.*?[^\\])$", PAGE, re.DOTALL | re.MULTILINE)
SCRIPT = re.findall(r"^```python\n(from aem_exp.config import load\n.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the page works, with the folder `my`."""
    place = tmp_path_factory.mktemp("extending")
    for name, text in FILES:
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return place


def test_the_page_has_what_is_tested_here() -> None:
    assert len(FILES) >= 12
    assert len(COMMANDS) >= 5
    assert len(SCRIPT) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in FILES if name.endswith(".yaml")])
def test_a_file_makes_an_experiment(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder / "my"))
    group, choice = Path(name).parent.name, Path(name).stem
    words = [f"{'+' if group == 'experiment' else ''}{group}={choice}"]
    function_check.check_functions(config.load(words, folder / "my"))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_planned(folder: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = shlex.split(command.replace("$SCRATCH", str(tmp_path)).replace("\\\n", " "), comments=True)
    done = run_command(tmp_path, tmp_path, *words, *(["plan=true"] if "--help" not in words else []))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_environment_of_the_page_trains(folder: Path, tmp_path: Path) -> None:
    small = ["model.make.steps=20", "model.make.habit_steps=5", "model.make.episodes=64", "trainer.steps=1"]
    done = run_command(tmp_path, tmp_path, "--config-dir", str(folder / "my"), "env=codes", "tracking=off", *small)
    assert done.returncode == 0, done.stderr
    assert "success on held-out tasks" in done.stdout


@pytest.mark.slow
def test_its_python_runs(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEM_CACHE", str(cache))
    script = SCRIPT[0].replace('"trainer.steps=10"', ", ".join(map(repr, [*SMALL_RUN, f"outputs={tmp_path}"])))
    assert script != SCRIPT[0]
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    assert "success on held-out tasks" in done.stdout
