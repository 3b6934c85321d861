"""Colours and plots that several commands share."""

from collections.abc import Sequence
from pathlib import Path

BLUE, ORANGE, GREY = (
    "#0072B2",
    "#D55E00",
    "#595959",
)  # Okabe and Ito: distinct for colour-blind readers and in grey print


def draw_scatter(clear: Sequence[float], relative: Sequence[float], file: Path) -> None:
    """Draw relative surprisal against 1 - alpha, one mark per response; the marks show whether the two signs agree."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = list(zip(clear, relative, strict=True))
    kinds = {
        "the same sign": ([p for p in points if p[0] * p[1] > 0], BLUE, "o"),
        "opposite signs": ([p for p in points if p[0] * p[1] < 0], ORANGE, "x"),
        "neither": ([p for p in points if p[0] * p[1] == 0], GREY, "+"),
    }
    figure, axes = pyplot.subplots(figsize=(5.2, 4.4), constrained_layout=True)
    for name, (members, colour, marker) in kinds.items():
        if members:
            axes.scatter(
                *zip(*members, strict=True), s=16, c=colour, marker=marker, alpha=0.6, linewidths=1, label=name
            )
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel="1 - alpha", ylabel="relative surprisal S - H(s) (nats)")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(kinds))
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
