"""What docs/extending.md shows works: its functions answer, and its environment trains a policy."""

import re
from pathlib import Path

import pytest
from support.runs import run_command

from aem_exp import config
from aem_exp.jobs import dry_run

PAGE = Path(__file__).parents[2] / "docs/extending.md"
SHOWN_FILE = re.compile(r"```\w+\n(# (my/[\w./]+)\n.*?)```", re.DOTALL)  # a block whose first line is its path


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `my` of the page."""
    place = tmp_path_factory.mktemp("extending")
    for text, name in SHOWN_FILE.findall(PAGE.read_text(encoding="utf-8")):
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return place / "my"


@pytest.mark.parametrize("choice", ["baseline=wide", "baseline=to_go", "modulation=gate_02", "modulation=late"])
def test_the_functions_of_the_page_answer(own_folder: Path, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(own_folder))
    dry_run.check_functions(config.load([choice], own_folder))


def test_the_environment_of_the_page_trains(own_folder: Path, tmp_path: Path) -> None:
    small = ["model.make.steps=20", "model.make.habit_steps=5", "model.make.episodes=64", "trainer.steps=1"]
    done = run_command(tmp_path, tmp_path, "--config-dir", str(own_folder), "env=codes", "tracking=off", *small)
    assert done.returncode == 0, done.stderr
    assert "success on tasks never trained on" in done.stdout
