"""The ten parts of a report: what was asked, what was run, what it came to, and how to make it again.

Whatever is said follows from tables that stand beside it, and every number in those from a run that is named.
"""

import csv
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aem_exp.report import analysis, figures
from aem_exp.report.analysis import SCORE, SUCCESS, ArmCell, Difference, Pair, mean
from aem_exp.report.render import Block, Figure, Report, Section, Table, Text
from aem_exp.rundir.archive import Archive
from aem_exp.stats import compare, power, scores

COVERAGE: Final = """\
How often intervals like these hold the truth, in 20,000 simulated comparisons each, without a difference and with one of 6
points (python tests/nulls.py 20000; 95 % is asked for; give or take 0.2). There, 140 tasks are played 4 times, and the runs of
both arms are as many and spread alike; with 3 runs against 10, up to 7 in 100 intervals miss. A run in ten that breaks down, as
diverged runs do, is far from what t is made for: none of this holds then.
runs per arm            3             5            10
this panel      96.5   96.3   95.4   95.5   94.9   95.1 %
new tasks       95.7   95.4   95.1   95.1   95.1   95.1 %
bootstrap       79.9   79.5   87.1   87.4   91.4   91.5 %   (over runs, on this panel: not used)"""
PUBLISHED_CAVEAT: Final = (
    "published elsewhere, with other code, hardware and panels: to be read beside, never counted in"
)


@dataclass(frozen=True)
class SweepDescription:
    """What a sweep asked. `modulation`: name -> how it differs from the base, in words."""

    name: str
    question: str
    file: str
    source: str  # where its runs were read from
    base: str
    arms: Mapping[str, str]
    families: Sequence[Sequence[Pair]]  # what is compared: what was declared, then runs from elsewhere
    seeds: Sequence[int]


def build_report(
    asked: SweepDescription, cells: Sequence[ArmCell], primary: Sequence[Difference], published: Path | None = None
) -> Report:
    """All of it; where runs are missing, what there is. `primary`: the differences in success, as declared; then others."""
    parts = [
        _question_section(asked, cells),
        _provenance_section(cells),
        _cells_section(cells),
        _differences_section(asked, cells, primary),
        _curves_section(cells),
        _breakdown_section(cells),
        _sanity_section(cells),
        _published_section(cells, published),
        _commands_section(cells),
        _interpretation_section(cells),
    ]
    return Report(f"{asked.name}: report of a sweep", asked.question, parts)


def format_points(value: float, sign: bool = False) -> str:
    """A share of 1 as points of 100."""
    return "-" if math.isnan(value) else f"{100 * value:{'+' if sign else ''}.1f}"


def format_interval(interval: Any, sign: bool = True) -> str:
    return (
        f"[{format_points(interval.low, sign)}, {format_points(interval.high, sign)}]" if interval is not None else "-"
    )


def verdict_table(differences: Sequence[Difference]) -> Table:
    """The table that a sweep is run for."""
    columns = (
        *("point", "arm", "against", "runs", "difference", "95 % interval", "verdict", "p", "detectable"),
        "runs to settle",
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
    note = (
        f"Points of {measure}; Welch's t over runs, not paired by seed; all intervals of this table hold at once (Bonferroni)"
        f"{'' if measure == SUCCESS else ', but not together with those of other tables'}. "
        f"p: by permutation, to be held against {_format_level(differences)}; it takes the arms to spread alike, so that it may "
        "say something else, and the verdict is the interval's. detectable: what arms that spread like these would show 4 times "
        "in 5; runs to settle: per arm, to show the difference seen, if it is real."
    )
    if any(d.partial for d in differences):
        note += " So far: the sweep is not done; who looks before it is, and stops when it suits, has not 95 %."
    if any(d.diverged for d in differences):
        note += " Where runs diverged, the intervals do not hold what they promise; look at every seed."
    rank = "Differences" if measure == SUCCESS else "Secondary: differences"
    return _drop_empty_column(Table(f"{rank} in {measure}", columns, rows, note))


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


def _drop_empty_column(table: Table) -> Table:
    """The table without a first column that says nothing."""
    if any(row[0] for row in table.rows):
        return table
    return Table(table.title, table.columns[1:], [row[1:] for row in table.rows], table.note)


# 1


def _question_section(asked: SweepDescription, cells: Sequence[ArmCell]) -> Section:
    done = [archive for cell in cells for archive in cell.done]
    distinct, declared = {archive.run for archive in done}, asked.families[0]
    facts = [
        ("sweep", asked.file),
        ("read from", asked.source),
        ("base", asked.base or "the default experiment"),
        ("seeds", " ".join(map(str, asked.seeds))),
        ("runs", f"{len(done)} of {sum(len(cell.runs) for cell in cells)} done"),
        ("compared", "; ".join(f"{one} against {other}" for one, other in declared) or "nothing"),
        ("not compared", "other pairs of arms: they were not declared (`pairs:` of a sweep's file)"),
        ("primary measure", "success on the final panel, mean over its tasks and repeats"),
        (
            "secondary",
            "the world's own score, where it has one; the area under the curve of success in training; new tasks",
        ),
    ]
    if len(distinct) < len(done):
        facts.insert(5, ("shared", f"these are {len(distinct)} runs: some stand in several cells"))
    for name, title in (("final", "final panel"), ("after", "panel of the curves")):
        for panel, count in Counter(_describe_panel(a, name) for a in done if a.result.get(name)).items():
            facts.append((title, f"{panel}{'' if count == len(done) else f' ({count} runs)'}"))
    rules = Counter(a.result.get("checkpoint_rule") or "not known: by a CSV" for a in done)
    only = "; the same for every run, never the best on the panel it is scored on" if len(rules) == 1 else ""
    facts += [("checkpoint", f"{rule}{only or f' ({count} runs)'}") for rule, count in rules.items()]
    if len(found := analysis.runs_by_revision(done)) > 1:
        told = ", ".join(f"{number} ({len(runs)} runs)" for number, runs in found.items())
        facts.append(("method revisions", f"{told}: the same experiment trains differently in each; compared as asked"))
    facts += [("planned power", text) for text in _planned_power(asked, cells)]
    arms = [(arm, words or "as the base") for arm, words in asked.arms.items()]
    return Section("The question", [Table("Asked", ("", "is"), facts), Table("Arms", ("arm", "differs by"), arms)])


def _describe_panel(archive: Archive, which: str) -> str:
    found, repeats = archive.result[which], len(archive.tasks["success"][0])
    return f"{found['panel']} ({found['panel_hash']}), {found['episodes'] // repeats} tasks x {repeats}"


def _planned_power(asked: SweepDescription, cells: Sequence[ArmCell]) -> list[str]:
    """What the design could show, before it was run; for each size of panel."""
    seeds, comparisons = len(asked.seeds), len(asked.families[0]) * len({cell.point for cell in cells})
    if seeds < 2 or not comparisons:
        return ["one seed an arm shows no difference between arms"] if seeds < 2 else []
    sizes = {(len(a.tasks["id"]), len(a.tasks["success"][0])) for cell in cells for a in cell.done}
    spread, out = " and ".join(f"{sd:g}" for sd in power.SEED_SDS), []
    for tasks, repeats in sorted(sizes):
        found = [
            power.detectable_difference(seeds, tasks, repeats, sd, comparisons=comparisons) for sd in power.SEED_SDS
        ]
        told = " and ".join(f"{x:.1f}" for x in found)
        out.append(f"{tasks} tasks x {repeats}: {told} points, found 4 times in 5, where seeds spread by {spread}")
    return out


# 2


def _provenance_section(cells: Sequence[ArmCell]) -> Section:
    columns = (
        "point",
        "arm",
        "code",
        "method",
        "policy",
        "machine",
        "world",
        "planned budget",
        "steps",
        "episodes",
        "tokens",
        "updates",
    )
    rows = [[cell.point, cell.arm, *_provenance_row(cell.done)] for cell in cells if cell.done]
    note = (
        "Budgets match as planned: steps x tasks x group x oversampling. Realised episodes, tokens and updates are means per "
        "run; dynamic sampling and the policy itself decide them."
    )
    spent = ("point", "arm", "minutes a run", "GPU-hours a run", "starts with changes")
    time = [[cell.point, cell.arm, *_time_row(cell.done)] for cell in cells if cell.done]
    packages = Counter(
        ", ".join(f"{name} {number}" for name, number in a.result.get("packages", {}).items())
        for cell in cells
        for a in cell.done
    )
    return Section(
        "Where the runs come from",
        [
            _drop_empty_column(Table("Provenance", columns, rows, note)),
            _drop_empty_column(Table("Time", spent, time)),
            *(Text(f"{count} runs with {text}.") for text, count in packages.items() if text),
        ],
    )


def _provenance_row(done: Sequence[Archive]) -> list[str]:
    def said(values: Iterable[Any]) -> str:
        return ", ".join(sorted({str(value) for value in values if value})) or "-"

    machines = said(
        f"{a.provenance.get('device')} x {a.provenance.get('processes', 1)}, {a.provenance.get('machine', '')}"
        for a in done
        if a.provenance
    )
    return [
        said(_shorten_commit(a.provenance.get("commit") or "") for a in done),
        ", ".join(map(str, analysis.runs_by_revision(done))) or "-",
        said(_describe_policy(a) for a in done),
        machines,
        said(a.result.get("fingerprint") for a in done),
        said(analysis.planned_budget(a) for a in done),
        said(a.result.get("steps") for a in done),
        *(_format_mean([a.spent[key] for a in done if key in a.spent]) for key in ("episodes", "tokens", "updates")),
    ]


def _shorten_commit(commit: str) -> str:
    """In short; a `+` says that there were edits on top of it."""
    return commit[:10] + ("+" if commit.endswith("+") and len(commit) > 10 else "")


def _describe_policy(archive: Archive) -> str:
    """What training began with: a model and its weights, or how it was made."""
    model = archive.experiment.get("model") or {}
    revision = archive.provenance.get("weights") or model.get("revision") or ("made here" if model.get("make") else "")
    return " ".join(filter(None, [model.get("path") or model.get("name"), revision]))


def _time_row(done: Sequence[Archive]) -> list[str]:
    seconds = [a.spent["seconds"] for a in done if "seconds" in a.spent]
    hours = [a.spent["seconds"] * a.spent.get("gpus", 0) / 3600 for a in done if "seconds" in a.spent]
    resumed = sum(bool(a.result.get("resumed")) for a in done)
    return [_format_mean([each / 60 for each in seconds], 1), _format_mean(hours, 1), str(resumed)]


def _format_mean(values: Sequence[float], digits: int = 0) -> str:
    return f"{mean(values):,.{digits}f}" if values else "-"


# 3


def _cells_section(cells: Sequence[ArmCell]) -> Section:
    columns = ("point", "arm", "runs", "mean", "95 % interval", "every seed")
    blocks: list[Block] = []
    if picture := figures.dot_plot(cells):
        blocks.append(Figure("Success of every run", picture))
    for measure in analysis.available_measures(cells):
        rows = []
        for cell in cells:
            found = cell.scores(measure)
            middle, half = mean(found), compare.half_width(found)
            low, high = max(0.0, middle - half), min(1.0, middle + half)
            own = f"[{format_points(low)}, {format_points(high)}]" if math.isfinite(half) else "-"
            seeds = " ".join(format_points(value) for value in found)
            rows.append((cell.point, cell.arm, f"{len(found)} of {len(cell.runs)}", format_points(middle), own, seeds))
        note = "In points of 100; each interval is one arm's own (Student's t over runs): to compare arms, see the differences."
        blocks.append(_drop_empty_column(Table(f"{measure.capitalize()} of each cell", columns, rows, note)))
    if wrong := analysis.list_problems(cells):
        alike: dict[tuple[str, str, str], list[str]] = {}
        for arm, point, seed, what in wrong:
            alike.setdefault((point, arm, what), []).append(str(seed))
        listed = [(point, arm, " ".join(seeds), what) for (point, arm, what), seeds in alike.items()]
        note = "Runs that failed by a node, by memory or by their world are to be run again, and are not scored."
        blocks.append(
            _drop_empty_column(
                Table("Runs that are not done as planned", ("point", "arm", "seeds", "what"), listed, note)
            )
        )
    return Section("Every cell", blocks)


# 4


def _differences_section(asked: SweepDescription, cells: Sequence[ArmCell], primary: Sequence[Difference]) -> Section:
    if not primary:
        return Section("Differences and verdicts", [Text("There is one arm: nothing to compare.")])
    blocks: list[Block] = []
    if picture := figures.forest_plot(primary):
        blocks.append(Figure("Differences in success, with simultaneous 95 % intervals", picture))
    blocks.append(verdict_table(primary))
    if told := _cheapest_comparison(cells, primary):
        blocks.append(Text(told))
    blocks += [
        verdict_table(analysis.differences(cells, asked.families, m))
        for m in analysis.available_measures(cells)
        if m != SUCCESS
    ]
    columns = ("point", "arm", "against", "difference", "95 % interval on new tasks", "says")
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
    note = "What would hold for new runs on new tasks like those of the panel (runs and tasks crossed)."
    if rows:
        blocks.append(_drop_empty_column(Table("Secondary: generalisation to new tasks", columns, rows, note)))
    blocks += _overall_table(cells, asked.families[0])
    return Section("Differences and verdicts", blocks)


def _cheapest_comparison(cells: Sequence[ArmCell], differences: Sequence[Difference]) -> str | None:
    """Which open comparison would cost least to settle, and how."""
    took = {(c.arm, c.point): [a.spent["seconds"] for a in c.done if "seconds" in a.spent] for c in cells}
    found = []
    for d in differences:
        both = [took[arm, d.point] for arm in (d.arm, d.reference)]
        if d.enough and d.open and all(both):
            found.append((d.enough * sum(map(mean, both)), d))
    if not found:
        return None
    seconds, d = min(found, key=lambda pair: pair[0])
    named = f"{d.arm} {d.point}".strip()
    return (
        f"The open comparison that would cost least to settle is {named} against {d.reference}: {d.enough} runs each, some "
        f"{seconds / 3600:.1f} hours of runs, if the difference is as it was seen. Ask that in a file of its own, with new "
        "seeds and before they are run: to add seeds here until something shows would find differences where none are."
    )


def _overall_table(cells: Sequence[ArmCell], pairs: Sequence[Pair]) -> list[Block]:
    found = analysis.compare_overall(cells, pairs)
    if not found:
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
        for o in found
    ]
    note = "Over all points of the sweep; bootstrap of runs within points, which is too sure of itself with few runs."
    return [Table("Over all points", columns, rows, note)]


# 5


def _curves_section(cells: Sequence[ArmCell]) -> Section:
    band = (
        f"Median over runs, and the middle half of them ({figures.MIN_RUNS_FOR_QUARTILES} runs or more; below that, all); "
        "of those that got so far. Raw, not smoothed; every number is in tables/curves.csv. "
    )
    note = band + "Orange: the arm; blue, dashed: the first arm of the same point."
    blocks: list[Block] = [
        Figure("Success and response entropy", picture, note) for picture in figures.curve_plots(cells)
    ]
    if sum(bool(cell.done) for cell in cells) > figures.MAX_CELLS:
        blocks.append(Text(f"The first {figures.MAX_CELLS} cells are drawn; tables/curves.csv has all."))
    blocks += [
        Figure("What else was measured", picture, note) for picture in figures.curve_plots(cells, figures.MORE_CURVES)
    ]
    return Section("Curves", blocks or [Text("No run has left a curve yet.")])


# 6


def _breakdown_section(cells: Sequence[ArmCell]) -> Section:
    done = [(cell, cell.done) for cell in cells if cell.done]
    kinds = sorted({kind for _, runs in done for a in runs for kind in a.tasks["kind"] if kind})
    blocks: list[Block] = []
    if len(kinds) > 1:
        rows = [(c.point, c.arm, *(format_points(_success_of_kind(runs, kind)) for kind in kinds)) for c, runs in done]
        sizes = Counter(done[0][1][0].tasks["kind"])
        note = f"Tasks of each kind: {', '.join(f'{kind} {count}' for kind, count in sizes.items())}."
        blocks.append(_drop_empty_column(Table("Success by kind of task", ("point", "arm", *kinds), rows, note)))
    repeats = min((len(a.tasks["success"][0]) for _, runs in done for a in runs), default=1)
    if repeats > 1:
        heads = [f"{name}{k}" for name in ("pass@", "pass^") for k in range(1, repeats + 1)]
        rows = [(c.point, c.arm, *map(format_points, _pass_rates(runs, repeats))) for c, runs in done]
        note = "pass@k: at least one of k episodes of a task is won; pass^k: all of them (unbiased, means over tasks and runs)."
        blocks.append(_drop_empty_column(Table("Again and again", ("point", "arm", *heads), rows, note)))
    endings = sorted({ending for _, runs in done for a in runs for ending in a.endings})
    if endings:
        rows = [
            (c.point, c.arm, *(format_points(_ending_share(runs, ending)) for ending in endings)) for c, runs in done
        ]
        blocks.append(_drop_empty_column(Table("How episodes ended (% of them)", ("point", "arm", *endings), rows)))
    habits = sorted(
        {name for _, runs in done for a in runs for name in ((a.result.get("final") or {}).get("habits") or {})}
    )
    plain = {
        "turns": "turns",
        "tokens": "tokens",
        "invalid_share": "invalid turns",
        "response_entropy": "entropy (nats)",
    }
    rows = [
        (
            c.point,
            c.arm,
            *(_format_final_mean(runs, name) for name in plain),
            *(_format_final_mean(runs, h) for h in habits),
        )
        for c, runs in done
    ]
    note = "Means over runs, on the final panel; turns and tokens per episode."
    blocks.append(_drop_empty_column(Table("Episodes", ("point", "arm", *plain.values(), *habits), rows, note)))
    return Section("Breakdown", blocks)


def _success_of_kind(runs: Sequence[Archive], kind: str) -> float:
    return mean([s for a in runs for s, k in zip(a.success, a.tasks["kind"], strict=True) if k == kind])


def _pass_rates(runs: Sequence[Archive], repeats: int) -> list[float]:
    wins = [(len(r), sum(x >= 1 for x in r)) for a in runs for r in a.tasks["success"]]
    how = (scores.pass_at, scores.pass_hat)
    return [mean([f(n, c, k) for n, c in wins]) for f in how for k in range(1, repeats + 1)]


def _ending_share(runs: Sequence[Archive], ending: str) -> float:
    episodes = sum(sum(a.endings.values()) for a in runs)
    return sum(a.endings.get(ending, 0) for a in runs) / episodes if episodes else math.nan


def _final_score(archive: Archive) -> Mapping[str, Any]:
    """What a run's score on the final panel says, the world's own numbers among it."""
    final = archive.result.get("final") or {}
    return (final.get("habits") or {}) | final


def _format_final_mean(runs: Sequence[Archive], name: str) -> str:
    values = [value for a in runs if (value := _final_score(a).get(name)) is not None]
    return f"{mean(values):.3g}" if values else "-"


# 7


def _sanity_section(cells: Sequence[ArmCell]) -> Section:
    done = [(cell, archive) for cell in cells for archive in cell.done]
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(name for _, a in done for name in a.players):
        found = {(a.players[name]["success"], a.players[name]["repeats"]) for _, a in done if name in a.players}
        for success, repeats in sorted(found):
            rows.append((name, "final", format_points(success), f"{repeats} episodes a task, one policy"))
    before = {
        (a.result["before"]["panel"], round(a.result["before"]["success"], 6))
        for _, a in done
        if a.result.get("before")
    }
    for panel, success in sorted(before):
        rows.append(
            ("before the first step", panel, format_points(success), "the same policy for all runs with this number")
        )
    for cell in cells:
        if cell.done and (told := _describe_control(cell.done[0].experiment.get("modulation") or {})):
            rows.append((f"{cell.arm} {cell.point}".strip(), "final", format_points(mean(cell.scores(SUCCESS))), told))
    note = "lambda = 0 is no modulation, bit for bit: a law that the tests hold."
    blocks: list[Block] = [Table("What must be told apart from luck", ("row", "panel", "success", ""), rows, note)]
    if done and not any("random" in a.players for _, a in done):
        told = f"python -m aem_exp.evaluate {shlex.quote(f'outputs/{done[0][1].run}')} --only untrained --only random"
        blocks += [
            Text("The untrained and a random policy on the final panel join this table after:"),
            Text(told, code=True),
        ]
    return Section("Sanity rows", blocks)


def _describe_control(modulation: Mapping[str, Any]) -> str:
    """What an arm is a control for, if it is one."""
    lam = modulation.get("lam")
    if modulation.get("shuffle"):
        return "the placebo: the same coefficients, dealt at random"
    constant = isinstance(lam, Mapping) and lam.get("value") == 0
    return "no modulation" if modulation and (lam is None or constant) else ""


# 8


def _published_section(cells: Sequence[ArmCell], published: Path | None) -> Section:
    rows = []
    known = _read_published(published)
    for cell in cells:
        if not (done := cell.done) or not done[0].experiment.get("env"):
            continue
        e = done[0].experiment
        names = tuple(e[key]["name"] for key in ("env", "model", "baseline", "modulation"))
        for row in known:
            if names == tuple(row[key] for key in ("env", "model", "baseline", "modulation")):
                arm = f"{cell.arm} {cell.point}".strip()
                for measure in (SUCCESS, SCORE):
                    if row[measure]:
                        rows.append(
                            (arm, measure, format_points(mean(cell.scores(measure))), row[measure], row["source"])
                        )
    if not rows:
        return Section("Published numbers", [Text("None are known for these worlds, models and arms.")])
    return Section(
        "Published numbers",
        [
            Table(
                "Beside ours", ("arm", "measure", "ours", "published", "by"), rows, f"{PUBLISHED_CAVEAT.capitalize()}."
            )
        ],
    )


def _read_published(file: Path | None) -> list[dict[str, str]]:
    if file is None or not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


# 9


def _commands_section(cells: Sequence[ArmCell]) -> Section:
    rows = [
        (run.archive.run if run.archive else "-", cell.arm, cell.point, str(run.seed), run.command)
        for cell in cells
        for run in cell.runs
    ]
    note = (
        "With the code as it is now; a run dir holds the code that it ran: python -m aem_exp.run RUN_DIR. Of an archive, the "
        "commit is among the provenance above."
    )
    columns = ("run", "arm", "point", "seed", "command")
    return Section("Every run, and the command that makes it", [Table("Runs", columns, rows, note)])


# 10


def _interpretation_section(cells: Sequence[ArmCell]) -> Section:
    few = min((len(cell.done) for cell in cells if cell.done), default=0)
    said: list[Block] = [
        Text(
            "A verdict is read from its interval alone. `better` and `worse` hold for new training runs with other seeds on "
            "this panel; all intervals of the primary table hold at once in 95 of 100 sweeps. `no difference shown` is not `no "
            "difference`: the interval says which effects are ruled out."
        ),
        Text(COVERAGE, code=True),
    ]
    if 0 < few < 5:
        said.insert(
            1, Text(f"There are {few} runs in the smallest cell: intervals are wide, and one odd run moves them.")
        )
    if any(
        run.archive is not None and not run.archive.experiment.get("trainer") for cell in cells for run in cell.runs
    ):
        said.append(
            Text(
                "Runs of other frameworks came by a CSV: their budgets, worlds and checkpoint rules are not known here."
            )
        )
    return Section("How to read this", said)
