"""SVG figures of a report: forest plot, dot plot and training curves.

The same numbers give the same bytes. The colours are safe for print and for colour-blind readers.
"""

import io
import math
import re
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aem_exp.core.plots import BLUE, GREY, ORANGE
from aem_exp.report.analysis import SUCCESS, ArmCell, Difference
from aem_exp.stats import compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARM_COLOR, REFERENCE_COLOR = ORANGE, BLUE
MAX_CELLS: Final = 20  # maximum number of cells with curves, to limit the length of the page
MAX_COLUMNS: Final = 4  # curves side by side
MIN_RUNS_FOR_QUARTILES: Final = 5  # with fewer runs, a band shows the range of all runs
CURVES: Final = {  # metric -> title with unit
    "train/success": "success in training (%)",
    "eval/success": "success on the evaluation panel (%)",
    "train/response_entropy": "response entropy (nats)",
}
MORE_CURVES: Final = {
    "train/kl": "KL to the reference (nats)",
    "train/invalid_share": "invalid turns (%)",
    "train/zero_advantage_groups": "groups without advantage (%)",
    "train/positive_share": "positive advantages (%)",
    "train/negative_share": "negative advantages (%)",
    "aem/alpha_q05": "alpha, 5 % quantile",
    "aem/alpha_q50": "alpha, median",
    "aem/alpha_q95": "alpha, 95 % quantile",
    "aem/gated_share": "gated groups (%)",
    "drift/advantage": "measured entropy drift, A (S - H)",
    "drift/aem": "AEM's extra drift, A (alpha - 1)(S - H)",
}


def forest_plot(differences: Sequence[Difference]) -> str | None:
    """Each difference with its interval, in points; None if there is no difference."""
    shown = [d for d in differences if d.interval is not None]
    if not shown:
        return None
    axes, save = _row_axes([_row_name(f"{d.arm} - {d.reference}", d.point) for d in shown])
    for row, d in enumerate(reversed(shown)):
        assert d.interval is not None
        low, middle, high = (100 * value for value in (d.interval.low, d.interval.difference, d.interval.high))
        sure = low > 0 or high < 0
        axes.plot([low, high], [row, row], color=ARM_COLOR if sure else GREY, linewidth=2)
        axes.plot(middle, row, "D" if sure else "o", color=ARM_COLOR if sure else GREY, markersize=6)
    axes.axvline(0, color=REFERENCE_COLOR, linewidth=1, linestyle="--")
    axes.set_xlabel(f"difference in {shown[0].measure} (points), with simultaneous 95 % intervals")
    return save()


def dot_plot(cells: Sequence[ArmCell]) -> str | None:
    """The success of each run, and the mean of each cell with its 95 % interval."""
    shown = [cell for cell in cells if cell.done]
    if not shown:
        return None
    axes, save = _row_axes([_row_name(cell.arm, cell.point) for cell in shown])
    for row, cell in enumerate(reversed(shown)):
        scores = 100 * np.asarray(cell.scores(SUCCESS))
        colour = REFERENCE_COLOR if cell.arm == cells[0].arm else ARM_COLOR
        axes.plot(scores, [row] * len(scores), "|", color=colour, markersize=11, alpha=0.8)
        half = compare.half_width(scores)
        axes.errorbar(scores.mean(), row, xerr=half if math.isfinite(half) else None, fmt="o", color=colour, capsize=3)
    axes.set_xlabel("success on the final panel (%): each run, and the mean with its 95 % interval")
    return save()


def curve_plots(cells: Sequence[ArmCell], names: dict[str, str] | None = None) -> list[str]:
    """Curves over steps: median and band over the runs of each arm, with the first arm of its point; `MAX_COLUMNS` per figure."""
    known = [(n, t) for n, t in (names or CURVES).items() if any(a.curve(n) for cell in cells for a in cell.done)]
    first = {cell.point: cell for cell in reversed(cells)}
    done = [cell for cell in cells if cell.done]
    shown = ([cell for cell in done if cell is not first[cell.point]] or done)[:MAX_CELLS]
    parts = [dict(known[start : start + MAX_COLUMNS]) for start in range(0, len(known), MAX_COLUMNS)]
    return [_curve_plot(shown, first, part) for part in parts] if shown else []


def _curve_plot(shown: Sequence[ArmCell], first: dict[str, ArmCell], names: dict[str, str]) -> str:
    grid, save = _grid_axes(len(shown), len(names))
    for row, cell in zip(grid, shown, strict=True):
        for axes, (name, title) in zip(row, names.items(), strict=True):
            if cell is not first[cell.point]:
                _draw_band(axes, first[cell.point], name, title, REFERENCE_COLOR, "--")
            _draw_band(axes, cell, name, title, ARM_COLOR, "-")
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(_row_name(cell.arm, cell.point).replace("$", r"\$"), fontsize=8)
    for axes, title in zip(grid[0], names.values(), strict=True):
        axes.set_title(title, fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=8)
    return save()


def _draw_band(axes: "Axes", cell: ArmCell, name: str, title: str, colour: str, line: str) -> None:
    scale = 100 if title.endswith("(%)") else 1
    found = [dict(archive.curve(name)) for archive in cell.done]
    steps = sorted(set().union(*found))
    if not steps:
        return
    values = scale * np.array([[run.get(step, np.nan) for step in steps] for run in found])
    known = ~np.isnan(values).all(axis=0)
    at, values = np.asarray(steps)[known], values[:, known]
    low, high = (25, 75) if len(found) >= MIN_RUNS_FOR_QUARTILES else (0, 100)
    axes.fill_between(at, *np.nanpercentile(values, [low, high], axis=0), color=colour, alpha=0.18, linewidth=0)
    axes.plot(at, np.nanmedian(values, axis=0), color=colour, linestyle=line, linewidth=1.2)


def _row_name(arm: str, point: str) -> str:
    return f"{arm} {point}".strip()


def _row_axes(names: Sequence[str]) -> tuple["Axes", Any]:
    """Axes with one labelled row per name, from top to bottom."""
    left, rows = 0.25 + 0.08 * max(map(len, names)), len(names)
    axes, save = _make_figure((left + 6.4, 0.34 * rows + 0.9), (left, 0.15, 0.6, 0.15), 1, 1)
    axes = axes[0][0]
    axes.set_yticks(
        range(rows), [name.replace("$", r"\$") for name in reversed(names)]
    )  # `$` starts a formula in matplotlib
    axes.set_ylim(-0.6, rows - 0.4)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes, save


def _grid_axes(rows: int, columns: int) -> tuple[Any, Any]:
    size = (2.5 * columns + 0.7, 1.35 * rows + 0.8)
    return _make_figure(size, (0.7, 0.1, 0.45, 0.35), rows, columns, sharex=True, sharey="col")


def _make_figure(
    size: tuple[float, float], margins: tuple[float, float, float, float], rows: int, columns: int, **how: Any
) -> tuple[Any, Any]:
    """Create a figure without a window; return its axes and a function that renders it as SVG.

    Args:
        size: width and height in inches.
        margins: left, right, bottom and top margin in inches. They are fixed, because an automatic layout takes longer than the
            whole figure.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure, (width, height), (left, right, below, above) = Figure(figsize=size), size, margins
    FigureCanvasSVG(figure)
    figure.subplots_adjust(left / width, below / height, 1 - right / width, 1 - above / height, 0.22, 0.18)
    axes = figure.subplots(rows, columns, squeeze=False, **how)

    def save() -> str:
        text = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": "aem_exp", "svg.fonttype": "none"}):
            figure.savefig(text, format="svg", metadata={"Date": None})
        return _inline_svg(text.getvalue())

    return axes, save


def _inline_svg(svg: str) -> str:
    """The `<svg>` element, with ids that are unique on a page with several figures."""
    mark = f"f{sha256(svg.encode()).hexdigest()[:8]}-"
    svg = svg[svg.index("<svg") :]
    return re.sub(r'(id="|url\(#|xlink:href="#)', rf"\1{mark}", svg)
