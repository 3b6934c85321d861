"""The terminal output of a run: progress lines, summary, figures, and episodes as Markdown."""

import io
import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aem_exp.core import console
from aem_exp.run import progress, summary
from aem_exp.rundir import examples, metrics
from aem_exp.stats import scores
from aem_exp.tracking import publish, run_card, store_uri
from aem_exp.tracking.tracker import Tracker

STEPS = 40
RESPONSE = {"observation": "You see a box.", "text": "<action>open box</action>", "reward": 0.0, "valid": True}


def row(step: int) -> dict[str, float]:
    trained = {
        summary.SUCCESS: step / STEPS,
        summary.ENTROPY: 0.8 - step / 100,
        summary.GATED: 0.25,
        "aem/alpha_q05": 0.7,
        "aem/alpha_q50": 1.0,
        "aem/alpha_q95": 1.4,
    }
    scored = {"eval/success": step / STEPS, "eval/episodes": 120.0, "eval/response_entropy": 0.5}
    return (trained if step else {}) | (scored if step % 20 == 0 else {})


def episode(**more: Any) -> dict[str, Any]:
    responses = [
        RESPONSE | {"entropy": 0.5, "alpha": None},
        RESPONSE | {"entropy": 0.25, "alpha": 1.125, "reward": 1.0, "valid": False},
    ]
    facts = {
        "step": 0,
        "split": "dev",
        "task": "heat-7",
        "member": 0,
        "won": 1.0,
        "return": 1.0,
        "ended": "over",
        "error": "",
    }
    return facts | {"responses": responses} | more


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The directory of a finished run."""
    folder = tmp_path / "outputs" / "household-grpo+aem-s0-0123abcd"
    uri = f"sqlite:///{folder.parent / 'mlflow.db'}"
    with Tracker.open(folder, store_uri.OFF, "household", "grpo+aem/s0") as tracker:
        for step in range(STEPS + 1):
            tracker.log(step, row(step))
    card = run_card.read_card(folder) | {"uri": uri, "run_id": "abc", "experiment_id": "1"}
    run_card.save_card(folder, card)
    dev = {"panel": "dev", "episodes": 120}
    scores = {"before": dev | {"success": 0.25}, "after": dev | {"success": 0.625}}
    final = {"panel": "test", "episodes": 140, "success": 0.6}
    (folder / "result.json").write_text(json.dumps(scores | {"final": final}))
    (folder / "experiment.json").write_text(json.dumps({"name": "household", "evaluation": {"repeats": 1}}))
    return folder


def terminal(width: int = 120, **more: Any) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False, **more)


def printed(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_wilson_interval_equals_scipy() -> None:
    from scipy.stats import binomtest

    for wins, tasks in [(0, 10), (1, 7), (60, 120), (119, 120), (5, 5)]:
        theirs = binomtest(wins, tasks).proportion_ci(0.95, "wilson")
        assert scores.wilson_interval(wins / tasks, tasks) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert scores.wilson_interval(math.nan, 10) == scores.wilson_interval(0.5, 0) == (0.0, 1.0)


# --------------------------------------------------------------------------------------------------------- live line


def test_plain_lines_without_a_terminal() -> None:
    screen = terminal()
    with progress.Progress(console=screen, every=0.0) as line:
        logging.getLogger("aem_exp").info("evaluating on the dev panel")
        for step in range(4):
            line(step, 3, row(step) | {summary.SUCCESS: 0.5})
        logging.getLogger("aem_exp").warning("no connection to the tracker [0]")
        logging.getLogger("aem_exp").debug("not shown")
    lines = printed(screen).splitlines()
    assert lines[0] == "evaluating on the dev panel"
    assert lines[1] == "step 0/3  success 50%  held-out 0%"
    pace = r"\d\.\d\d s/step  0 s left"
    assert re.match(f"step 2/3  success 50%  entropy 0.79  gated 25%  held-out 0%  {pace}", lines[3])
    assert lines[5] == "no connection to the tracker [0]"
    assert len(lines) == 6
    assert logging.getLogger("aem_exp").propagate


def test_a_fact_is_not_a_stage() -> None:
    screen = terminal()
    with progress.Progress(console=screen, every=0.0) as line:
        logging.getLogger("aem_exp").info("evaluating on the dev panel")
        logging.getLogger("aem_exp").log(console.NOTE, "engines agree with the trainer")
        line.token(3)
    evaluating = "evaluating on the dev panel"
    facts = [evaluating, "engines agree with the trainer", f"{evaluating}: turn 1, 3 tokens"]
    assert printed(screen).splitlines() == facts


def test_few_plain_lines_for_many_steps() -> None:
    screen = terminal()
    with progress.Progress(console=screen) as line:
        for step in range(1001):
            line(step, 1000, row(step))
    first, last = printed(screen).splitlines()
    assert (first.split()[1], last.split()[1]) == ("0/1000", "1000/1000")


def test_one_live_line_in_a_terminal() -> None:
    screen = terminal(80, force_terminal=True, force_interactive=True, color_system=None)
    with progress.Progress(console=screen) as line:
        line.show_stage("loading")
        assert "loading …  0 s" in str(line.render())
        for step in range(1, 11):
            line(step, 20, row(step))
            shown = str(line.render())
            assert len(shown) <= 80
        assert "10/20" in shown
        assert "left" in shown
        line.show_stage("evaluating on the test panel")
        assert "10/20  evaluating on the test panel …" in str(line.render())
    assert printed(screen).count("\n") <= 2, "each update overwrites the line"


def test_slow_rollouts_show_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def play(line: progress.Progress) -> None:
        line.show_stage("evaluating on the dev panel")
        line.token(1)
        line.turn(4)
        line.token(7)

    screen = terminal()
    with progress.Progress(console=screen, every=0.0) as line:
        play(line)
        line.turn(0)
        line(0, 3, {})
        line.token(2)
        line(1, 3, {})
    panel = "evaluating on the dev panel"
    panels = [panel, f"{panel}: turn 1, 1 token", f"{panel}: turn 1, 4 episodes", f"{panel}: turn 2, 7 tokens"]
    assert printed(screen).splitlines() == [*panels, "step 0/3", "step 1/3 in progress: turn 1, 2 tokens", "step 1/3"]
    few = terminal()
    with progress.Progress(console=few) as line:
        play(line)
    assert printed(few).splitlines() == [panel]  # a line was printed a moment ago
    monkeypatch.setattr(progress, "SLOW_SECONDS", 0.0)
    with progress.Progress(console=terminal(80, force_terminal=True, color_system=None)) as line:
        play(line)
        assert str(line.render()).endswith("evaluating on the dev panel …  0 s  turn 2, 7 tokens")
        line(0, 3, {})
        line.turn(12)
        assert str(line.render()).endswith("0/3  turn 1, 12 episodes")
        line.slot_turn(0, 1)
        line.slot_turn(5, 3)
        assert str(line.render()).endswith("0/3  4 turns, 2 episodes at a time")


def test_slow_evaluations_show_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from aem_exp.evaluate import display

    monkeypatch.setattr(display, "REFRESH_SECONDS", 0.0)
    screen = terminal(80)
    with display.ProgressLine(screen, every=0.0) as line:
        line.start_agent("policy", 0, 2, max_turns=8)
        line.start_chunk(0, 2)
        line.token(5)
        line.turn(2)
        line.token(120)
    lines = [text.partition("  ")[0] for text in printed(screen).splitlines()]
    assert lines == [
        *["policy 0/2 episodes"] * 2,
        "policy 0/2 episodes, turn 1/8, 5 tokens",
        "policy 0/2 episodes, turn 2/8",
        "policy 0/2 episodes, turn 2/8, 120 tokens",
    ]


def test_disabled_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress(enabled=False) as line:
        logging.getLogger("aem_exp").warning("x")
        line(1, 1, row(1))
    assert capsys.readouterr() == ("", "")


def test_format_duration() -> None:
    assert [console.format_duration(s) for s in (-1, 59.4, 60, 3599, 3600, 7500)] == [
        "0 s",
        "59 s",
        "1:00 min",
        "59:59 min",
        "1:00 h",
        "2:05 h",
    ]


# ----------------------------------------------------------------------------------------------------------- summary


def test_summary_shows_scores_and_links(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.1 22")
    screen = terminal(100)
    summary.print_summary(run_dir, screen)
    text = printed(screen)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "dev 120 25.0% [18%, 33%] 62.5% [54%, 71%]" in lines
    assert "test 140 - 60.0% [52%, 68%]" in lines
    assert f"run {run_dir}" in lines
    page = publish.run_page(run_dir)
    assert page is not None
    assert f"serve {page.command}" in lines
    assert f"open {page.link}" in lines, "the link is not wrapped"
    assert [name for name, _ in page.more] == ["curves", "table"]
    assert all(f"{name} {link}" in lines for name, link in page.more)
    assert "ssh -N -L" in text
    assert "success in training" in text
    assert "step 40" in text
    assert max(len(line) for line in text.splitlines() if "│" in line) <= 100


def test_summary_without_steps_or_tracker(run_dir: Path) -> None:
    (run_dir / "tracking.json").unlink()
    (run_dir / "metrics.jsonl").write_text("")
    screen = terminal(60)
    summary.print_summary(run_dir, screen)
    assert "62.5%" in printed(screen)


def test_intervals_count_tasks_instead_of_episodes(run_dir: Path) -> None:
    (run_dir / "experiment.json").write_text(json.dumps({"evaluation": {"repeats": 4}}))
    screen = terminal(100)
    summary.print_summary(run_dir, screen)
    low, high = scores.wilson_interval(0.625, 30)
    assert f"62.5%  [{low:.0%}, {high:.0%}]" in printed(screen)
    assert "(4 episodes each)" in printed(screen)


def test_draw_chart() -> None:
    assert summary.draw_chart([0.0, 0.5, 1.0, math.nan], 4, 1.0, "{:.0%}".format, height=2) == [
        "   100% ┤  █ ",
        "     0% ┤ ██ ",
    ]
    assert summary.draw_chart([1.0], 3, 8.0, str, height=1) == ["    0.0 ┤▁▁▁"], (
        "fewer values than columns are repeated"
    )
    assert summary.draw_chart([0.0, 1.0], 1, 1.0, str, height=1)[0][-1] == "▄", "more values than columns are averaged"


# ----------------------------------------------------------------------------------------------- figures and episodes


@pytest.mark.slow
def test_figures(run_dir: Path) -> None:
    rows = metrics.read(run_dir)
    files = summary.save_plots(rows, run_dir / "plots")
    assert [file.name for file in files] == ["success_entropy.png", "alpha.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    diverged = [{"step": 1} | dict.fromkeys([*row(1), *row(0)], math.nan) | {"eval/episodes": 120}]
    assert len(summary.save_plots(diverged, run_dir / "diverged")) == 2
    assert [file.name for file in summary.save_plots([{"step": 0}], run_dir / "bare")] == ["success_entropy.png"]


def test_episodes_as_markdown() -> None:
    text = examples.to_markdown([episode(), episode(won=0.0, ended="crashed", error="Boom: ```", responses=None)])
    assert "## dev: heat-7" in text
    assert "**won, return 1, after 0 steps of training**" in text
    assert "### Turn 1: reward 0, entropy 0.500\n\n> You see a box.\n\n```text\n<action>open box</action>\n```" in text
    assert "### Turn 2: reward 1, entropy 0.250, alpha 1.125, invalid" in text
    assert "**not won, crashed, return 1, after 0 steps of training**" in text
    assert "````text\nBoom: ```\n````" in text, "the text of a policy cannot end its code block"
    long = examples.to_markdown([episode(responses=[RESPONSE | {"text": "x" * 9000, "entropy": 0.0}])])
    assert len(long) < 5000
    assert "(5000 more characters)" in long


@pytest.mark.slow
def test_write_artifacts(run_dir: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    rows = [episode(step=step, task=f"t{task}") for step in (0, STEPS) for task in range(5)]
    rows += [episode(step=step, split="train", task="t9", member=m) for step in (3, STEPS) for m in range(8)]
    rows += [episode(task="hidden", responses=None)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), run_dir / "episodes.parquet")
    names = [str(path.relative_to(run_dir)) for path in summary.write_artifacts(run_dir)]
    assert names == ["experiment.yaml", "episodes.md", "plots/success_entropy.png", "plots/alpha.png"]
    assert (run_dir / "experiment.yaml").read_text().startswith("name: household\nevaluation:\n  repeats: 1\n")
    heads = [line for line in (run_dir / "episodes.md").read_text().splitlines() if line.startswith("## ")]
    assert heads == [f"## dev: t{task}" for task in (0, 0, 1, 1, 2, 2)] + ["## train: t9"] * 3


def test_silence_libraries_keeps_settings_of_the_user() -> None:
    code = """
import os, sys, logging, warnings
from aem_exp.core import console; from aem_exp.run import summary
console.silence_libraries()
assert not {"torch", "transformers", "trl", "mlflow"} & set(sys.modules)
assert os.environ["TRL_EXPERIMENTAL_SILENCE"] == "1" and os.environ["TRANSFORMERS_VERBOSITY"] == "info"
assert os.environ["TOKENIZERS_PARALLELISM"] == "false" and os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
assert "HF_HUB_OFFLINE" not in os.environ
warnings.warn_explicit("deprecated", FutureWarning, "x.py", 1, module="anything")
warnings.warn_explicit("careful", UserWarning, "x.py", 1, module="transformers.modeling")
logging.getLogger("mlflow.store").warning("wall")
warnings.warn_explicit("ours", UserWarning, "x.py", 1, module="aem_exp.run")
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRL_", "TOKENIZERS", "MLFLOW"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**environment, "TRANSFORMERS_VERBOSITY": "info"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "Warning" in line] == ["x.py:1: UserWarning: ours"]
    assert "wall" not in done.stderr
