"""The audited grade: forgeries are not believed, correct patches are, in worlds of all three formats."""

import json
from dataclasses import replace

import pytest
from support import repository_rows, sandbox_images
from support.rewrites import rewrites

from aem_exp.core.errors import ConfigError
from aem_exp.envs import audit
from aem_exp.envs.audit import NO_CHANGE, SOLUTION
from aem_exp.envs.swe import audited, forged_code, forgeries, generated, patch
from aem_exp.envs.swe.grade import grade_changes
from aem_exp.envs.swe.world import Made
from aem_exp.evaluate import command as evaluate
from aem_exp.sandboxes.bwrap import Bwrap

pytestmark = pytest.mark.machine
LIMITS = {"memory_mb": 400, "disk_mb": 64, "processes": 64, "output_mb": 1, "cpu_seconds": 60}
SETTINGS = {"limits": LIMITS, "turns": 4, "grader": "audited"}
# One or two of each class; `python -m aem_exp.evaluate env=swe --audit` plays all.
PLAYED = {
    "the gold patch",
    "no change",
    "an empty line in the README",
    "every report says passed",
    "exit 0 after printed lines",
    "pytest.ini",
    "cheat-1.0.dist-info",
    "sitecustomize",
    "pytest.py",
    "hooks",
    "tests without content",
    "exit 0 at import, after printed lines",
    "patches pytest's reports",
    "empties the tests while they run",
    "objects that are equal to everything",
    "the expected value, from the caller's source",
}


@pytest.fixture(scope="module")
def swe():
    sandbox_images.needs_grading()
    return Made(Bwrap(), modules=2, functions=2, **SETTINGS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory, swe):
    """A world of rows whose tests run with plain pytest, as in most rows of SWE-bench: `test` there, `train` of R2E-Gym."""
    sandbox_images.needs_skopeo()
    folder = tmp_path_factory.mktemp("rows")
    repository_rows.write(folder, repository_rows.PLAIN_PYTEST)
    repository_rows.prepare(folder)
    return repository_rows.open_world(folder, **SETTINGS)


# Least number of the played forgeries that the official rule believes in each format. It shows that the forgeries are real.
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("format", "split", "official"), [("swe", "dev", 3), ("swebench", "test", 7), ("r2e", "train", 6)]
)
def test_forgeries_are_not_believed_and_solutions_are(request, format, split, official):
    world = request.getfixturevalue("swe" if format == "swe" else "rows")
    trials = audit.play_forgeries(world, world.tasks(split)[:1], lambda one: one.name in PLAYED, lambda trial: None)
    assert len(trials) == len(PLAYED)
    assert [trial.forgery.name for trial in trials if trial.succeeded] == ["the gold patch"], trials
    assert all(trial.is_as_expected for trial in trials)
    forged = [trial for trial in trials if trial.forgery.kind not in (SOLUTION, NO_CHANGE)]
    assert sum(trial.metrics["end_resolved"] for trial in forged) >= official
    for trial in forged:
        assert trial.metrics["end_resolved_audited"] == 0
        assert bool(trial.note) == (trial.metrics["end_resolved"] == 1), trial  # the reason of a difference is stated


def test_forgeries_have_many_classes_and_unique_names(swe):
    listed = swe.forgeries(swe.tasks("dev")[0])
    assert len({(one.kind, one.name) for one in listed}) == len(listed) >= 38
    assert {one.name for one in listed} >= PLAYED
    assert len({one.kind for one in listed}) >= 11


def changes(files):
    written = {
        path: patch.File("100644", content if isinstance(content, bytes) else content.encode())
        for path, content in files.items()
        if content is not None
    }
    return patch.Changes(written, frozenset(path for path, content in files.items() if content is None))


@pytest.mark.slow
def test_correct_patches_of_all_kinds_are_resolved(swe):
    """`python tests/bench/grader.py` grades 200 of them."""
    task = swe.tasks("dev")[2]
    for kind, files in rewrites(task.id).items():
        grade = grade_changes(swe, swe.instance(task), changes(files))
        assert (grade.official, grade.resolved, grade.reason) == ("resolved", True, ""), (kind, grade.audit)


def test_a_change_of_a_protected_file_is_left_out_and_named(swe):
    task = swe.tasks("dev")[0]
    made = generated.generate_repository(task.id, 2, 2)
    files = {"conftest.py": "x = 1\n", **rewrites(task.id)["gold"]}
    grade = grade_changes(swe, swe.instance(task), changes(files))
    assert grade.resolved and grade.protected == ("conftest.py",) and grade.reason == ""
    gold_changes_it = replace(
        swe.instance(task), gold_patch=made.row["patch"] + "diff --git a/conftest.py b/conftest.py\n"
    )
    assert grade_changes(swe, gold_changes_it, changes(files)).protected == ()


@pytest.mark.parametrize(
    ("path", "verdict"), [("a//b", "not_applied"), ("git~1", "tests_fail"), ("a/./b", "tests_fail")]
)
def test_an_odd_path_is_the_agents_failure(swe, path, verdict):
    """A crash would exclude the episode from its group. An agent that replaces `find` can name any path."""
    grade = grade_changes(swe, swe.instance(swe.tasks("dev")[0]), changes({path: "x"}))
    assert grade.official == verdict and not grade.resolved


def test_the_official_grader_has_no_audit_and_the_old_fingerprint(swe):
    settings = {name: value for name, value in SETTINGS.items() if name != "grader"}
    old, official = (Made(Bwrap(), modules=2, functions=2, **settings, **more) for more in ({}, {"grader": "official"}))
    assert old.fingerprint == official.fingerprint != swe.fingerprint
    task = old.tasks("dev")[0]
    grade = grade_changes(old, old.instance(task), changes(rewrites(task.id)["gold"]))
    assert grade.audit is None and grade.resolved and "end_resolved_audited" not in grade.metrics()


def test_a_suite_of_another_runner_is_graded_by_its_exit_code(swe):
    """Django and SymPy have their own runners, in which no canary can run."""
    task = swe.tasks("dev")[0]
    instance = swe.instance(task)
    lines = "".join(f"echo PASSED {name}\n" for name in json.loads(instance.row["FAIL_TO_PASS"] + ""))
    lines += "".join(f"echo PASSED {name}\n" for name in json.loads(instance.row["PASS_TO_PASS"]))
    for code in (0, 3):
        script = f"cd /testbed\n: '{audited.START}'\n{lines}(exit {code})\n: '{audited.END}'\n"
        other = replace(instance, row={**instance.row, "eval_script": script})
        grade = grade_changes(swe, other, changes(rewrites(task.id)["gold"]))
        assert not grade.audit.has_canaries and grade.resolved == (code == 0)
        assert ("exit code 3" in grade.audit.doubt) == bool(code)


@pytest.mark.slow
def test_forgeries_in_a_suite_of_another_runner_pass_its_mutants(swe):
    task = swe.tasks("dev")[0]
    instance = swe.instance(task)
    script = instance.row["eval_script"].replace(generated.PYTEST_COMMAND, repository_rows.OTHER_RUNNER)
    other = replace(instance, row={**instance.row, "eval_script": script})
    made, gold = generated.generate_repository(task.id, 2, 2), rewrites(task.id)["gold"]
    grade = grade_changes(swe, other, changes(gold))
    assert grade.resolved and not grade.audit.has_canaries
    equal = f"{gold[made.path]}\n{forged_code.EQUAL}\ndef _make(function):\n    return lambda *a, **k: Equal()\n"
    grade = grade_changes(swe, other, changes({made.path: equal + forged_code.REPLACE_FUNCTIONS}))
    assert grade.official == "resolved" and not grade.resolved and "other expected values" in grade.reason


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("the gold patch", None),
        (
            "patches pytest's reports, except those of canaries",
            "replaces _pytest.reports.TestReport.from_item_and_call",
        ),
        ("empties the tests while they run", "replaces the code of a test"),
        ("exit 0 at the end, after printed lines", "ends the process"),
    ],
)
def test_a_review_flags_what_code_does_to_its_tests(swe, name, finding):
    reviewed = Made(Bwrap(), modules=2, functions=2, review=True, **SETTINGS)
    (trial,) = audit.play_forgeries(
        reviewed, reviewed.tasks("dev")[:1], lambda one: one.name == name, lambda trial: None
    )
    assert trial.metrics["end_resolved"] == 1 and trial.metrics["end_flagged"] == float(finding is not None)
    assert (finding or "") in trial.note
    assert reviewed.fingerprint == swe.fingerprint


# The check before a first run, and the command.


def test_the_check_passes_once_and_is_remembered(swe, tmp_path, monkeypatch):
    monkeypatch.setenv("AEM_CACHE", str(tmp_path))
    tasks = swe.tasks("dev")[:1]
    audit.check_grader(swe, tasks, "print-1", "swe")
    (passed,) = (tmp_path / "audits").iterdir()
    monkeypatch.setattr(swe, "forgeries", lambda task: pytest.fail("played again"))
    audit.check_grader(swe, tasks, "print-1", "swe")
    with pytest.raises(pytest.fail.Exception):
        audit.check_grader(swe, tasks, "print-2", "swe")
    assert list((tmp_path / "audits").iterdir()) == [passed]


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        (lambda made: {"patch": made.row["patch"].replace(made.right, "pass")}, "is not graded as a success"),
        (lambda made: {"eval_script": "exit 1\n"}, "is not graded as a success"),
        (lambda made: {"log_parser": "parse_log_nothing"}, "log_parser parse_log_nothing"),
        (lambda made: {"FAIL_TO_PASS": made.row["PASS_TO_PASS"]}, "an empty line in the README"),
    ],
    ids=["gold fails", "no tests", "no parser", "nothing to repair"],
)
def test_a_wrong_grader_is_refused_before_a_run(swe, tmp_path, monkeypatch, row, fact):
    monkeypatch.setenv("AEM_CACHE", str(tmp_path))
    task = swe.tasks("dev")[0]
    made, instance = generated.generate_repository(task.id, 2, 2), swe.instance(task)
    changed = row(made)
    gold = changed.get("patch", instance.gold_patch)
    monkeypatch.setattr(swe, "instance", lambda _: replace(instance, row={**instance.row, **changed}, gold_patch=gold))
    with pytest.raises(ConfigError) as caught:
        audit.check_grader(swe, [task], "print", "swe")
    assert caught.value.field in ("env", "env.make") and fact in str(caught.value)
    assert not (tmp_path / "audits").exists()


@pytest.mark.parametrize("program", ["git", "tar"])
def test_an_image_without_a_needed_program_is_named(swe, tmp_path, program, monkeypatch):
    sandbox_images.needs_skopeo()
    monkeypatch.setattr(sandbox_images, "GIT", [name for name in sandbox_images.GIT if name != program])
    repository_rows.write(tmp_path)
    repository_rows.prepare(tmp_path)
    world = repository_rows.open_world(tmp_path, **SETTINGS)
    (trial,) = audit.play_forgeries(world, world.tasks("test"), lambda one: one.kind == SOLUTION, lambda trial: None)
    assert not trial.is_as_expected and f"the image has no {program}" in trial.note


def test_a_row_without_gold_has_only_forgeries_that_need_none(swe):
    instance = replace(swe.instance(swe.tasks("dev")[0]), gold_patch="")
    kinds = {one.kind for one in forgeries.list_forgeries(instance)}
    assert SOLUTION not in kinds and "code under test" not in kinds and NO_CHANGE in kinds


@pytest.mark.slow
def test_the_command_prints_a_table_and_an_exit_code(swe, capsys, monkeypatch):
    monkeypatch.setattr(forgeries, "_scripts", lambda instance: iter([("hooks", "a file", "echo > conftest.py")]))
    assert evaluate.main(["env=swe", "env.make.turns=4", "--audit", "--panel", "dev"]) == 0
    out = capsys.readouterr().out
    assert "all results are as expected" in out and "solution" in out and "hooks" in out
    assert evaluate.main(["env=swe", "env.make.turns=4", "--audit", "--json"]) == 0
    assert [one["forgery"]["kind"] for one in json.loads(capsys.readouterr().out)] == [
        SOLUTION,
        NO_CHANGE,
        NO_CHANGE,
        "hooks",
    ]


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["env=household", "--audit"], "env"),
        (["outputs/x", "--audit"], "--audit"),
        (["env=swe", "--audit", "--panel", "exam"], "--panel"),
        (["env=swe", "--audit", "--tasks", "0"], "--tasks"),
        (["env=swe", "--audit", "--repeats", "2"], "--repeats"),
        (["env=swe", "env.make.grader=best", "--audit"], "env.make.grader"),
    ],
)
def test_wrong_arguments_are_refused(swe, capsys, words, field):
    assert evaluate.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"aem_exp: {field}=")
