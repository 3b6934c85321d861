"""The summary of a finished run: terminal tables and charts, PNG figures, and episodes as Markdown.

It reads only the run directory, and writes nothing there except the figures, `experiment.yaml` and `episodes.md`.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aem_exp.core import disk
from aem_exp.core.console import join_texts, make_console, make_table, side_by_side, stack_lines, style_text
from aem_exp.core.plots import BLUE, GREY, ORANGE
from aem_exp.run.progress import ENTROPY, GATED, RECENT_STEPS, SUCCESS
from aem_exp.rundir import EXPERIMENT, RESULT, episodes, examples, metrics
from aem_exp.stats.scores import wilson_interval
from aem_exp.tracking import publish

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

T = TypeVar("T")
Rows = Sequence[dict[str, float]]


# ------------------------------------------------------------------------------------------------------------ summary


def print_summary(run_dir: Path, console: "Console | None" = None) -> None:
    """Print the scores, the training curves and the paths and links of a finished run. Reads only the run directory."""
    console = console or make_console()
    result, repeats, gaps = _json(run_dir / RESULT), _repeats(run_dir), list[str]()
    rows = _read_unless_damaged(lambda: metrics.read(run_dir), gaps) or []
    page = _read_unless_damaged(lambda: publish.run_page(run_dir), gaps)
    if (record := run_dir / episodes.FILE).exists():
        _read_unless_damaged(lambda: episodes.check_file(record), gaps)
    console.print()
    console.print("success on held-out tasks, with the 95 % interval of this one run (Wilson)", style="italic")
    console.print(_score_table(result, repeats))
    for line in (_describe_paired_difference(run_dir, result), _describe_warm_start(result)):
        if line:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if (picture := _charts(rows, console.width)) is not None:
        console.print()
        console.print(picture)
        console.print()
    if crashed := result.get("crashed_in_training"):
        console.print(
            f"{crashed} training episodes crashed and were left out of the loss; episodes.parquet has their errors",
            style="yellow",
        )
    for gap in gaps:
        console.print(gap, style="yellow", markup=False, soft_wrap=True)
    for name, text in [("run", str(run_dir)), *(page.lines() if page else ())]:
        console.print(f"  [bold]{name:<7}[/bold]", end="")
        console.print(text, markup=False, soft_wrap=True)  # on one line, so that it can be copied


def _read_unless_damaged(read: Callable[[], T], gaps: list[str]) -> T | None:
    """Return the result of `read`. If its file is damaged, return None and append a sentence to `gaps`."""
    try:
        return read()
    except disk.DamagedFileError as error:
        gaps.append(error.remedy.partition("; ")[0])
        return None


def _score_table(result: dict[str, Any], repeats: int) -> "RenderableType":
    """Return the table of success before and after, per panel."""
    rows: list[Sequence[RenderableType]] = []
    after, final = result.get("after"), result.get("final")
    scores = [(result.get("before"), after), (None, final if final != after else None)]
    for before, then in scores:
        if (score := then or before) is not None:
            evaluations = len(result.get("final_steps", [0])) if score is final else 1
            tasks = score["episodes"] // repeats // evaluations
            name = score["panel"] + ("" if repeats == 1 else f" ({repeats} episodes each)")
            name += f", mean of {evaluations} evaluations" if evaluations > 1 else ""
            rows.append((name, str(tasks), _format_success(before, tasks), _format_success(then, tasks)))
            if score.get("score") is not None:
                rows.append(("  score", "", *(f"{s['score']:.1%}" if s else "-" for s in (before, then))))
    return make_table(("held-out panel", "tasks", "before", "after"), rows, left=("held-out panel",), gap=3, indent=2)


def _describe_paired_difference(run_dir: Path, result: dict[str, Any]) -> str:
    """Describe success after minus before on the same tasks of the panel; empty without both, or without their episodes."""
    before, after = result.get("before"), result.get("after")
    if not (before and after) or not (run_dir / episodes.FILE).exists():
        return ""
    try:
        table = episodes.read(run_dir / episodes.FILE, columns=["step", "split", "task", "won"])
    except disk.DamagedFileError:  # reported elsewhere
        return ""
    by_step: dict[int, dict[str, list[float]]] = {}
    for row in table.to_pylist():
        if row["split"] == after["panel"]:
            by_step.setdefault(row["step"], {}).setdefault(row["task"], []).append(row["won"])
    if len(by_step) < 2:
        return ""
    first, last = by_step[min(by_step)], by_step[max(by_step)]
    from aem_exp.stats import compare  # imports scipy

    tasks = sorted(first.keys() & last.keys())
    means = [[sum(wins[task]) / len(wins[task]) for task in tasks] for wins in (last, first)]
    gap = compare.paired_interval(*means)
    changed = sum(one != other for one, other in zip(*means, strict=True))
    text = f"{after['panel']}: after - before = {100 * gap.difference:+.1f} points"
    same = f"same {len(tasks)} tasks, {changed} changed"
    if not math.isfinite(gap.low):
        return f"{text} ({same}; no interval, because the difference is the same on all tasks)"
    interval = f"[{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
    return f"{text}  {interval} ({same}; 95 %, Student's t over tasks; of this one run)"


def _describe_warm_start(result: dict[str, Any]) -> str:
    """Describe what the warm start changed; empty without one."""
    facts = result.get("warm_start")
    if not facts:
        return ""
    one, other = facts["before"], facts["after"]
    return (
        f"warm start ({facts['method']}, {facts['rows']:,} rows, {facts['updates']} updates, {facts['cpu_seconds']:,.0f} CPU s): "
        f"success {one['success']:.0%} -> {other['success']:.0%}, invalid turns {one['invalid_share']:.0%} -> "
        f"{other['invalid_share']:.0%}, response entropy {one['response_entropy']:.2f} -> {other['response_entropy']:.2f} nats, "
        f"gated groups {one['gated_share']:.0%} -> {other['gated_share']:.0%} (on {other['episodes']} training episodes)"
    )


def _format_success(score: dict[str, Any] | None, tasks: int) -> "Text":
    if score is None:
        return style_text("-", "bright_black")
    low, high = wilson_interval(score["success"], tasks)
    return join_texts((f"{score['success']:.1%}", "bold"), (f"  [{low:.0%}, {high:.0%}]", "bright_black"))


def _charts(rows: Rows, width: int) -> "RenderableType | None":
    """Return charts of success and response entropy over steps, side by side; None if no step was trained."""
    steps = [row["step"] for row in rows if SUCCESS in row]
    if not steps:
        return None
    columns = max(16, min(44, width // 2 - 12))
    entropy = _series(rows, ENTROPY)
    top = max((value for value in entropy if not math.isnan(value)), default=1.0) or 1.0
    charts = [
        _add_title("success in training", draw_chart(_series(rows, SUCCESS), columns, 1.0, "{:.0%}".format), steps),
        _add_title("response entropy (nats)", draw_chart(entropy, columns, top, "{:.2f}".format), steps),
    ]
    return side_by_side(charts)


def _add_title(title: str, lines: list[str], steps: list[float]) -> "Text":
    inner = len(lines[0]) - 9
    first, last = f"{steps[0]:.0f}", f"step {steps[-1]:.0f}"
    foot = " " * 9 + first + last.rjust(inner - len(first))
    return stack_lines((f"{'':9}{title}", "bold"), *lines, (foot, "bright_black"))


def draw_chart(
    values: Sequence[float], width: int, top: float, format_value: Callable[[float], str], height: int = 6
) -> list[str]:
    """Draw values from 0 to `top` as an area chart of block characters. Each column is the mean of its share of the values."""
    levels = []
    for column in range(width):
        start = column * len(values) // width
        part = [v for v in values[start : max(start + 1, (column + 1) * len(values) // width)] if not math.isnan(v)]
        levels.append(round(8 * height * min(1.0, max(0.0, sum(part) / len(part) / top))) if part else 0)
    marks = {height - 1: format_value(top), 0: format_value(0.0)}
    rows = []
    for row in reversed(range(height)):
        blocks = "".join(" ▁▂▃▄▅▆▇█"[min(8, max(0, level - 8 * row))] for level in levels)
        rows.append(f"{marks.get(row, ''):>7} {'┤' if row in marks else '│'}{blocks}")
    return rows


def _series(rows: Rows, name: str) -> list[float]:
    return [row.get(name, math.nan) for row in rows if SUCCESS in row]


# ------------------------------------------------------------------------------------------------------------ figures


def save_plots(rows: Rows, folder: Path, repeats: int = 1) -> list[Path]:
    """Draw success and response entropy over steps, and alpha if the run used AEM, as PNG; return the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    style: Any = {"font.size": 11, "axes.grid": True, "grid.alpha": 0.3}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    drawn = {"success_entropy.png": _draw_learning, "alpha.png": _draw_alpha}
    files = []
    with pyplot.rc_context(style):
        for name, draw in drawn.items():
            figure = draw(pyplot, rows, repeats)
            if figure is not None:
                figure.savefig(folder / name, dpi=150, bbox_inches="tight")
                pyplot.close(figure)
                files.append(folder / name)
    return files


def _draw_learning(pyplot: Any, rows: Rows, repeats: int) -> Any:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    _draw_curve(left, rows, SUCCESS, BLUE)
    _draw_curve(right, rows, ENTROPY, BLUE)
    scored = [row for row in rows if "eval/success" in row]
    steps, shares = [row["step"] for row in scored], [row["eval/success"] for row in scored]
    ends = [wilson_interval(row["eval/success"], int(row.get("eval/episodes", 0)) // repeats) for row in scored]
    bars = [
        [share - low for share, (low, _) in zip(shares, ends, strict=True)],
        [high - share for share, (_, high) in zip(shares, ends, strict=True)],
    ]
    held_out = {"color": ORANGE, "linestyle": "--", "marker": "o", "label": "held-out tasks"}
    if scored:
        left.errorbar(steps, shares, yerr=bars, capsize=3, **held_out)
        right.plot(steps, [row.get("eval/response_entropy", math.nan) for row in scored], **held_out)
        left.legend(frameon=False)
    left.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    left.set(title="success", xlabel="step", ylim=(0, 1))
    right.set(title="response entropy (nats)", xlabel="step")
    right.set_ylim(bottom=0)
    return figure


def _draw_curve(axes: Any, rows: Rows, name: str, colour: str) -> None:
    """Draw a training curve: the steps as a thin line, their moving mean as a thick line."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
    windows = [values[max(0, i - RECENT_STEPS // 2) : i + RECENT_STEPS // 2] for i in range(1, len(values) + 1)]
    mean = [sum(window) / len(window) for window in windows]
    axes.plot(steps, mean, color=colour, linewidth=2, label=f"training, mean of {RECENT_STEPS} steps")


def _draw_alpha(pyplot: Any, rows: Rows, _: int) -> Any:
    names = [f"aem/alpha_q{q}" for q in ("05", "50", "95")]
    measured = [row for row in rows if all(name in row for name in names)]
    if not measured:
        return None
    steps = [row["step"] for row in measured]
    low, middle, high = ([row[name] for row in measured] for name in names)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True, width_ratios=(3, 2))
    left.fill_between(steps, low, high, color=BLUE, alpha=0.25, linewidth=0, label="5 % to 95 % of the responses")
    left.plot(steps, middle, color=BLUE, linewidth=2, label="median")
    left.axhline(1, color=GREY, linestyle=":", linewidth=1)
    left.margins(y=0.25)
    left.set(title="alpha of a response", xlabel="step")
    left.legend(frameon=False, loc="upper left", ncols=2)
    _draw_curve(right, rows, GATED, BLUE)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.set(title="groups left unmodulated by the gate", xlabel="step", ylim=(0, 1))
    return figure


# ------------------------------------------------------------------------------------------------------------ reading


def write_artifacts(run_dir: Path) -> list[Path]:
    """Write the files that people open: the config as YAML, a few episodes as Markdown, and figures; return their paths."""
    import yaml

    files = []
    if (experiment := run_dir / EXPERIMENT).exists():
        (config := run_dir / "experiment.yaml").write_text(yaml.safe_dump(_json(experiment), sort_keys=False))
        files.append(config)
    if rows := examples.select_examples(run_dir):
        (readable := run_dir / "episodes.md").write_text(examples.to_markdown(rows))
        files.append(readable)
    return files + save_plots(metrics.read(run_dir), run_dir / "plots", _repeats(run_dir))


def _repeats(run_dir: Path) -> int:
    """Return the number of episodes per panel task. These are not independent, so intervals count tasks."""
    path = run_dir / EXPERIMENT
    return int(_json(path).get("evaluation", {}).get("repeats", 1)) if path.exists() else 1


def _json(path: Path) -> dict[str, Any]:
    return disk.read_json(path)
