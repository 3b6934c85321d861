"""Repositories: generated or read from rows of data sets, played in sandboxes, graded in fresh sandboxes."""

import json
from collections import Counter
from dataclasses import replace
from datetime import date
from random import Random

import pytest
from support import repository_rows, sandbox_images
from support.runs import read_metrics, run_here

from aem_exp.config import instantiate, load
from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.envs.executor import SerialExecutor
from aem_exp.envs.swe import generated, official, rows
from aem_exp.envs.swe.bugs import evaluate_call, list_bugs
from aem_exp.envs.swe.git_objects import diff
from aem_exp.envs.swe.tools import ToolCall
from aem_exp.envs.swe.world import Made, host_image
from aem_exp.sandboxes import Limits, SandboxLost
from aem_exp.sandboxes.bwrap import Bwrap

pytestmark = pytest.mark.machine
LIMITS = {"memory_mb": 400, "disk_mb": 64, "processes": 64, "output_mb": 1, "cpu_seconds": 60}
FINISH = str(ToolCall("finish", {}))


def bash(command):
    return str(ToolCall("execute_bash", {"command": command}))


@pytest.fixture(scope="module")
def world():
    sandbox_images.needs_grading()
    return Made(Bwrap(), limits=LIMITS, modules=2, functions=2, turns=4, command_seconds=5, tests_seconds=20)


@pytest.fixture
def env(world):
    made = world.env()
    yield made
    made.close()


# Generated repositories.


def test_each_bug_changes_the_first_case_and_right_lines_pass_all_cases():
    for module, function, bug in list_bugs():
        for number, (call, value) in enumerate(function.cases):
            assert eval(evaluate_call(function, function.right, call), {"date": date}) == eval(value), (
                module,
                call,
            )
            if number == 0:
                assert evaluate_call(function, bug.line, call) != value, (module, bug.line)
        assert function.code.format(line=bug.line).count(bug.line) == 1
    lines = Counter(line for _, f, bug in list_bugs() for line in (bug.line, *([f.right] if bug == f.bugs[0] else [])))
    assert set(lines.values()) == {1}  # every wrong line has exactly one right line
    assert len(generated.families()) >= 6


def test_a_repository_depends_only_on_its_name_and_splits_share_none(world):
    seen = {}
    for split in world.splits:
        for task in world.tasks(split)[:150]:
            made = generated.generate_repository(task.id, 2, 2)
            generated.generate_repository.cache_clear()
            assert generated.generate_repository(task.id, 2, 2) == made
            seen.setdefault(split, set()).add(made.row["base_commit"])
    assert not seen["train"] & (seen["dev"] | seen["test"]) and not seen["dev"] & seen["test"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"modules": 9}, "modules"),
        ({"functions": 0}, "functions"),
        ({"sizes": {"exam": 3}}, "sizes.exam"),
        ({"limits": {"memory": 3}}, "limits.memory"),
        ({"limits": {"memory_mb": 0}}, "limits.memory_mb"),
        ({"turns": 0}, "turns"),
        ({"tests_seconds": 0}, "tests_seconds"),
    ],
)
def test_impossible_settings_are_refused(changes, field):
    with pytest.raises(ConfigError) as caught:
        instantiate(load(["env=swe"]).env.make | changes)
    assert caught.value.field == f"env.make.{field}"


# Grading.


def graded(world, task, patch, seconds=300.0):
    with world.open(host_image()) as sandbox:
        return official.grade(sandbox, world.instance(task), patch, seconds)[0]


def test_the_gold_patch_resolves_each_family_and_an_empty_patch_does_not(world):
    tasks = {task.kind: task for task in world.tasks("train")[:200]}
    assert set(tasks) == set(generated.families())
    for task in tasks.values():
        gold = world.instance(task).gold_patch.encode()
        assert graded(world, task, gold) == "resolved", task
        assert graded(world, task, b"") == graded(world, task, b" \n") == "no_patch"


CONFTEST = """diff --git a/conftest.py b/conftest.py
new file mode 100644
--- /dev/null
+++ b/conftest.py
@@ -0,0 +1 @@
+{}
"""


def add_code(gold, code):
    """The gold patch, and code that the package runs when it is imported."""
    file = f"{gold.split(b'/')[1].decode()}/__init__.py"
    head = f"diff --git a/{file} b/{file}\n--- a/{file}\n+++ b/{file}\n"
    return gold + f'{head}@@ -3 +3,2 @@\n __version__ = "0.2"\n+{code}\n'.encode()


LINK = """diff --git a/link b/link
new file mode 120000
--- /dev/null
+++ b/link
@@ -0,0 +1 @@
+/etc/passwd
\\ No newline at end of file
"""


def wrong(made):
    return diff(made.path, made.wrong + "\n", "pass\n")


@pytest.mark.parametrize(
    ("patch", "verdict"),
    [
        (lambda gold: gold.replace(b"\n", b"\r\n"), None),  # SWE-bench's last command, `patch`, accepts it
        (lambda gold: gold.replace(b"@@ -", b"@@ -9"), None),  # wrong line numbers: git may still find the lines
        (lambda gold: gold[:60], "not_applied"),
        (lambda gold: bytes(range(256)) * 50, "not_applied"),
        (lambda gold: b"GIT binary patch\nliteral 5\nzzzz\n", "not_applied"),
        (lambda gold: gold.replace(b"a/", b"a/../../../etc/").replace(b"b/", b"b/../../../etc/"), "not_applied"),
        (lambda gold: gold + LINK.encode(), "resolved"),  # an additional link is harmless
        (lambda gold: b"x" * (5 << 20), "not_applied"),
        (lambda gold: CONFTEST.format("print('x')").encode(), "tests_fail"),
        (
            lambda gold: CONFTEST.format("import os; print('PASSED tests/x.py::test_x'); os._exit(0)").encode(),
            "tests_fail",
        ),
        (lambda gold: add_code(gold, "while True: pass"), "tests_timeout"),
        (lambda gold: add_code(gold, "while True: print('x' * 10000)"), "tests_fail"),
        (lambda gold: add_code(gold, "x = bytearray(10**10)"), "tests_fail"),
        (lambda gold: add_code(gold, "open('/tmp/big', 'wb').write(bytes(10**9))"), "tests_fail"),
    ],
)
def test_a_bad_patch_gets_a_verdict_and_does_not_crash(world, patch, verdict):
    task = world.tasks("dev")[0]
    seconds = 6.0 if verdict == "tests_timeout" else 300.0
    result = graded(world, task, patch(world.instance(task).gold_patch.encode()), seconds)
    assert result in official.VERDICTS and (verdict is None or result == verdict)


def new_file(name, text):
    """A patch that adds a file."""
    head = f"diff --git a/{name} b/{name}\nnew file mode 100644\n--- /dev/null\n+++ b/{name}\n"
    lines = text.splitlines()
    return head + f"@@ -0,0 +1,{len(lines)} @@\n" + "".join(f"+{line}\n" for line in lines)


PASS = """import pytest
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    report.outcome, report.longrepr = "passed", None
    return report
"""
LIES = """import sys
for name in {names}:
    print("PASSED " + name)
print("1 passed in 0.1s")
"""


def forgeries(row):
    """Patches that repair nothing, but try to make the tests appear to pass."""
    names = json.loads(row["FAIL_TO_PASS"]) + json.loads(row["PASS_TO_PASS"])
    lies, ini = LIES.format(names=names), "[pytest]\naddopts = -p cheat\npythonpath = .\n"
    package, files = row["repo"].split("/")[1], sorted({name.partition("::")[0] for name in names})
    ended = f"{lies}sys.stdout.flush()\n__import__('os')._exit(0)\n"
    yield "conftest.py", new_file("conftest.py", PASS)
    yield "tests/conftest.py", new_file("tests/conftest.py", PASS)
    yield "package conftest", new_file(f"{package}/conftest.py", PASS)
    yield "pytest.ini", new_file("pytest.ini", ini) + new_file("cheat.py", PASS)
    yield (
        "pyproject.toml",
        new_file("pyproject.toml", "[tool.pytest.ini_options]\naddopts = '-p cheat'\n") + new_file("cheat.py", PASS),
    )
    yield "tox.ini", new_file("tests/tox.ini", ini) + new_file("cheat.py", PASS)
    for name in ("pytest.py", "pytest/__init__.py", "pytest/__main__.py", "_pytest/__init__.py", "pluggy.py"):
        yield name, new_file(name, ended)
    for name in ("sitecustomize.py", "usercustomize.py", "encodings.py", "runpy.py", "os.py", "argparse.py"):
        yield name, new_file(name, ended)
    yield "tests/__init__.py", new_file("tests/__init__.py", PASS) + new_file("tests/pytest.py", ended)
    cases = "".join(f"def {name}():\n    pass\n" for name in dict.fromkeys(n.partition("::")[2] for n in names))
    new = [name for name in files if name == json.loads(row["FAIL_TO_PASS"])[0].partition("::")[0]]
    replaced = f"rm -rf tests; mkdir tests; for f in {' '.join(files)}; do cat > $f <<'X'\n{cases}X\ndone"
    yield "tests replaced", f"{replaced}"
    yield "tests elsewhere", f"{replaced}; mv tests mine; ln -s mine tests"
    patched = "import _pytest.reports as r\nr.TestReport.failed = property(lambda s: False)\n"
    yield (
        "other tests patch pytest",
        f"for f in {' '.join(set(files) - set(new)) or 'x'}; do cat >> $f <<'X'\n{PASS}\n{patched}X\ndone",
    )
    yield "a test's folder", f"rm {new[0]}; mkdir {new[0]}; cat > {new[0]}/test_x.py <<'X'\n{cases}X"


def test_a_patch_cannot_forge_test_results(world):
    """A patch may add files that pytest, Python or the shell would read. Only the hidden tests decide the verdict."""
    task = next(task for task in world.tasks("train") if not task.id.endswith("0"))
    instance = world.instance(task)
    for name, forgery in forgeries(instance.row):
        if forgery.startswith("diff"):
            patch = forgery.encode()
        else:
            with world.open(host_image()) as sandbox:
                sandbox.run(instance.setup_script, 20, instance.setup_input)
                ran = sandbox.run(f"{forgery}\ngit add -A && git diff --cached --binary", 20)
                assert not ran.code and ran.output.startswith(b"diff"), ran.text
                patch = ran.output
        assert graded(world, task, patch) == "tests_fail", name
        if name in ("conftest.py", "os.py", "pytest.ini", "tests elsewhere"):  # with the gold patch, it still resolves
            assert graded(world, task, instance.gold_patch.encode() + patch) == "resolved", name


def test_a_git_hook_in_a_patch_cannot_forge_results(world):
    """SWE-bench's last command to apply a patch, `patch`, also writes into .git, and git runs hooks from there."""
    task = world.tasks("dev")[0]
    row = world.instance(task).row
    names = json.loads(row["FAIL_TO_PASS"]) + json.loads(row["PASS_TO_PASS"])
    lies = [generated.START, *(f"PASSED {name}" for name in names), "FAILED other", generated.END]
    hook = "#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lies)
    patch = new_file(".git/hooks/post-checkout", hook).replace("100644", "100755")
    assert graded(world, task, patch.encode()) == "tests_fail"


def test_a_link_in_a_patch_cannot_write_outside(world, tmp_path):
    """The patch replaces a folder by a link and writes through it."""
    task = world.tasks("dev")[0]
    target = tmp_path / "target"
    through = LINK.replace("/etc/passwd", str(tmp_path)) + CONFTEST.format("x = 1").replace(
        "conftest.py", "link/target"
    )
    assert graded(world, task, through.encode()) in ("not_applied", "tests_fail")
    assert not target.exists()


# Episodes.


def play(env, task, *responses):
    turns = [env.reset(task)]
    for response in responses:
        assert not turns[-1].done
        turns.append(env.step(response))
    return turns


def test_the_expert_and_the_oracle_win(world, env):
    for number in range(2):
        task = world.tasks("dev")[number]
        turn = env.reset(task)
        assert env.goal and "./tests" in turn.observation
        while not turn.done:
            turn = env.step(world.oracle(env) if number else world.expert(env, Random(0)))
        assert (turn.reward, turn.metrics["won"], turn.metrics["end_resolved"]) == (1, 1, 1) and turn.terminated


def test_the_final_state_of_the_repository_is_graded(world, env):
    """Committed changes and new files count, and the episode is graded after the last turn even without `finish`."""
    task = world.tasks("dev")[1]
    commit = bash(
        f"git apply - <<'X'\n{world.instance(task).gold_patch}X\ngit commit -qam done; echo x > new; git stash list"
    )
    last = play(env, task, bash("ls"), "no call", commit, bash("ls"))[-1]
    assert not last.done and last.metrics["won"] == 1  # the rollout counts turns and ends the episode
    assert env.step(FINISH).terminated


def test_the_agent_cannot_find_the_hidden_tests_or_the_gold_patch(world, env):
    task = world.tasks("dev")[0]
    instance = world.instance(task)
    (hidden,) = [name.rpartition("::")[2] for name in json.loads(instance.row["FAIL_TO_PASS"])[:1]]
    right = generated.generate_repository(task.id, 2, 2).right
    look = f"git log --all -p | grep -F '{right}'; git fsck --lost-found | head; git stash list"
    turns = play(env, task, bash(f"grep -rlF -e '{hidden}' /testbed /tmp /home /etc 2>/dev/null; echo end"), bash(look))
    assert turns[1].observation == "end\n[exit code 0]" and "diff" not in turns[2].observation


def test_a_response_without_a_call_is_answered_with_an_error(env, world):
    turn = play(env, world.tasks("dev")[0], "I think")[-1]
    assert (
        not turn.valid and turn.observation.startswith("ERROR: there is no call") and turn.metrics["format_valid"] == 0
    )


@pytest.mark.parametrize(
    "also",
    [
        "git init -q sub",
        "touch .git/index.lock /tmp/.index.lock",
        "git config diff.noprefix true",
        "git config core.fsmonitor 'sleep 999;'",
        "rm -f .git/index; mkfifo .git/index",
        "mkfifo /tmp/.index",
    ],
)
def test_obstacles_in_the_repository_do_not_affect_grading(env, world, also):
    task = world.tasks("dev")[1]
    last = play(env, task, bash(f"git apply - <<'X'\n{world.instance(task).gold_patch}X\n{also}"), FINISH)[-1]
    assert last.metrics["end_resolved"] == 1


def test_an_edit_of_the_same_length_in_the_same_second_is_seen(env, world):
    """git compares size and time of files, unless its index is as old as the file. The copied index must keep its time."""
    pairs = [(generated.generate_repository(task.id, 2, 2), task) for task in world.tasks("train")[:200]]
    made, task = next((made, task) for made, task in pairs if len(made.wrong) == len(made.right))
    path = made.path
    write = (
        f'rm {path}; git checkout -q {path}; t=$(cat {path}); printf \'%s\\n\' "${{t/"$w"/"$n"}}" > {path}; sleep 1.2'
    )
    last = play(env, task, bash(f"w='{made.wrong}'; n='{made.right}'; {write}"), FINISH)[-1]
    assert last.metrics["end_resolved"] == 1


def test_a_destroyed_repository_gives_no_patch(env, world):
    last = play(env, world.tasks("dev")[0], bash("rm -rf .git"), FINISH)[-1]
    assert last.metrics["end_no_patch"] == 1 and last.reward == 0


CREATE = str(ToolCall("file_editor", {"command": "create", "path": "x", "file_text": "y"}))


@pytest.mark.parametrize(
    ("ruin", "then"),
    [
        ("chmod 000 .", FINISH),
        ("chmod 000 . .. /tmp ~ 2>/dev/null", bash("ls")),
        ("rm -rf .git * .[a-z]*; chmod 0 .", CREATE),
        ("cd /; rm -rf /testbed; ln -s /nowhere /testbed; touch /testbed", FINISH),
    ],
)
def test_an_agent_that_makes_its_folder_unusable_fails(world, ruin, then):
    """This is a failure, not a crash: a crash would exclude the trajectory from its group."""
    executor = SerialExecutor(world)
    executor.reset({0: world.tasks("dev")[0]})
    assert not executor.step({0: bash(ruin)})[0].error
    reply = executor.step({0: then})[0]
    executor.close()
    assert not reply.error, reply.trace
    assert reply.turn.terminated and reply.turn.reward == 0
    verdict = "end_tests_fail" if "rm -rf /testbed" in ruin else "end_no_patch"  # the removal of all files is a patch
    assert reply.turn.metrics["won"] == 0 and reply.turn.metrics[verdict] == 1


def test_a_hook_that_locks_the_folder_does_not_crash_grading(world):
    hook = "#!/bin/sh\nchmod 000 /testbed\n"
    patch = new_file(".git/hooks/post-checkout", hook).replace("100644", "100755")
    assert graded(world, world.tasks("dev")[0], patch.encode()) in ("not_applied", "tests_fail")


@pytest.mark.parametrize(
    ("parser", "output"),
    [("parse_log_django", "'ERROR:'"), ("", "'>>>>> Test Exit Code: ' + '9' * 5000")],
    ids=["line", "number"],
)
def test_output_that_the_log_parser_cannot_read_does_not_crash_grading(world, parser, output):
    """Django's parser expects text after `ERROR:`. Output of the agent's code that breaks a parser is a failure."""
    task = world.tasks("dev")[0]
    instance = world.instance(task)
    instance = replace(instance, row={**instance.row, "log_parser": parser or instance.row["log_parser"]})
    patch = add_code(instance.gold_patch.encode(), f"import atexit; atexit.register(print, '\\n' + {output})")
    with world.open(host_image()) as sandbox:
        assert official.grade(sandbox, instance, patch, 20.0)[0] == "tests_fail"


def test_an_agent_that_fills_its_disk_fails(env, world):
    last = play(env, world.tasks("dev")[0], bash("head -c 200000000 /dev/zero > big"), bash("echo x > y"), FINISH)[-1]
    assert last.metrics["won"] == 0 and last.terminated


def test_an_episode_is_stopped_at_its_time_limit(world):
    env = replace_seconds(world, episode_seconds=0.0).env()
    last = play(env, world.tasks("dev")[0], bash("ls"))[-1]
    env.close()
    assert last.truncated and not last.terminated and last.metrics["won"] == 0


def replace_seconds(world, **changes):
    other = Made(Bwrap(), limits=LIMITS, modules=2, functions=2, turns=4)
    vars(other).update(changes)
    return other


def test_a_lost_sandbox_affects_only_one_episode(world):
    executor = SerialExecutor(world)
    tasks = world.tasks("dev")
    executor.reset({0: tasks[0], 1: tasks[1]})
    executor.envs[0]._sandbox._holder.kill()
    executor.envs[0]._sandbox._holder.wait()
    replies = executor.step({0: FINISH, 1: FINISH})
    assert "gone" in replies[0].error and replies[1].turn.terminated
    assert executor.reset({0: tasks[2]})[0].turn is not None
    executor.close()


def test_the_time_limit_of_a_step_must_allow_grading():
    words = ["env=swe", "env.make.tests_seconds=90"]
    assert load(words).launch.workers == 0
    with pytest.raises(ConfigError, match=r" 420.*env\.make\.tests_seconds") as caught:
        load([*words, "launch.workers=2"])
    assert (caught.value.field, caught.value.value) == ("launch.env_seconds", 120.0)


def test_a_small_policy_is_trained_on_it(cache, tmp_path, world):
    small = ["model.make.episodes=64", "model.make.steps=30", "model.make.habit_steps=4", "model.make.shyness=0.5"]
    small += ["trainer.steps=2", "trainer.tasks_per_step=2", "trainer.group_size=4", "trainer.oversample=1"]
    small += ["evaluation.tasks=4", "evaluation.every=0", "tracking=off", "launch.save_every=1"]
    folder = run_here(cache, tmp_path, "+experiment=swe_tiny", *small)
    result = json.loads((folder / "result.json").read_text())
    verdicts = {name for name in result["after"]["habits"] if name.startswith("end_")}
    assert "end_resolved_audited" in verdicts
    assert verdicts <= {f"end_{name}" for name in (*official.VERDICTS, "resolved_audited")} and result[
        "fingerprint"
    ].startswith("swe-")
    assert result["crashed_in_training"] == 0 and len(read_metrics(folder)) == 3
    text = (folder / "episodes.md").read_text()
    assert "<function=" in text and "testbed" in text


# Rows of data sets.


@pytest.fixture(scope="module")
def hub(tmp_path_factory, world):
    sandbox_images.needs_skopeo()
    folder = tmp_path_factory.mktemp("hub")
    return folder, repository_rows.write(folder)


def bench(folder, **changes):
    return repository_rows.open_world(folder, **({"turns": 4, "limits": LIMITS} | changes))


def test_rows_of_both_formats_are_played_and_graded_in_their_image(hub):
    folder, made = hub
    with pytest.raises(MissingResource, match=r"aem_exp.prepare") as caught:
        bench(folder)
    assert (caught.value.field, caught.value.value) == ("env.make.sandbox", "bwrap")
    lines = []
    repository_rows.prepare(folder, lines.append)
    assert lines[0].startswith("images  1 for 6 tasks; 0 ")
    world = bench(folder)
    assert [len(world.tasks(split)) for split in world.splits] == [3, 2, 1]
    env = world.env()
    gold = made.row["patch"]
    for split in ("test", "train"):
        task = world.tasks(split)[0]
        turns = play(env, task, bash(f"ls / /root; echo $FROM_IMAGE; git apply - <<'X'\n{gold}X"), FINISH)
        assert env.goal == made.row["problem_statement"].strip()
        assert "yes" in turns[1].observation and turns[-1].metrics["end_resolved"] == 1, (split, turns[1])
        if split == "train":
            assert "r2e_tests" not in turns[0].observation + turns[1].observation
        assert play(env, task, bash("echo '# nothing' >> README.md"), FINISH)[-1].metrics["end_tests_fail"] == 1
        assert play(env, task, FINISH)[-1].metrics["end_no_patch"] == 1
    for ruin in ("rm -rf /testbed", "mv /testbed /gone; ln -s /nowhere /testbed"):
        last = play(env, task, bash(f"cd /; {ruin}"), bash("ls"))[-1]
        assert last.terminated and last.reward == 0 and last.metrics["end_no_patch"] == 1, ruin
    env.close()


def test_dev_is_held_out_by_hash_and_sizes_choose(hub):
    folder, _ = hub
    try:
        world = bench(folder, sizes={"train": 1})
    except MissingResource:
        pytest.skip("the images were unpacked by another worker of the test run")
    ids = {split: [task.id for task in world.tasks(split)] for split in world.splits}
    assert not set(ids["train"]) & set(ids["dev"]) and len(ids["train"]) == 1
    assert bench(folder).fingerprint != world.fingerprint


@pytest.mark.parametrize(
    ("table", "kind", "message"),
    [
        ([{"instance_id": "a", "repo": "b"}], ConfigError, "instance_id, repo.*version 5.*R2E-Gym"),
        ("{not json\n", ConfigError, "cannot be read"),
        (None, MissingResource, "does not exist"),
    ],
)
def test_a_file_without_valid_rows_is_refused(tmp_path, table, kind, message):
    file = tmp_path / "rows.jsonl"
    if table is not None:
        file.write_text(table if isinstance(table, str) else "".join(json.dumps(row) + "\n" for row in table))
    with pytest.raises(kind, match=message) as caught:
        rows.Rows(str(file), "train", None, "env.make.train")
    assert (caught.value.field, caught.value.value) == ("env.make.train", str(file))


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"eval_script": None}, "no eval_script;"),
        ({"image": ""}, "no image;"),
        ({"FAIL_TO_PASS": "{"}, "FAIL_TO_PASS is not a JSON list"),
        ({"problem_statement": "x" * 5_000_000}, "4,000,000 characters"),
    ],
)
def test_an_incomplete_row_is_refused(changes, fact):
    row = {**generated.generate_repository("dev-1", 2, 2).row, **changes}
    with pytest.raises(ConfigError) as caught:
        rows.parse_instance(row, "a row")
    assert (caught.value.field, caught.value.value) == ("env.make", "a row") and fact in caught.value.remedy


def test_missing_rows_of_the_hub_name_the_command_that_downloads_them(tmp_path, monkeypatch):
    monkeypatch.setenv("AEM_CACHE", str(tmp_path))
    with pytest.raises(MissingResource, match=r"python -m aem_exp.prepare") as caught:
        rows.Rows("some/rows", "train", None, "env.make.train")
    assert (caught.value.field, caught.value.value) == ("env.make.train", "some/rows")


def test_a_missing_image_is_named(world):
    instance = world.instance(world.tasks("dev")[0])
    with pytest.raises(SandboxLost, match=r"image no/such:1 "):
        world.open(replace(instance.image, name="no/such:1"))
    assert Limits().memory_mb == 4096
