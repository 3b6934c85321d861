"""The files that docs/extending.md and docs/sweeps.md show are complete: an experiment, or a sweep, can be made of them."""

import re
from pathlib import Path

import pytest
from support.runs import run_command

from aem_exp import config
from aem_exp.jobs import dry_run
from aem_exp.sweep import question

DOCS = Path(__file__).parents[2] / "docs"
SHOWN_FILE = re.compile(
    r"`(my/[\w./]+)`[^\n`]*:\n\n```\w+\n(.*?)```", re.DOTALL
)  # its name, and the block that follows


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `my` of the page."""
    place = tmp_path_factory.mktemp("extending")
    for name, text in SHOWN_FILE.findall((DOCS / "extending.md").read_text(encoding="utf-8")):
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return place / "my"


@pytest.mark.parametrize(
    "words",
    [
        ["baseline=wide"],
        ["baseline=to_go"],
        ["modulation=gate_02"],
        ["modulation=late"],
        ["env=codes"],
        ["env=taxi", "model=qwen2_5_1_5b", "launch=gpu1"],
        ["env=household_chat", "model=smol", "launch=gpu1"],
        ["launch=gpu4"],
        ["+experiment=codes_aem"],
    ],
    ids=" ".join,
)
def test_a_file_of_extending_makes_an_experiment(
    own_folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(own_folder))
    dry_run.check_functions(config.load(words, own_folder))


def test_the_environment_of_extending_trains(own_folder: Path, tmp_path: Path) -> None:
    small = ["model.make.steps=20", "model.make.habit_steps=5", "model.make.episodes=64", "trainer.steps=1"]
    done = run_command(tmp_path, tmp_path, "--config-dir", str(own_folder), "env=codes", "tracking=off", *small)
    assert done.returncode == 0, done.stderr
    assert "success on tasks never trained on" in done.stdout


def test_the_sweeps_of_the_page_have_plans(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "sweeps.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for number, text in enumerate(blocks):
        file = tmp_path / f"question_{number}.yaml"
        file.write_text(text, encoding="utf-8")
        assert question.load(file).cells
