"""Colours and plots that several commands share."""

from collections.abc import Mapping, Sequence
from itertools import cycle
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


def draw_predictions(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], reference: str, file: Path
) -> None:
    """Draw observed against predicted changes of the response entropy.

    Args:
        panels: title -> arm -> (predicted, observed) difference from the reference, one per batch.
        reference: name of the arm that the others are compared with.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.4), constrained_layout=True, squeeze=False
    )
    for ax, (title, arms) in zip(axes.flat, panels.items(), strict=True):
        for (arm, points), colour, marker in zip(
            arms.items(), cycle((BLUE, ORANGE, GREY)), cycle("oxs^v+"), strict=False
        ):
            if points:
                ax.scatter(
                    *zip(*points, strict=True), s=20, c=colour, marker=marker, alpha=0.7, linewidths=1, label=arm
                )
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.axvline(0, color=GREY, linewidth=0.8)
        ax.set(title=title, xlabel=f"predicted: mean of A (S - H), minus {reference}")
        ax.set_ylabel(f"change of H(s) (nats), minus {reference}")
    axes.flat[0].legend(frameon=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
