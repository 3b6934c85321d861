"""Sections on the results of a sweep: the scores of every cell, and the differences between arms with their verdicts."""

import math
from collections.abc import Sequence

from aem_exp.report import analysis, figures
from aem_exp.report.analysis import SUCCESS, ArmCell, Difference, Pair, mean
from aem_exp.report.contrasts import ContrastResult
from aem_exp.report.render import Block, Figure, Section, Table, Text
from aem_exp.report.sections.design import SweepDescription
from aem_exp.report.sections.formats import drop_empty_column, format_interval, format_points
from aem_exp.stats import compare


def verdict_table(differences: Sequence[Difference]) -> Table:
    """The table of differences with intervals and verdicts."""
    columns = (
        *("point", "arm", "against", "runs", "difference", "95 % interval", "verdict", "p", "detectable"),
        "runs needed",
    )
    rows = [
        (
            d.point,
            d.arm,
            d.reference,
            f"{len(d.one)} v {len(d.other)}{f', {d.diverged} diverged' if d.diverged else ''}",
            format_points(d.interval.difference, True) if d.interval else "-",
            format_interval(d.interval),
            d.verdict,
            _format_p_value(d),
            format_points(d.detectable),
            _runs_to_settle(d),
        )
        for d in differences
    ]
    measure = differences[0].measure if differences else SUCCESS
    rank = "Differences" if measure == SUCCESS else "Secondary: differences"
    return drop_empty_column(Table(f"{rank} in {measure}", columns, rows, _verdict_note(differences, measure)))


def _verdict_note(differences: Sequence[Difference], measure: str) -> str:
    """How the columns are computed, and their limits."""
    note = (
        f"Points of {measure}. Intervals: Welch's t over runs, not paired by seed, simultaneous over this table (Bonferroni)"
        f"{'' if measure == SUCCESS else ' but not over several tables'}. "
        f"p: permutation test, to be compared with {_format_level(differences)}; it assumes equal spread in both arms and may "
        "disagree with the interval, which decides the verdict. detectable: the difference that runs with this spread detect "
        "with 80 % power. runs needed: runs per arm that detect the observed difference with 80 % power, if it is the true one."
    )
    if any(d.partial for d in differences):
        note += " So far: runs are missing. If you stop a sweep early because of its result, the intervals do not hold."
    if any(d.diverged for d in differences):
        note += " Some runs diverged, so the intervals are not reliable; compare the seeds one by one."
    return note


def _format_level(differences: Sequence[Difference]) -> str:
    shares = sorted({d.comparisons for d in differences})
    return " or ".join(f"{compare.LEVEL:g} / {share} = {compare.LEVEL / share:.2g}" for share in shares) or "-"


def _format_p_value(d: Difference) -> str:
    if d.interval is None:
        return "-"
    seeds = min(len(d.one), len(d.other))
    if d.p is None:
        return f"not attainable with {seeds} seeds"
    return f"{d.p.p:.3g}{f' ± {d.p.error:.1g}' if d.p.error else ''}"


def _runs_to_settle(d: Difference) -> str:
    if not d.open:
        return "-"
    return str(d.enough) if d.enough else f"above {compare.MAX_RUNS}"


def cells_section(cells: Sequence[ArmCell]) -> Section:
    blocks: list[Block] = []
    if picture := figures.dot_plot(cells):
        blocks.append(Figure("Success of every run", picture))
    blocks += [_score_table(cells, measure) for measure in analysis.available_measures(cells)]
    if problems := analysis.list_problems(cells):
        blocks.append(_problem_table(problems))
    return Section("Scores", blocks)


def _score_table(cells: Sequence[ArmCell], measure: str) -> Table:
    columns = ("point", "arm", "runs", "mean", "95 % interval", "each seed")
    rows = []
    for cell in cells:
        values = cell.scores(measure)
        middle, half = mean(values), compare.half_width(values)
        low, high = max(0.0, middle - half), min(1.0, middle + half)
        interval = f"[{format_points(low)}, {format_points(high)}]" if math.isfinite(half) else "-"
        seeds = " ".join(format_points(value) for value in values)
        runs = f"{len(values)} of {len(cell.runs)}"
        rows.append((cell.point, cell.arm, runs, format_points(middle), interval, seeds))
    note = "Points (0 to 100). Each interval describes one arm (Student's t over runs); to compare arms, use the differences."
    return drop_empty_column(Table(f"{measure.capitalize()} of each cell", columns, rows, note))


def _problem_table(problems: Sequence[tuple[str, str, int, str]]) -> Table:
    seeds_by_problem: dict[tuple[str, str, str], list[str]] = {}
    for arm, point, seed, problem in problems:
        seeds_by_problem.setdefault((point, arm, problem), []).append(str(seed))
    rows = [(point, arm, " ".join(seeds), problem) for (point, arm, problem), seeds in seeds_by_problem.items()]
    note = "Runs that failed because of a node, of memory or of their environment are not scored; run them again."
    title = "Missing, failed and diverged runs"
    return drop_empty_column(Table(title, ("point", "arm", "seeds", "problem"), rows, note))


def contrasts_section(contrasts: Sequence[ContrastResult]) -> Section:
    columns = ("contrast", "role", "weights", "seeds", "value", "95 % interval", "verdict", "detectable")
    rows = [
        (
            c.name,
            "primary" if c.primary else "exploratory",
            " ".join(f"{weight:+.3g} {group}" for group, weight in c.weights.items()),
            f"{len(c.seeds)} of {len(c.seeds) + len(c.missing)}",
            format_points(c.interval.difference, True) if c.interval else "-",
            format_interval(c.interval),
            c.verdict,
            format_points(c.detectable),
        )
        for c in contrasts
    ]
    note = (
        "Points of success. A contrast is a weighted sum of cells within each seed; the interval is Student's t over seeds. So "
        "runs of a seed may share their warm start. Only the primary contrast was declared as the hypothesis of this sweep; its "
        "level is 5 %. Intervals of exploratory contrasts are not corrected for their number. detectable: the contrast that "
        "seeds with this spread detect with 80 % power."
    )
    return Section("Declared contrasts", [Table("Contrasts in success", columns, rows, note)])


def differences_section(
    sweep: SweepDescription, cells: Sequence[ArmCell], primary: Sequence[Difference], exploratory: bool = False
) -> Section:
    if not primary:
        return Section("Differences and verdicts", [Text("The sweep has one arm, so there is no comparison.")])
    blocks: list[Block] = []
    if exploratory:
        blocks.append(Text("The hypothesis of this sweep is its primary contrast. All differences are exploratory."))
    if picture := figures.forest_plot(primary):
        blocks.append(Figure("Differences in success, with simultaneous 95 % intervals", picture))
    blocks.append(verdict_table(primary))
    if sentence := _cheapest_comparison(cells, primary):
        blocks.append(Text(sentence))
    blocks += [
        verdict_table(analysis.differences(cells, sweep.families, measure))
        for measure in analysis.available_measures(cells)
        if measure != SUCCESS
    ]
    blocks += _new_tasks_table(primary)
    blocks += _overall_table(cells, sweep.families[0])
    return Section("Differences and verdicts", blocks)


def _new_tasks_table(primary: Sequence[Difference]) -> list[Block]:
    columns = ("point", "arm", "against", "difference", "95 % interval on new tasks", "verdict")
    rows = [
        (
            d.point,
            d.arm,
            d.reference,
            format_points(d.interval.difference, True),
            format_interval(d.new_tasks),
            compare.verdict(d.new_tasks),
        )
        for d in primary
        if d.interval is not None and d.new_tasks is not None
    ]
    note = "Intervals for new runs on new tasks from the same distribution as the panel (runs and tasks crossed)."
    if not rows:
        return []
    return [drop_empty_column(Table("Secondary: generalisation to new tasks", columns, rows, note))]


def _cheapest_comparison(cells: Sequence[ArmCell], differences: Sequence[Difference]) -> str | None:
    """The open comparison that is cheapest to decide, and its cost; None if there is none."""
    seconds_by_cell = {(c.arm, c.point): [a.spent["seconds"] for a in c.done if "seconds" in a.spent] for c in cells}
    costs = []
    for d in differences:
        both = [seconds_by_cell[arm, d.point] for arm in (d.arm, d.reference)]
        if d.enough and d.open and all(both):
            costs.append((d.enough * sum(map(mean, both)), d))
    if not costs:
        return None
    seconds, d = min(costs, key=lambda pair: pair[0])
    named = f"{d.arm} {d.point}".strip()
    return (
        f"The cheapest open comparison is {named} against {d.reference}: {d.enough} runs per arm, about "
        f"{seconds / 3600:.1f} hours of runs, if the observed difference is the true one. Declare it in a new sweep file with "
        "new seeds before you run it. Adding seeds to this sweep until a difference appears would produce false positives."
    )


def _overall_table(cells: Sequence[ArmCell], pairs: Sequence[Pair]) -> list[Block]:
    comparisons = analysis.compare_overall(cells, pairs)
    if not comparisons:
        return []
    columns = (
        *("arm", "against", "points", "probability of improvement", "95 %", "interquartile mean", "95 %"),
        *("of the other", "95 %"),
    )
    rows = [
        (
            o.arm,
            o.against,
            str(o.points),
            *(
                text
                for s in (o.improvement, o.interquartile_mean, o.reference)
                for text in (format_points(s.value), format_interval(s, False))
            ),
        )
        for o in comparisons
    ]
    note = (
        "Over all points of the sweep. Intervals: bootstrap of runs within points, which are too narrow with few runs."
    )
    return [Table("Over all points", columns, rows, note)]
