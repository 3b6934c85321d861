"""The default run learns, and AEM modulates its advantages."""

import json

import pytest

from aem_exp.config import load
from aem_exp.run.execution import run
from aem_exp.rundir import metrics


@pytest.mark.slow
def test_default_run_improves_on_held_out_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("AEM_CACHE", str(tmp_path / "cache"))
    folder = run(load([f"outputs={tmp_path}", "tracking=off"]))
    result = json.loads((folder / "result.json").read_text())
    assert min(result[name]["episodes"] for name in ("before", "after", "final")) >= 100
    assert 0.15 <= result["before"]["success"] <= 0.30
    assert result["after"]["success"] >= 0.55
    assert result["final"]["success"] >= 0.55
    rows = [row for row in metrics.read(folder) if "aem/gated_share" in row]
    early = rows[: len(rows) // 2]
    assert sum(row["aem/gated_share"] for row in early) / len(early) <= 0.5
    assert all(row["train/updates"] >= 2 for row in rows)
    assert rows[-1]["train/response_entropy"] != pytest.approx(rows[0]["train/response_entropy"], abs=0.02)


@pytest.mark.slow
def test_window_history_learns(tmp_path, monkeypatch):
    """With one row per turn, the number of updates follows the number of turns; a few steps raise the training success."""
    monkeypatch.setenv("AEM_CACHE", str(tmp_path / "cache"))
    overrides = ["+experiment=household_window", "trainer.steps=16", "evaluation.tasks=16"]
    folder = run(load([*overrides, f"outputs={tmp_path}", "tracking=off"]))
    rows = [row for row in metrics.read(folder) if "train/success" in row]
    assert len({row["train/rows"] for row in rows}) > 1
    assert all(row["train/updates"] == max(1, round(row["train/rows"] / 128)) for row in rows)
    success = [row["train/success"] for row in rows]
    assert sum(success[-5:]) > sum(success[:5]) + 0.25
