"""The table of `status`: short labels that differ, at most 80 columns, and the same names of sweeps as `sweep` and `report`."""

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


@pytest.mark.slow
def test_a_label_contains_only_the_differences():
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


def test_the_table_and_its_reasons_fit_in_80_columns():
    why = "a sentence that says at length why this run could not be carried out to its end, and a remedy " * 2
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
    assert " ".join(shown.split()).count("a remedy") == 2  # no reason is cut
    assert "…" not in shown


@pytest.fixture
def workspace(tmp_path, monkeypatch, clean):
    """Two started runs, two unreadable ones, and a sweep file with a folder of configs next to it."""
    monkeypatch.setenv("AEM_OUTPUTS", str(tmp_path / "out"))
    for word in ("modulation=none", "modulation=aem"):
        experiment = load([*BASE, word])
        run_dir(experiment).mkdir(parents=True)
        (run_dir(experiment) / "experiment.json").write_text(json.dumps(to_dict(experiment)))
    write_unreadable_runs(tmp_path / "out", {"garbage": "{", "other": '{"name": "x"}'})
    (tmp_path / "own" / "baseline").mkdir(parents=True)
    (tmp_path / "own" / "baseline" / "wide.yaml").write_text(WIDE)
    (tmp_path / "own" / "mine.py").write_text("def advantage(played): return played.return_M\n")
    (tmp_path / "clip.yaml").write_text(FILE)
    return tmp_path


def write_unreadable_runs(outputs, texts):
    for name, text in texts.items():
        (outputs / f"x-{name}").mkdir()
        (outputs / f"x-{name}" / "experiment.json").write_text(text)


def shown(capsys, *words):
    assert status.main([*map(str, words), "--once"]) == 0
    return capsys.readouterr().out


def test_unreadable_runs_do_not_hide_others(workspace, capsys):
    page = " ".join(shown(capsys).split())
    assert " none 0 new " in page and " aem 0 new " in page
    assert all(f"x-{name}" in page for name in ("garbage", "other"))
    assert status.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["group"].endswith("/grpo+aem")
    write_unreadable_runs(
        workspace / "out", {"deep": "[" * 100_000, "list": "[]", "flat": '{"name": 1, "baseline": 2}'}
    )
    assert status.main(["--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 7


@pytest.mark.slow
def test_a_sweep_is_named_as_for_running_it(workspace, capsys):
    """By file or by name, with or without overrides; the file states its folder of configs."""
    whole = question.load(workspace / "clip.yaml")
    assert whole.config_dir == workspace / "own"
    for words in (["clip.yaml"], [workspace / "clip.yaml"], ["clip.yaml", "--config-dir", "own"]):
        page = shown(capsys, *words)
        assert page.count(" new ") == 4 and all(cell.folder.name[-12:-6] in page for cell in whole.cells)
    assert shown(capsys, "clip.yaml", "seed=7").count(" new ") == 2
    assert f"clip in {workspace / 'b'}" in " ".join(shown(capsys, "clip.yaml", "--outputs", workspace / "b").split())
    assert sweep.main(["clip.yaml", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 4
    assert report.main(["clip.yaml"]) == 2
    assert " 4 runs " in capsys.readouterr().err


@pytest.mark.slow
def test_a_started_sweep_is_known_by_its_name(workspace, capsys):
    """Without its file, with the cells of its last start."""
    whole = question.load(workspace / "clip.yaml", ["seed=3"])
    rows = [{"run": c.folder.name, "arm": c.arm, "group": c.group, "seed": c.seed} for c in whole.cells]
    membership.write(workspace / "out", "clip", whole.question, rows)
    os.remove(workspace / "clip.yaml")
    assert shown(capsys, "clip").count(" new ") == 2


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (FILE.replace("own", "nowhere"), ["clip.config_dir=nowhere: "]),
        (FILE.replace("own", "3"), ["clip.config_dir=3: "]),
        (FILE.replace("config_dir", "config-dir"), ["config-dir", "did you mean config_dir"]),
    ],
)
def test_the_config_dir_of_a_sweep_must_exist(workspace, capsys, text, facts):
    (workspace / "clip.yaml").write_text(text)
    assert status.main(["clip.yaml"]) == 2
    err = capsys.readouterr().err
    assert all(fact in err for fact in facts)


def test_config_dir_needs_a_sweep(workspace, capsys):
    assert status.main(["--config-dir", "own"]) == 2
    assert "--config-dir=own: " in capsys.readouterr().err
