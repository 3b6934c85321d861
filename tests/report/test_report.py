"""Reports from archives of real runs: numbers, refusals, reasons, and runs of other frameworks."""

import csv
import gzip
import json
import re
from dataclasses import replace

import pytest
from support import ROOT

from aem_exp.config import ConfigError
from aem_exp.report import analysis, figures, render, sections
from aem_exp.report import command as report
from aem_exp.report.analysis import ArmCell, SeedRun
from aem_exp.report.sections.step_sizes import step_size_table
from aem_exp.rundir import archive
from aem_exp.stats import compare

RESULTS = ROOT / "sweeps" / "results"


@pytest.fixture(scope="module")
def runs():
    """The archives of the household's GRPO arms, by arm and seed."""
    out = {}
    for file in sorted((RESULTS / "household_grpo").glob("*.json.gz")):
        kept = archive.read(file)
        out.setdefault(kept.experiment["modulation"]["name"], []).append(kept)
    return out


def cell(arm, archives, point=""):
    return ArmCell(arm, point, tuple(SeedRun(kept.seed, kept) for kept in archives))


@pytest.mark.slow
def test_numbers_of_the_report_follow_from_the_archives(tmp_path, monkeypatch, capsys, runs):
    monkeypatch.setenv("AEM_OUTPUTS", str(tmp_path))
    assert report.main(["household_grpo", "--out", str(tmp_path / "page")]) == 0
    with (tmp_path / "page" / "tables" / "success_of_each_cell.csv").open() as file:
        table = {row["arm"]: row for row in csv.DictReader(file)}
    with (tmp_path / "page" / "tables" / "differences_in_success.csv").open() as file:
        verdicts = {row["arm"]: row for row in csv.DictReader(file)}
    assert capsys.readouterr().out.count("against none") == 6
    mean = {}
    for arm, kept in runs.items():
        scores = [each.result["final"]["success"] for each in kept]
        assert table[arm]["each seed"].split() == [f"{100 * score:.1f}" for score in scores]
        mean[arm] = sum(scores) / len(scores)
        assert table[arm]["mean"] == f"{100 * mean[arm]:.1f}"
        assert [each.success for each in kept] and scores == pytest.approx([sum(k.success) / 128 for k in kept])
    for arm, row in verdicts.items():
        one, other = ([each.result["final"]["success"] for each in runs[name]] for name in (arm, "none"))
        found = compare.welch_interval(one, other, len(runs) - 1)
        assert row["difference"] == f"{100 * (mean[arm] - mean['none']):+.1f}"
        assert row["95 % interval"] == f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
        assert row["verdict"] == compare.verdict(found)
    text = (tmp_path / "page" / "report.md").read_text()
    assert all(row["verdict"] in text for row in verdicts.values())


def test_sizes_of_the_steps_are_shown_beside_success(runs):
    """Means over steps, then over runs, with the SD over runs; runs of older versions have no sizes but the gradient norm."""
    old = [cell("none", runs["none"][:2])]
    (row,) = size_table(old).rows
    assert row[:3] == ("none", analysis_points(old[0]), "-") and row[4:] == ("-",) * 5 + ("0.0005",)
    curves = ([0.0, 0.01, 0.03], [0.0, 0.03, 0.05])
    new = [
        replace(kept, curves={"step": [0, 1, 2], "train/step_kl": [None, *curve[1:]]})
        for kept, curve in zip(runs["aem"][:2], curves, strict=True)
    ]
    table = size_table([cell("aem", new)])
    (row,) = table.rows
    assert dict(zip(table.columns, row, strict=True))["KL of a step (nats)"] == "0.03 ± 0.014"
    assert size_table([cell("aem", [replace(kept, curves={}) for kept in new])]) is None


def size_table(cells):
    return step_size_table([(each, each.done) for each in cells])


def analysis_points(each):
    return sections.format_points(analysis.mean(each.scores(analysis.SUCCESS)))


@pytest.mark.slow
def test_figures_are_deterministic(runs):
    cells = [cell(arm, kept[:3]) for arm, kept in list(runs.items())[:2]]
    for draw in (figures.dot_plot, lambda c: figures.curve_plots(c)[0], lambda c: figures.forest_plot(compared(c))):
        assert draw(cells) == draw(cells) and draw(cells).startswith("<svg")


def test_curves_without_the_reference_arm(runs):
    """If the reference arm has no finished run, each arm is drawn alone."""
    cells = [ArmCell("none", "", (SeedRun(0, None),)), cell("aem", runs["aem"][:2]), cell("batch", runs["batch"][:2])]
    (picture,) = figures.curve_plots(cells)
    assert ">aem<" in picture and ">batch<" in picture and figures.REFERENCE_COLOR.lower() not in picture


def test_archives_are_small_and_deterministic(runs, tmp_path):
    for kept in runs["aem"][:2]:
        first = archive.write(kept, tmp_path).read_bytes()
        assert archive.write(archive.read(tmp_path / f"{kept.run}.json.gz"), tmp_path).read_bytes() == first
        assert len(first) < 50_000


RAGGED = {"run": "x", "experiment": {}, "what": "done", "why": ["", ""], "tasks": {"id": [1], "success": []}}
WHOLE = {
    "run": "x",
    "experiment": {"seed": 0},
    "what": "done",
    "why": ["", ""],
    "result": {"final": {"panel": "test"}},
    "tasks": {"id": ["a"], "kind": [""], "success": [[1.0]]},
}
SPOILT = {
    "another run": {"run": "../x"},
    "no seed": {"experiment": {}},
    "a text as the world": {"experiment": {"seed": 0, "env": "x"}},
    "no tasks": {"tasks": {}},
    "no kinds": {"tasks": {"id": ["a"], "success": [[1.0]]}},
    "no repeats": {"tasks": {"id": ["a"], "kind": [""], "success": [[]]}},
    "too much success": {"tasks": {"id": ["a"], "kind": [""], "success": [[50.0]]}},
    "NaN": {"tasks": {"id": ["a"], "kind": [""], "success": [[float("nan")]]}},
    "a text in a curve": {"curves": {"step": [1], "x": ["1"]}},
    "a list as provenance": {"provenance": [1]},
    "a player without a score": {"players": {"random": {}}},
}
BAD = {
    **{name: gzip.compress(json.dumps(WHOLE | spoilt).encode()) for name, spoilt in SPOILT.items()},
    "cut short": gzip.compress(json.dumps(WHOLE).encode())[:-12],
    "deep": gzip.compress(b"[" * 100_000),
    "no gzip": b"no gzip",
    "no JSON": gzip.compress(b"no JSON"),
    "a list": gzip.compress(b"[]"),
    "other fields": gzip.compress(json.dumps(RAGGED | {"tasks": {}, "evil": 1}).encode()),
    "ragged": gzip.compress(json.dumps(RAGGED).encode()),
    "a bomb": gzip.compress(b"0" * (archive.MAX_BYTES + 2)),
}


def test_valid_archive_is_read(tmp_path):
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(json.dumps(WHOLE).encode()))
    assert archive.read(tmp_path / "x.json.gz").success == [1.0]


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_invalid_archive_is_refused(data, tmp_path):
    (tmp_path / "x.json.gz").write_bytes(data)
    with pytest.raises(ConfigError) as error:
        archive.read(tmp_path / "x.json.gz")
    assert (error.value.field, error.value.value) == ("archive", str(tmp_path / "x.json.gz"))


def changed(kept, **final):
    return replace(kept, result={**kept.result, **final})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda k: changed(k, final={**k.result["final"], "panel_hash": "another"}), "panels differ: "),
        (lambda k: changed(k, fingerprint="household-2"), "worlds (fingerprints) differ: household-2, "),
        (lambda k: changed(k, checkpoint_rule="best on dev"), "checkpoint rules differ: best on dev, last step"),
        (
            lambda k: replace(k, experiment={**k.experiment, "trainer": {**k.experiment["trainer"], "steps": 61}}),
            "planned budgets (steps x tasks x group x oversampling) differ: 60 x 8 x 8 x 1, 61 x 8 x 8 x 1",
        ),
        (lambda k: replace(k, tasks={**k.tasks, "id": [*k.tasks["id"][:-1], "another"]}), "tasks of the panels differ"),
    ],
)
def test_runs_that_must_not_be_compared_are_refused(spoil, said, runs):
    """One different run among twenty is enough."""
    cells = [cell("none", runs["none"]), cell("aem", [*runs["aem"][:-1], spoil(runs["aem"][-1])])]
    (found,) = compared(cells)
    assert found.interval is None and found.verdict.startswith(f"not compared: {said}"), found.verdict
    assert "not compared" in render.render_markdown(made(cells))


def compared(cells, *measure):
    """The differences of each arm to the first arm."""
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    return analysis.differences(cells, [[(arm, arms[0]) for arm in arms[1:]]], *measure)


def made(cells, word="s"):
    arms = {c.arm: word for c in cells}
    asked = sections.SweepDescription(
        word, word, word, word, word, arms, [[(arm, cells[0].arm) for arm in list(arms)[1:]]], (0, 1)
    )
    return sections.build_report(asked, cells, compared(cells))


@pytest.mark.slow
def test_few_runs_limit_the_statements(runs):
    none = cell("none", runs["none"])
    (one,) = compared([none, cell("aem", runs["aem"][:1])])
    assert one.verdict == "not compared: one run: its spread is unknown"
    (three,) = compared([cell("none", runs["none"][:3]), cell("aem", runs["aem"][:3])])
    assert three.p is None and three.interval is not None
    assert "not attainable with 3 seeds" in render.render_markdown(
        made([cell("none", runs["none"][:3]), cell("aem", runs["aem"][:3])])
    )
    (nothing,) = compared([none, ArmCell("aem", "", (SeedRun(0, None),))])
    assert nothing.verdict == "not compared: no run"


def test_runs_without_spread_are_not_compared(runs):
    same = [replace(kept, tasks=runs["aem"][0].tasks) for kept in runs["aem"][:3]]
    (found,) = compared([cell("none", same), cell("aem", same)])
    assert found.verdict.startswith("not compared: no spread in either arm")


def test_missing_and_failed_runs_are_listed(runs):
    cells = [
        cell("none", runs["none"]),
        ArmCell(
            "aem",
            "",
            (
                *(SeedRun(k.seed, k) for k in runs["aem"][:5]),
                SeedRun(5, None),
                SeedRun(6, replace(runs["aem"][6], what="failed", why=("oom", "no memory"), result={}, tasks={})),
            ),
        ),
    ]
    assert analysis.list_problems(cells) == [("aem", "", 5, "missing"), ("aem", "", 6, "failed (oom: no memory)")]
    (found,) = compared(cells)
    assert found.partial and found.verdict.startswith("so far: ")


@pytest.mark.slow
def test_diverged_runs_are_scored(runs):
    lost = changed(replace(runs["aem"][0], what="failed", why=("nan", "...")), diverged="the norm is nan in step 3")
    cells = [cell("none", runs["none"]), cell("aem", [lost, *runs["aem"][1:]])]
    assert len(compared(cells)[0].one) == 10
    assert analysis.list_problems(cells) == [
        ("aem", "", 0, "diverged, scored after its last finite update: the norm is nan in step 3")
    ]
    assert "10 v 10, 1 diverged" in render.render_markdown(made(cells))


@pytest.mark.slow
def test_names_are_escaped(runs):
    evil = r"\<script>alert(1)</script>|"
    cells = [cell("none", runs["none"][:2]), cell(evil, runs["aem"][:2])]
    page = made(cells, evil)
    assert "<script" not in render.render_html(page)
    for line in render.render_markdown(page).splitlines():
        assert not re.search(r"(?<!\\)(\\\\)*<", re.sub("`[^`]*`", "", line)), (
            line
        )  # each `<` after an odd number of backslashes


def test_overall_comparison_over_points(runs):
    """Four points with five runs per arm give one overall comparison."""
    cells = [cell(arm, runs[arm][:5], f"p{i}") for i in range(4) for arm in ("none", "aem")]
    pairs = [("aem", "none")]
    assert not analysis.compare_overall(cells, pairs)  # the same runs at several points are not independent
    cells = [cell(c.arm, [replace(k, run=f"{k.run}-{c.point}") for k in c.done], c.point) for c in cells]
    (found,) = analysis.compare_overall(cells, pairs)
    assert found.points == 4 and found.improvement.low <= found.improvement.value <= found.improvement.high
    assert not analysis.compare_overall(cells[:6], pairs)
    assert {d.comparisons for d in compared(cells)} == {4}  # all points are one family
    odd = replace(cells[1].done[0], result={**cells[1].done[0].result, "fingerprint": "another"})
    assert not analysis.compare_overall([cells[0], cell("aem", [odd, *cells[1].done[1:]], "p0"), *cells[2:]], pairs)


def test_area_covers_all_planned_steps(runs):
    """A run that stopped early is not scored by its first steps alone."""
    kept = runs["none"][0]
    whole = [value for _, value in kept.curve("train/success")]
    assert analysis.measure_value(kept, analysis.AREA) == pytest.approx(sum(whole) / 60, abs=1e-4)
    cut = replace(kept, curves={"step": [1.0, 2.0], "train/success": [0.2, 0.4]})
    assert analysis.measure_value(cut, analysis.AREA) == pytest.approx((0.2 + 59 * 0.4) / 60)


@pytest.mark.slow
def test_tables_keep_foreign_files_and_escape_formulas(runs, tmp_path):
    page = made([cell("none", runs["none"][:2]), cell("aem", runs["aem"][:2])])
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "mine.csv").write_text("mine")
    files = render.write(page, tmp_path, analysis.curve_rows([]))
    table = tmp_path / "tables" / "success_over_repeats.csv"
    assert table in files and (tmp_path / "tables" / "mine.csv").exists()
    odd = render.Report(
        "t", "q", [render.Section("s", [render.Table("t", ("a",), [("=1+1",), ("-0.5",), ("+2.0",), ("-",)])])]
    )
    render.write(odd, tmp_path, [])
    assert not table.exists() and (tmp_path / "tables" / "mine.csv").exists()
    assert (tmp_path / "tables" / "t.csv").read_text().splitlines() == ["a", "'=1+1", "-0.5", "+2.0", "-"]


# Method revisions.


def revised(kept, method):
    return replace(kept, provenance=kept.provenance | {"method": method})


@pytest.mark.slow
def test_runs_of_two_revisions_are_refused_unless_requested(tmp_path, monkeypatch, capsys, runs):
    """Seven arms of ten runs of revision 0; three runs of one arm have revision 1."""
    monkeypatch.setenv("AEM_OUTPUTS", str(tmp_path))
    folder = tmp_path / "archives"
    for arm, kept in runs.items():
        for i, each in enumerate(kept):
            archive.write(revised(each, 1) if arm == "aem" and i < 3 else each, folder)
    assert {archive.read(file).method for file in folder.glob("*aem-s[345]-*")} == {0}
    assert report.main(["household_grpo", "--from", str(folder)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "--across-revisions" in err
    assert "67 of method revision 0 (" in err and "3 of method revision 1 (" in err
    assert all(kept.run in err for kept in runs["aem"][:3])
    assert not (tmp_path / "reports").exists()
    assert report.main(["household_grpo", "--from", str(folder), "--across-revisions"]) == 0
    page = (tmp_path / "reports" / "household_grpo" / "report.md").read_text()
    assert "0 (67 runs), 1 (3 runs)" in page and "better" in page + capsys.readouterr().out


@pytest.mark.slow
def test_one_revision_is_not_mentioned(runs):
    newer = [cell(arm, [revised(kept, 1) for kept in runs[arm][:3]]) for arm in ("none", "aem")]
    assert analysis.runs_by_revision(newer[0].done).keys() == {1}
    assert "method revisions" not in render.render_markdown(made(newer))


# Runs of other frameworks.


def theirs(path, rows):
    path.write_text("arm,seed,step,task,success\n" + "".join(f"{','.join(map(str, row))}\n" for row in rows))
    return path


@pytest.mark.slow
def test_runs_of_other_frameworks_are_compared(tmp_path, monkeypatch, capsys, runs):
    monkeypatch.setenv("AEM_OUTPUTS", str(tmp_path))
    tasks = runs["none"][0].tasks["id"]
    rows = [
        ("theirs", s, step, task, int((i + s) % 3 > 0))
        for s in range(3)
        for step in (1, 2)
        for i, task in enumerate(tasks)
    ]
    file = theirs(tmp_path / "theirs.csv", rows)
    assert report.main(["household_grpo", "--csv", str(file), "--json"]) == 0
    found = {row["arm"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["theirs"]["one"] == pytest.approx([86 / 128, 85 / 128, 85 / 128], abs=0.01)
    assert found["theirs"]["interval"]["high"] < 0 and found["theirs"]["verdict"] == "worse"
    assert (
        found["aem"]["comparisons"] == 6 and found["theirs"]["comparisons"] == 1
    )  # foreign runs form a family of their own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        ([("x", 0, 1, "nowhere", 1)], ["step 1", "lacks 128 tasks", "1 other"]),
        ([("x", "zero", 1, "a", 1)], ["line 2", "seed"]),
        ([("x", 0, 1, "a", 2)], ["line 2", "success"]),
        ([("=cmd()", 0, 1, "a", 1)], ["line 2", "arm"]),
        ([("x", 0, 1, "a", 1), ("x", 1, 2, "a", 1)], [", x: ", "steps (1, 2)"]),
        ([], ["arm, seed, step, task, success"]),
    ],
)
def test_invalid_csv_is_refused(rows, facts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AEM_OUTPUTS", str(tmp_path))
    file = theirs(tmp_path / "bad.csv", rows)
    assert report.main(["household_grpo", "--csv", str(file)]) == 2
    err = capsys.readouterr().err
    assert f"--csv={file}" in err and all(fact in err for fact in facts) and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["household_qick"], ["sweep=household_qick:", "did you mean household_quick?"]),
        (["household_search"], ["sweep=household_search:", "study"]),
        (["household_quick"], ["sweep=household_quick:", "6 runs", "python -m aem_exp.sweep household_quick --local"]),
        (["household_grpo", "--from", "/nowhere"], ["--from=/nowhere:", "archives"]),
        (["household_grpo", "--csv", "/nowhere.csv"], ["--csv=/nowhere.csv:", "cannot be read"]),
    ],
)
def test_invalid_arguments_are_refused(words, facts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AEM_OUTPUTS", str(tmp_path))
    assert report.main(words) == 2
    err = capsys.readouterr().err
    assert all(fact in err for fact in facts) and len(err.splitlines()) == 1
