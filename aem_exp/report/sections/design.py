"""Sections on the design of a sweep: question, provenance, commands, and the interpretation of verdicts."""

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
Coverage of these intervals in 20,000 simulated comparisons each: without a difference (first number) and with a difference of 6
points (second number). The nominal level is 95 %; the simulation error is 0.2 points. Each run plays 140 tasks 4 times. Both arms
have the same number of runs and the same spread. With 3 runs against 10, up to 7 of 100 intervals miss the true difference. If
one run in ten diverges, the t distribution does not apply and these numbers do not hold.
Command: python tests/bench/interval_coverage.py 20000
runs per arm            3             5            10
this panel      96.5   96.3   95.4   95.5   94.9   95.1 %
new tasks       95.7   95.4   95.1   95.1   95.1   95.1 %
bootstrap       79.9   79.5   87.1   87.4   91.4   91.5 %   (over runs, on this panel; not used)"""


@dataclass(frozen=True)
class SweepDescription:
    """The design of a sweep."""

    name: str
    question: str
    file: str
    source: str
    """The places from which its runs were read."""
    base: str
    arms: Mapping[str, str]
    """Name -> overrides that differ from the base."""
    families: Sequence[Sequence[Pair]]
    """Families of compared pairs: the declared pairs, then pairs with runs of other frameworks."""
    seeds: Sequence[int]


def question_section(sweep: SweepDescription, cells: Sequence[ArmCell]) -> Section:
    done = [archive for cell in cells for archive in cell.done]
    facts = [*_design_facts(sweep, cells, done), *_run_facts(done)]
    facts += [("planned power", text) for text in _planned_power(sweep, cells)]
    arms = [(arm, words or "none: the base") for arm, words in sweep.arms.items()]
    return Section(
        "The question", [Table("Design", ("item", "value"), facts), Table("Arms", ("arm", "overrides"), arms)]
    )


def _design_facts(sweep: SweepDescription, cells: Sequence[ArmCell], done: Sequence[Archive]) -> list[tuple[str, str]]:
    """The runs, the compared pairs and the measures."""
    distinct, declared = {archive.run for archive in done}, sweep.families[0]
    shared = [("shared", f"{len(distinct)} different runs; some belong to several cells")]
    return [
        ("sweep", sweep.file),
        ("read from", sweep.source),
        ("base", sweep.base or "the default experiment"),
        ("seeds", " ".join(map(str, sweep.seeds))),
        ("runs", f"{len(done)} of {sum(len(cell.runs) for cell in cells)} done"),
        *(shared if len(distinct) < len(done) else []),
        ("compared", "; ".join(f"{one} against {other}" for one, other in declared) or "nothing"),
        ("not compared", "all other pairs of arms, because they were not declared (`pairs:` in the sweep file)"),
        ("primary measure", "success on the final panel, mean over its tasks and repeats"),
        (
            "secondary measures",
            "the score of the environment, if it has one; area under the training curve; success on new tasks",
        ),
    ]


def _run_facts(done: Sequence[Archive]) -> list[tuple[str, str]]:
    """The panels, the checkpoint rule and the method revisions of the runs."""
    facts = []
    for name, title in (("final", "final panel"), ("after", "panel of the curves")):
        for panel, count in Counter(_describe_panel(a, name) for a in done if a.result.get(name)).items():
            facts.append((title, f"{panel}{'' if count == len(done) else f' ({count} runs)'}"))
    rules = Counter(a.result.get("checkpoint_rule") or "unknown (CSV)" for a in done)
    only = "; the same rule for every run, never the best checkpoint on the scored panel" if len(rules) == 1 else ""
    facts += [("checkpoint", f"{rule}{only or f' ({count} runs)'}") for rule, count in rules.items()]
    if len(revisions := analysis.runs_by_revision(done)) > 1:
        counts = ", ".join(f"{number} ({len(runs)} runs)" for number, runs in revisions.items())
        facts.append(
            ("method revisions", f"{counts}; the same experiment trains differently in each (--across-revisions)")
        )
    return facts


def _describe_panel(archive: Archive, which: str) -> str:
    score, repeats = archive.result[which], len(archive.tasks["success"][0])
    return f"{score['panel']} ({score['panel_hash']}), {score['episodes'] // repeats} tasks x {repeats}"


def _planned_power(sweep: SweepDescription, cells: Sequence[ArmCell]) -> list[str]:
    """The difference that the design can detect, for each panel size, computed without its results."""
    seeds, comparisons = len(sweep.seeds), len(sweep.families[0]) * len({cell.point for cell in cells})
    if seeds < 2 or not comparisons:
        return ["none: one seed per arm cannot show a difference"] if seeds < 2 else []
    sizes = {(len(a.tasks["id"]), len(a.tasks["success"][0])) for cell in cells for a in cell.done}
    spread, out = " and ".join(f"{sd:g}" for sd in power.SEED_SDS), []
    for tasks, repeats in sorted(sizes):
        points = [
            power.planned_detectable_points(seeds, tasks, repeats, sd, comparisons=comparisons) for sd in power.SEED_SDS
        ]
        detectable = " and ".join(f"{value:.1f}" for value in points)
        out.append(
            f"{tasks} tasks x {repeats} repeats: detects {detectable} points with 80 % power, "
            f"if the standard deviation over seeds is {spread} points"
        )
    return out


def provenance_section(cells: Sequence[ArmCell]) -> Section:
    columns = (
        *("point", "arm", "code", "method", "policy", "machine", "world", "planned budget"),
        *("steps", "episodes", "tokens", "updates"),
    )
    rows = [[cell.point, cell.arm, *_provenance_row(cell.done)] for cell in cells if cell.done]
    note = (
        "Planned budget: steps x tasks x group x oversampling; compared arms have the same. Realised steps, episodes, tokens and "
        "updates are means per run; they depend on dynamic sampling and on the policy."
    )
    time_columns = ("point", "arm", "minutes per run", "GPU-hours per run", "runs resumed with changes")
    times = [[cell.point, cell.arm, *_time_row(cell.done)] for cell in cells if cell.done]
    packages = Counter(
        ", ".join(f"{name} {number}" for name, number in a.result.get("packages", {}).items())
        for cell in cells
        for a in cell.done
    )
    return Section(
        "Provenance",
        [
            drop_empty_column(Table("Code, machine and budget", columns, rows, note)),
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
    """The first 10 digits. A `+` marks uncommitted changes."""
    return commit[:10] + ("+" if commit.endswith("+") and len(commit) > 10 else "")


def _describe_policy(archive: Archive) -> str:
    """The initial policy: the model and its weights, or "generated"."""
    model = archive.experiment.get("model") or {}
    revision = archive.provenance.get("weights") or model.get("revision") or ("generated" if model.get("make") else "")
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
        "These commands use the current code. A run directory holds its own code: python -m aem_exp.run RUN_DIR. For an archive, "
        "see the commit under Provenance."
    )
    columns = ("run", "arm", "point", "seed", "command")
    return Section("Runs and their commands", [Table("Runs", columns, rows, note)])


def interpretation_section(cells: Sequence[ArmCell]) -> Section:
    few = min((len(cell.done) for cell in cells if cell.done), default=0)
    texts: list[Block] = [
        Text(
            "A verdict follows from its interval alone. `better` and `worse` hold for new training runs with other seeds on this "
            "panel. In 95 of 100 sweeps, all intervals of the primary table contain the true difference. `no difference shown` "
            "does not mean `no difference`: the interval shows which effects are ruled out."
        ),
        Text(COVERAGE, code=True),
    ]
    if 0 < few < 5:
        texts.insert(
            1, Text(f"The smallest cell has {few} runs. Its intervals are wide, and a single run can change them much.")
        )
    if any(
        run.archive is not None and not run.archive.experiment.get("trainer") for cell in cells for run in cell.runs
    ):
        texts.append(
            Text(
                "Runs of other frameworks were read from a CSV file: their budgets, worlds and checkpoint rules are unknown."
            )
        )
    return Section("How to read this report", texts)
