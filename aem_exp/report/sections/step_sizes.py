"""The table of the sizes of the training steps, beside success."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Final

from aem_exp.report.analysis import SUCCESS, ArmCell, mean
from aem_exp.report.render import Table
from aem_exp.report.sections.formats import drop_empty_column, format_points
from aem_exp.rundir.archive import Archive

COLUMNS: Final[Mapping[str, str]] = {  # metric -> title
    "train/grad_norm_mean": "gradient norm",
    "train/grad_norm": "gradient norm, last update",
    "train/weight_change": "weight change",
    "train/step_kl": "KL of a step (nats)",
    "train/positive_advantage": "n alpha A, A > 0",
    "train/negative_advantage": "n alpha A, A < 0",
    "train/effective_learning_rate": "effective learning rate",
    "train/learning_rate": "learning rate",
}
NOTE: Final = (
    "Means over the steps of a run, then over runs, ± the SD over runs. Gradient norms are before clipping: the mean over the "
    "updates of a step, and that of its last update. Weight change: norm of the change of the trained weights in a step. KL: "
    "between the policies before and after a step, on fixed states. n alpha A: sum over responses per trained token (n tokens "
    "each). With Adam, the gradient norm is not the size of a step; compare the weight change or the KL. A dash: not "
    "logged by these runs."
)


def step_size_table(done: Sequence[tuple[ArmCell, Sequence[Archive]]]) -> Table | None:
    """The sizes of the steps of each cell; None if no run has logged any."""
    rows = [
        (
            cell.point,
            cell.arm,
            format_points(mean(cell.scores(SUCCESS))),
            *(_format_runs(runs, name) for name in COLUMNS),
        )
        for cell, runs in done
    ]
    if all(set(row[3:]) == {"-"} for row in rows):
        return None
    return drop_empty_column(Table("Size of the steps", ("point", "arm", "success", *COLUMNS.values()), rows, NOTE))


def _format_runs(runs: Sequence[Archive], name: str) -> str:
    """The mean over runs ± the SD over runs, each run a mean over its steps; "-" if a run has not logged the metric."""
    curves = [[value for _, value in archive.curve(name)] for archive in runs]
    values = [mean(curve) for curve in curves if curve]
    if not values or len(values) < len(runs):
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.3g}{f' ± {spread:.2g}' if spread else ''}"
