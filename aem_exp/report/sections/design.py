"""The sections on how a sweep was made and how to read it: question, provenance, commands, and the meaning of a verdict."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aem_exp.report import analysis
from aem_exp.report.analysis import ArmCell, Pair
from aem_exp.report.render import Block, Section, Table, Text
from aem_exp.report.sections.formats import drop_empty_column, format_mean
from aem_exp.rundir.archive import Archive
from aem_exp.stats import power

COVERAGE: Final = """\
How often intervals like these hold the truth, in 20,000 simulated comparisons each, without a difference and with one of 6
points (the nominal level is 95 %; the simulation error is 0.2 points). Command: python tests/bench/interval_coverage.py 20000.
Each run plays 140 tasks 4 times. Both arms have the same number of runs and the same spread. With 3 runs against 10, up to 7 of
100 intervals miss the truth. If one run in ten diverges, the t distribution does not apply and none of these numbers holds.
runs per arm            3             5            10
this panel      96.5   96.3   95.4   95.5   94.9   95.1 %
new tasks       95.7   95.4   95.1   95.1   95.1   95.1 %
bootstrap       79.9   79.5   87.1   87.4   91.4   91.5 %   (over runs, on this panel: not used)"""


@dataclass(frozen=True)
class SweepDescription:
    """The design of a sweep."""

    name: str
    question: str
    file: str
    source: str
    """Where its runs were read from."""
    base: str
    arms: Mapping[str, str]
    """Name -> how it differs from the base, in words."""
    families: Sequence[Sequence[Pair]]
    """What is compared: what was declared, then runs from elsewhere."""
    seeds: Sequence[int]


def question_section(sweep: SweepDescription, cells: Sequence[ArmCell]) -> Section:
    done = [archive for cell in cells for archive in cell.done]
    facts = [*_design_facts(sweep, cells, done), *_run_facts(done)]
    facts += [("planned power", text) for text in _planned_power(sweep, cells)]
    arms = [(arm, words or "as the base") for arm, words in sweep.arms.items()]
    return Section("The question", [Table("Asked", ("", "is"), facts), Table("Arms", ("arm", "differs by"), arms)])


def _design_facts(sweep: SweepDescription, cells: Sequence[ArmCell], done: Sequence[Archive]) -> list[tuple[str, str]]:
    """Which runs there are, what is compared, and by which measures."""
    distinct, declared = {archive.run for archive in done}, sweep.families[0]
    shared = [("shared", f"these are {len(distinct)} runs: some stand in several cells")]
    return [
        ("sweep", sweep.file),
        ("read from", sweep.source),
        ("base", sweep.base or "the default experiment"),
        ("seeds", " ".join(map(str, sweep.seeds))),
        ("runs", f"{len(done)} of {sum(len(cell.runs) for cell in cells)} done"),
        *(shared if len(distinct) < len(done) else []),
        ("compared", "; ".join(f"{one} against {other}" for one, other in declared) or "nothing"),
        ("not compared", "other pairs of arms: they were not declared (`pairs:` of a sweep's file)"),
        ("primary measure", "success on the final panel, mean over its tasks and repeats"),
        (
            "secondary",
            "the world's own score, where it has one; the area under the curve of success in training; new tasks",
        ),
    ]


def _run_facts(done: Sequence[Archive]) -> list[tuple[str, str]]:
    """What the runs were scored on, by which checkpoint, and the revisions of the method that trained them."""
    facts = []
    for name, title in (("final", "final panel"), ("after", "panel of the curves")):
        for panel, count in Counter(_describe_panel(a, name) for a in done if a.result.get(name)).items():
            facts.append((title, f"{panel}{'' if count == len(done) else f' ({count} runs)'}"))
    rules = Counter(a.result.get("checkpoint_rule") or "not known: by a CSV" for a in done)
    only = "; the same for every run, never the best on the panel it is scored on" if len(rules) == 1 else ""
    facts += [("checkpoint", f"{rule}{only or f' ({count} runs)'}") for rule, count in rules.items()]
    if len(revisions := analysis.runs_by_revision(done)) > 1:
        counts = ", ".join(f"{number} ({len(runs)} runs)" for number, runs in revisions.items())
        facts.append(
            ("method revisions", f"{counts}: the same experiment trains differently in each; compared as asked")
        )
    return facts


def _describe_panel(archive: Archive, which: str) -> str:
    score, repeats = archive.result[which], len(archive.tasks["success"][0])
    return f"{score['panel']} ({score['panel_hash']}), {score['episodes'] // repeats} tasks x {repeats}"


def _planned_power(sweep: SweepDescription, cells: Sequence[ArmCell]) -> list[str]:
    """What the design could show, before it was run; for each size of panel."""
    seeds, comparisons = len(sweep.seeds), len(sweep.families[0]) * len({cell.point for cell in cells})
    if seeds < 2 or not comparisons:
        return ["one seed an arm shows no difference between arms"] if seeds < 2 else []
    sizes = {(len(a.tasks["id"]), len(a.tasks["success"][0])) for cell in cells for a in cell.done}
    spread, out = " and ".join(f"{sd:g}" for sd in power.SEED_SDS), []
    for tasks, repeats in sorted(sizes):
        points = [
            power.planned_detectable_points(seeds, tasks, repeats, sd, comparisons=comparisons) for sd in power.SEED_SDS
        ]
        detectable = " and ".join(f"{value:.1f}" for value in points)
        out.append(
            f"{tasks} tasks x {repeats}: {detectable} points, found 4 times in 5, where seeds spread by {spread}"
        )
    return out


def provenance_section(cells: Sequence[ArmCell]) -> Section:
    columns = (
        *("point", "arm", "code", "method", "policy", "machine", "world", "planned budget"),
        *("steps", "episodes", "tokens", "updates"),
    )
    rows = [[cell.point, cell.arm, *_provenance_row(cell.done)] for cell in cells if cell.done]
    note = (
        "Budgets match as planned: steps x tasks x group x oversampling. Realised episodes, tokens and updates are means per "
        "run; dynamic sampling and the policy itself decide them."
    )
    time_columns = ("point", "arm", "minutes a run", "GPU-hours a run", "starts with changes")
    times = [[cell.point, cell.arm, *_time_row(cell.done)] for cell in cells if cell.done]
    packages = Counter(
        ", ".join(f"{name} {number}" for name, number in a.result.get("packages", {}).items())
        for cell in cells
        for a in cell.done
    )
    return Section(
        "Where the runs come from",
        [
            drop_empty_column(Table("Provenance", columns, rows, note)),
            drop_empty_column(Table("Time", time_columns, times)),
            *(Text(f"{count} runs with {text}.") for text, count in packages.items() if text),
        ],
    )


def _provenance_row(done: Sequence[Archive]) -> list[str]:
    machines = _join_distinct(
        f"{a.provenance.get('device')} x {a.provenance.get('processes', 1)}, {a.provenance.get('machine', '')}"
        for a in done
        if a.provenance
    )
    return [
        _join_distinct(_shorten_commit(a.provenance.get("commit") or "") for a in done),
        ", ".join(map(str, analysis.runs_by_revision(done))) or "-",
        _join_distinct(_describe_policy(a) for a in done),
        machines,
        _join_distinct(a.result.get("fingerprint") for a in done),
        _join_distinct(analysis.planned_budget(a) for a in done),
        _join_distinct(a.result.get("steps") for a in done),
        *(format_mean([a.spent[key] for a in done if key in a.spent]) for key in ("episodes", "tokens", "updates")),
    ]


def _join_distinct(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values if value})) or "-"


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
    return [format_mean([each / 60 for each in seconds], 1), format_mean(hours, 1), str(resumed)]


def commands_section(cells: Sequence[ArmCell]) -> Section:
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


def interpretation_section(cells: Sequence[ArmCell]) -> Section:
    few = min((len(cell.done) for cell in cells if cell.done), default=0)
    texts: list[Block] = [
        Text(
            "A verdict is read from its interval alone. `better` and `worse` hold for new training runs with other seeds on "
            "this panel; all intervals of the primary table hold at once in 95 of 100 sweeps. `no difference shown` is not `no "
            "difference`: the interval says which effects are ruled out."
        ),
        Text(COVERAGE, code=True),
    ]
    if 0 < few < 5:
        texts.insert(
            1, Text(f"There are {few} runs in the smallest cell: intervals are wide, and one odd run moves them.")
        )
    if any(
        run.archive is not None and not run.archive.experiment.get("trainer") for cell in cells for run in cell.runs
    ):
        texts.append(
            Text(
                "Runs of other frameworks came by a CSV: their budgets, worlds and checkpoint rules are not known here."
            )
        )
    return Section("How to read this", texts)
