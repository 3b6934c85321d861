"""The table of many runs: short names that tell them apart, 80 columns, and sweeps named as for `sweep` and `report`."""

import io
import json
import os

import pytest
from rich.console import Console

from aem_exp import status
from aem_exp.cluster.run_state import RunState
from aem_exp.config import load, run_dir, to_dict
from aem_exp.jobs import labels, status_table
from aem_exp.report import command as report
from aem_exp.rundir import membership
from aem_exp.sweep import command as sweep
from aem_exp.sweep import question

BASE = ["trainer.steps=2"]
FILE = """
question: Does the wider clip help?
base: trainer.steps=2 baseline=wide
arms: {none: modulation=none, aem: modulation=aem}
seeds: 0,1
config_dir: own
"""
WIDE = """# @package _global_
# Ours
baseline: {name: wide, advantage: {_target_: mine.advantage}}
trainer: {loss_type: dapo, epsilon: 0.25}
"""


def data(*words):
    return to_dict(load([*BASE, *words]))


def test_a_label_says_what_differs_and_no_more():
    assert labels.make_labels([data("seed=0"), data("seed=1")]) == ["grpo+aem", "grpo+aem"]
    assert labels.make_labels([data(), data("modulation=none")]) == ["aem", "none"]
    assert labels.make_labels([data("baseline=rloo"), data("modulation=none")]) == ["rloo aem", "grpo none"]
    rates = [data(), data("trainer.learning_rate=1e-4"), data("modulation=none")]
    rate = rates[0]["trainer"]["learning_rate"]
    assert labels.make_labels(rates) == [f"aem learning_rate={rate}", "aem learning_rate=0.0001", "none"]
    assert labels.make_labels([data(), data("launch.threads=3", "outputs=elsewhere")]) == ["grpo+aem", "grpo+aem"]
    assert labels.make_labels([data(), data("model.revision=null")]) == ["grpo+aem", "grpo+aem"]
    assert labels.make_labels([data(), data("trainer.delta=2.0")]) == ["grpo+aem delta=null", "grpo+aem delta=2.0"]
    assert labels.make_labels([]) == []


def test_eighty_columns_hold_a_table_and_its_reasons():
    why = "a sentence that says at length why this run could not be carried out to its end, and what helps " * 2
    score = ("train/success", 0.123)
    running = RunState("running", 120, 2000, 4000.0, score, 3, job="123456_17")
    lines = [
        status_table.StatusRow("4b58fc", "none/learning_rate=0.0001/tasks_per_step=16", "0", running),
        status_table.StatusRow("d5594d", "aem", "1", RunState("failed", 3, 2000, kind="crash", sentence=why, starts=1)),
        status_table.StatusRow("a3056e", "aem", "2", RunState("queued", sentence="pending Resources", steps=2000)),
    ]
    console = Console(file=io.StringIO(), width=80, highlight=False)
    console.print(status_table.status_table(lines, "all runs in /somewhere"))
    shown = console.file.getvalue()
    assert "none/learning_rate=0.0001/tasks_per_step=16" in "".join(
        text[7:17].strip() for text in shown.splitlines()[2:]
    )
    assert all(len(text.rstrip()) <= 80 for text in shown.splitlines())
    for whole in (
        "failed (crash)",
        "1:06 h",
        "120/2000",
        "train 12%",
        "123456_17",
        "d5594d  a sentence",
        "a3056e  pending",
    ):
        assert whole in shown, shown
    assert " ".join(shown.split()).count("what helps") == 2  # no sentence is cut
    assert "…" not in shown


@pytest.fixture
def there(tmp_path, monkeypatch, clean):
    """Two runs that were begun, one whose files are garbage, and a sweep's file with a folder of configs beside it."""
    monkeypatch.setenv("AEM_OUTPUTS", str(tmp_path / "out"))
    for word in ("modulation=none", "modulation=aem"):
        experiment = load([*BASE, word])
        run_dir(experiment).mkdir(parents=True)
        (run_dir(experiment) / "experiment.json").write_text(json.dumps(to_dict(experiment)))
    ruin(tmp_path / "out", {"garbage": "{", "other": '{"name": "x"}'})
    (tmp_path / "own" / "baseline").mkdir(parents=True)
    (tmp_path / "own" / "baseline" / "wide.yaml").write_text(WIDE)
    (tmp_path / "own" / "mine.py").write_text("def advantage(played): return played.return_M\n")
    (tmp_path / "asked.yaml").write_text(FILE)
    return tmp_path


def ruin(outputs, texts):
    for name, text in texts.items():
        (outputs / f"x-{name}").mkdir()
        (outputs / f"x-{name}" / "experiment.json").write_text(text)


def shown(capsys, *words):
    assert status.main([*map(str, words), "--once"]) == 0
    return capsys.readouterr().out


def test_runs_that_cannot_be_read_take_no_other_from_the_table(there, capsys):
    said = " ".join(shown(capsys).split())
    assert " none 0 new " in said and " aem 0 new " in said
    assert all(f"x-{name}" in said for name in ("garbage", "other"))
    assert status.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["group"].endswith("/grpo+aem")
    ruin(there / "out", {"deep": "[" * 100_000, "list": "[]", "flat": '{"name": 1, "baseline": 2}'})
    assert len(status._all_runs(there / "out")) == 7


def test_a_sweep_is_asked_for_as_it_is_run(there, capsys):
    """By file and by name, with and without what was typed; the file knows its folder of configs."""
    whole = question.load(there / "asked.yaml")
    assert whole.config_dir == there / "own"
    for words in (["asked.yaml"], [there / "asked.yaml"], ["asked.yaml", "--config-dir", "own"]):
        said = shown(capsys, *words)
        assert said.count(" new ") == 4 and all(cell.folder.name[-12:-6] in said for cell in whole.cells)
    assert shown(capsys, "asked.yaml", "seed=7").count(" new ") == 2
    assert f"asked in {there / 'b'}" in " ".join(shown(capsys, "asked.yaml", "--outputs", there / "b").split())
    assert sweep.main(["asked.yaml", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 4
    assert report.main(["asked.yaml"]) == 2
    assert "none of its 4 runs is done" in capsys.readouterr().err


def test_a_sweep_that_was_begun_is_known_by_its_name(there, capsys):
    """Where there is no file any more, and with the cells that it was last begun with."""
    whole = question.load(there / "asked.yaml", ["seed=3"])
    rows = [{"run": c.folder.name, "arm": c.arm, "group": c.group, "seed": c.seed} for c in whole.cells]
    membership.write(there / "out", "asked", whole.question, rows)
    os.remove(there / "asked.yaml")
    assert shown(capsys, "asked").count(" new ") == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FILE.replace("own", "nowhere"), "asked.config_dir=nowhere: there is no folder"),
        (FILE.replace("own", "3"), "asked.config_dir=3: must be a folder, seen from this file"),
        (FILE.replace("config_dir", "config-dir"), "did you mean config_dir"),
    ],
)
def test_a_folder_of_configs_is_there(there, capsys, text, said):
    (there / "asked.yaml").write_text(text)
    assert status.main(["asked.yaml"]) == 2
    assert said in capsys.readouterr().err


def test_what_belongs_to_a_sweep_is_only_read_with_one(there, capsys):
    assert status.main(["--config-dir", "own"]) == 2
    assert "only read with a sweep" in capsys.readouterr().err
