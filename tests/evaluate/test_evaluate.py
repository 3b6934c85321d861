"""Evaluation on panels: statistics calculated by hand, and a real run that is scored, killed, resumed and refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from support import toy
from support.runs import SCORED_RUN, wait_for_run

from aem_exp import config
from aem_exp.config import ConfigError
from aem_exp.envs import Task, Turn, panel
from aem_exp.envs.alfworld.library import PACKAGES as ALFWORLD
from aem_exp.envs.household import Household
from aem_exp.evaluate import command as evaluate
from aem_exp.evaluate import evaluation
from aem_exp.stats import scores
from aem_exp.stats.scores import Outcome

SMALL = [*SCORED_RUN, "evaluation.tasks=12"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AEM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    from aem_exp.run.execution import run

    return run(config.load([*SMALL, f"outputs={tmp_path_factory.mktemp('runs')}"]))


def evaluate_rows(capsys, *words):
    """Run the command with `--json`; return its rows."""
    capsys.readouterr()
    code = evaluate.main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["rows"]


def outcome(task, won, kind="", crashed=False, valid=(True,), entropies=(0.5,), tokens=4):
    return Outcome(task, kind, won, won, "crashed" if crashed else "over", crashed, valid, entropies, tokens)


# Statistics.


def test_pass_at_k_and_pass_hat_k():
    assert [scores.pass_at(4, 1, j) for j in (1, 2, 3, 4)] == [1 / 4, 1 / 2, 3 / 4, 1]
    assert [scores.pass_hat(4, 2, j) for j in (1, 2, 3, 4)] == [1 / 2, 1 / 6, 0, 0]
    assert [scores.pass_at(3, 0, j) for j in (1, 2, 3)] == [0, 0, 0]
    assert [scores.pass_hat(3, 3, j) for j in (1, 2, 3)] == [1, 1, 1]


def test_statistics_of_a_panel():
    """Three tasks with two episodes each, won 2, 1 and 0 times."""
    played = [outcome(task, won) for task, wins in enumerate([(1, 1), (1, 0), (0, 0)]) for won in wins]
    found = scores.statistics(played, 2)
    assert found["pass_at"] == {"1": 0.5, "2": pytest.approx(2 / 3)}
    assert found["pass_hat"] == {"1": 0.5, "2": pytest.approx(1 / 3)}
    assert found["standard_error"] == pytest.approx((0.25 / 3) ** 0.5)  # variance of 1, 1/2, 0 is 1/4
    assert found["effective_episodes"] == 3  # 0.25 / (0.25 / 3)
    assert found["endings"] == {"over": 6}


def test_effective_number_of_episodes():
    assert scores.effective_episodes([1.0, 0.0, 1.0, 0.0], 1) == 4
    assert scores.effective_episodes([1.0, 0.0] * 10, 8) == 20  # equal repeats: as many as tasks
    assert scores.effective_episodes([0.5, 0.625] * 10, 8) == 160  # equal tasks: as many as episodes
    assert scores.effective_episodes([1.0] * 10, 8) == 10  # the variance is unknown
    assert scores.standard_error([1.0]) is None


def test_unequal_numbers_of_repeats_are_an_error():
    with pytest.raises(AssertionError, match="exactly"):
        scores.statistics([outcome(0, 1), outcome(0, 1), outcome(1, 1)], 2)


def test_crashed_episodes_fail_and_unknown_values_are_none():
    score = scores.summarize_outcomes(
        "dev", "", [outcome(0, 1.0, "a", crashed=True), outcome(1, 1.0, "b", valid=(True, False))]
    )
    assert (score.success, score.crashed, score.by_kind) == (0.5, 1, {"a": 0.0, "b": 1.0})
    assert score.invalid_share == pytest.approx(1 / 3)
    empty = scores.summarize_outcomes("dev", "", [outcome(0, 0.0, crashed=True, valid=(), entropies=(), tokens=None)])
    assert (empty.turns, empty.invalid_share, empty.response_entropy, empty.tokens) == (0, None, None, None)
    assert "eval/invalid_share" not in empty.metrics("eval/")
    assert empty.metrics("eval/")["eval/success"] == 0


# A run.


@pytest.mark.slow
def test_evaluation_equals_the_scores_of_the_run(trained, capsys, tmp_path):
    """One episode per task at the temperature of the run gives its scores before and after training."""
    rows = evaluate_rows(capsys, trained, f"outputs={tmp_path}", "--panel", "dev", "--tasks", 12, "--repeats", 1)
    result = json.loads((trained / "result.json").read_text())
    assert {name: rows["policy"][name] for name in result["after"]} == result["after"]
    assert {name: rows["untrained"][name] for name in result["before"]} == result["before"]
    assert rows["policy"]["temperature"] == 0.4
    assert (rows["policy"]["steps"], rows["untrained"]["steps"]) == (2, 0)
    assert rows["random"]["tokens"] is rows["random"]["response_entropy"] is None
    assert rows["random"]["invalid_share"] == 0
    low, high = rows["policy"]["interval"]
    assert 0 <= low <= rows["policy"]["success"] <= high <= 1


def test_each_task_is_played_k_times_and_results_are_reused(trained, capsys):
    words = [trained, "--panel", "dev", "--tasks", 6, "--repeats", 2]
    rows = evaluate_rows(capsys, *words)
    (folder,) = (trained / "evaluations").glob("dev-6-*-k2-T0.4-policy")
    played = pd.read_parquet(folder / "episodes.parquet")
    assert [*zip(played.draw, played.member, strict=True)] == [(task, k) for task in range(6) for k in (0, 1)]
    assert rows["policy"]["success"] == played.won.mean()
    assert rows["policy"]["pass_at"]["2"] == played.groupby("draw").won.max().mean()
    assert rows["policy"]["pass_hat"]["2"] == played.groupby("draw").won.min().mean()
    texts = [tuple(response["text"] for response in episode) for episode in played.responses]
    assert len(set(texts)) > 6  # repeats of a task differ
    files = {file: file.stat().st_mtime_ns for file in (trained / "evaluations").rglob("*.*")}
    assert evaluate_rows(capsys, *words) == rows
    assert {file: file.stat().st_mtime_ns for file in (trained / "evaluations").rglob("*.*")} == files
    assert {"episodes.parquet", "result.json"} <= {file.name for file in folder.iterdir()}


@pytest.mark.slow
def test_number_of_parallel_episodes_does_not_change_responses(trained, capsys, tmp_path):
    words = ["--panel", "dev", "--tasks", 5, "--repeats", 2, "--only", "policy"]
    played = []
    for size in (3, 10):
        evaluate_rows(capsys, trained, f"outputs={tmp_path / str(size)}", *words, "--at-once", size)
        (file,) = (tmp_path / str(size) / trained.name / "evaluations").glob("*/episodes.parquet")
        played.append(pd.read_parquet(file))
    texts = [[[response["text"] for response in episode] for episode in table.responses] for table in played]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_killed_evaluation_resumes_with_equal_results(trained, capsys, tmp_path):
    words = [trained, "--panel", "dev", "--tasks", "64", "--repeats", "2", "--only", "policy", "--at-once", "8"]
    whole = evaluate_rows(capsys, *words, f"outputs={tmp_path / 'whole'}")
    broken = [*words, f"outputs={tmp_path / 'broken'}"]
    command = [sys.executable, "-m", "aem_exp.evaluate", *map(str, broken)]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_run(started, lambda: True, lambda: len(list((tmp_path / "broken").rglob("episodes/*.parquet"))) >= 2)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    assert not list((tmp_path / "broken").rglob("result.json"))
    parts = len(list((tmp_path / "broken").rglob("episodes/*.parquet")))
    assert 2 <= parts < 16
    seen = []
    with pytest.MonkeyPatch.context() as patch:  # records the episodes that are played after the kill
        from aem_exp.rollout.play import Rollout

        play = Rollout.play
        patch.setattr(Rollout, "play", lambda self, part, sampler: seen.extend(part) or play(self, part, sampler))
        assert evaluate_rows(capsys, *broken) == whole
    assert len(seen) == 128 - 8 * parts
    assert not list((tmp_path / "broken").rglob("episodes"))  # joined


def test_random_agent_is_reproducible(trained, capsys, tmp_path):
    words = [trained, "--panel", "dev", "--tasks", 8, "--repeats", 2, "--only", "random"]
    rows = [evaluate_rows(capsys, *words, f"outputs={tmp_path / name}") for name in "ab"]
    assert rows[0] == rows[1]
    tables = [pd.read_parquet(next((tmp_path / name).rglob("episodes.parquet"))) for name in "ab"]
    pd.testing.assert_frame_equal(*tables)
    first = tables[0].responses.map(lambda episode: [response["text"] for response in episode])
    assert first[0] != first[1]  # repeats of a task have different actions


def testrandom_actions_are_valid_in_the_format_of_the_env():
    from aem_exp.envs.executor import SerialExecutor
    from aem_exp.evaluate.agents import play_without_model, random_action
    from aem_exp.rollout.types import Episode

    for tags in (False, True):
        world = Household(tags=tags)
        episodes = [Episode(task, 0, 0, (task.id,)) for task in world.tasks("dev")[:10]]
        played = play_without_model(episodes, SerialExecutor(world), partial(random_action, world.env().parse), 10)
        responses = [response for trajectory in played for response in trajectory.responses]
        assert len(responses) > 50
        assert all(response.valid and response.metrics["admissible"] for response in responses)


# Any model and any env.


@pytest.mark.slow
def test_folder_of_weights_is_evaluated_without_a_run(trained, capsys, tmp_path):
    words = ["--panel", "dev", "--tasks", 12, "--repeats", 1]
    rows = evaluate_rows(capsys, trained / "model", "env=household", f"outputs={tmp_path}", *words)
    assert set(rows) == {"policy", "random", "scripted"}
    after = json.loads((trained / "result.json").read_text())["after"]
    assert {name: rows["policy"][name] for name in after} == after  # the same policy in the same env
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(f"{trained.name}-model"[:60])
    assert len(list((folder / "evaluations").glob("*/result.json"))) == len(rows)
    other = evaluate_rows(
        capsys, trained / "model", "env.max_turns=3", f"outputs={tmp_path}", *words, "--only", "policy"
    )
    assert other["policy"]["turns"] <= 3
    assert len(list(tmp_path.iterdir())) == 2  # other env settings have another folder


class NoActions(toy.ChatterWorld):
    """Crashes at the reset in half of its tasks, and lists no actions in the others."""

    def env(self):
        class Env(toy.Chatter):
            def reset(self, task: Task) -> Turn:
                if task.seed % 2:
                    raise OSError("no container")
                return Turn("hello")

        return Env()


def evaluate_random(world, folder, tasks=4):
    from aem_exp.evaluate.agents import Agent
    from aem_exp.evaluate.display import ProgressLine

    dev = panel.build_panel(world, "dev", tasks)
    setup = evaluation.EvaluationSetup(toy.experiment(), world, dev, 2, 1.0, 4, folder)
    with ProgressLine() as line:
        return evaluation.evaluate_agent(setup, Agent("random"), line)[1]


def test_crashed_episodes_count_as_failures(tmp_path):
    result = evaluate_random(toy.ChatterWorld(breaks=True), tmp_path, tasks=16)
    assert result["episodes"] == 32
    assert 0 < result["crashed"] == result["endings"]["crashed"] < 32
    assert result["errors"] == ["ValueError: the world broke"]
    (file,) = tmp_path.rglob("episodes.parquet")
    played = pd.read_parquet(file)
    assert result["success"] == (played.won * (played.ended != "crashed")).mean()
    assert sum(result["tasks_by_kind"].values()) == 16


def test_episodes_without_turns_have_no_statistics(tmp_path):
    class Broken(NoActions):
        fingerprint = "broken"

        def tasks(self, split):
            return [task for task in super().tasks(split) if task.seed % 2]

    result = evaluate_random(Broken(), tmp_path)
    assert (result["crashed"], result["success"], result["turns"]) == (8, 0, 0)
    assert result["invalid_share"] is None
    assert result["errors"] == ["OSError: no container"]


def test_unavailable_agents():
    from aem_exp.evaluate.agents import unavailable_reason

    tasks = NoActions().tasks("dev")
    assert "actions" in unavailable_reason("random", toy.experiment(), NoActions(), tasks[0])
    assert "no container" in unavailable_reason("random", toy.experiment(), NoActions(), tasks[1])
    assert unavailable_reason("random", toy.experiment(), toy.ChatterWorld(), tasks[0]) is None
    assert "oracle" in unavailable_reason("oracle", toy.experiment(), toy.ChatterWorld(), tasks[0])


# The command.


def test_output_shows_scores_and_the_next_command(trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert evaluate.main([str(trained), "--panel", "dev", "--tasks", "6", "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    for word in ("policy", "untrained", "random", "pass@2", "pass^2", "ended", "dev[:6]", "6 tasks x 2"):
        assert word in out
    assert "…" not in out  # nothing is cut in 80 columns
    assert f"from={trained} trainer.steps=4" in out
    (path,) = [line.split()[-1] for line in out.splitlines() if line.strip().startswith("result")]
    assert json.loads(Path(path).read_text())["player"] == "policy"


def test_next_command_repeats_the_options(tmp_path):
    from aem_exp.evaluate import command

    arguments = command._parse_arguments([str(tmp_path), "--panel", "dev", "--tasks", "6", "--repeats", "1"])
    suggested = command._suggest_next_command(arguments, SimpleNamespace(repeats=1))
    assert suggested.endswith(f"aem_exp.evaluate {tmp_path} --panel dev --tasks 6 --repeats 4")


def test_env_alone_is_played_without_a_policy(tmp_path, capsys):
    words = ["env=household", "--tasks", "3", "--repeats", "2", f"outputs={tmp_path}"]
    assert evaluate.main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"].keys() == {"random", "scripted"} and not shown["left_out"]
    assert shown["rows"]["scripted"]["success"] == 1.0
    assert evaluate.main([*words, "--only", "scripted"]) == 0  # its episodes are not played again
    assert "temperature" not in capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    assert len([*(folder / "evaluations").iterdir()]) == 2


@pytest.mark.parametrize(
    ("words", "error"),
    [  # the error begins with its field and value, RUN stands for the run directory
        ([], "RUN_DIR|MODEL=null: "),
        (["RUN", "--panel", "nope"], "--panel=nope: choose from dev, test"),
        (["RUN", "--panel", "train"], "--panel=train: "),
        (["RUN", "--repeats", "0"], "--repeats=0: "),
        (["RUN", "--repeats", "two"], "option=--repeats: "),
        (["RUN", "--temperature", "0"], "--temperature=0.0: "),
        (["RUN", "--temperature", "nan"], "--temperature=nan: "),
        (["RUN", "--tasks", "1000"], "--tasks=1000: the panel 'test' has 128 tasks"),
        (["RUN", "--only", "nobody"], "option=--only: "),
        (["RUN", "--wrong"], "option=--wrong: "),
        (["RUN", "trainer.steps=3"], "trainer.steps=3: "),
        (["RUN", "env.max_turn=3"], "env.max_turn=3: "),
        (["RUN", "model.dtype=float8"], "model.dtype=float8"),
        (["RUN", "model.lora={r: 2}"], "model.lora={'r': 2}: "),
        (["RUN/model", "--only", "untrained"], "--only=untrained: "),
        (["RUN/model", "--trust"], "--trust=true: "),
        (
            ["RUN/model", "env=alfworld"],
            "has no json_2.1.1" if all(map(find_spec, ALFWORLD)) else "[alfworld]'",
        ),
        (["RUN", "RUN"], "RUN_DIR|MODEL=RUN: "),
        (["RUN/model", "env=household", "evaluation.final=nope"], "evaluation.final=nope: "),
        (["RUN/code"], "RUN_DIR|MODEL=RUN/code: "),
        (["/nowhere/at/all"], "RUN_DIR|MODEL=/nowhere/at/all: there is no such folder"),
        (["nobody/no-such-model"], "hf download nobody/no-such-model"),
        (["env=household", "--only", "policy"], "--only=policy: choose from random, scripted, oracle"),
        (["env=household", "--temperature", "0.5"], "--temperature=0.5: "),
        (["env=household", "model=talk"], "model=talk: "),
        (["household", "env=household"], "RUN_DIR|MODEL=household: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_arguments_are_an_error_of_one_line(trained, capsys, words, error):
    assert evaluate.main([word.replace("RUN", str(trained)) for word in words]) == 2
    out, err = capsys.readouterr()
    assert re.sub("=RUN", f"={trained}", error)[:100] in err  # an error cuts long values
    assert len(err.strip().splitlines()) == 1
    assert not out


def test_error_of_a_panel_names_its_config_key():
    for name in ("nope", "train"):
        with pytest.raises(ConfigError, match=f"^evaluation.panel={name}: "):
            panel.build_panel(Household(), name)


@pytest.fixture
def copy(trained, tmp_path):
    folder = tmp_path / trained.name
    folder.mkdir()
    for name in ("experiment.json", "result.json"):
        shutil.copy(trained / name, folder)
    (folder / "model").symlink_to(trained / "model")
    return folder


def test_unfinished_run_is_an_error(copy, capsys):
    (copy / "result.json").unlink()
    assert evaluate.main([str(copy)]) == 2
    err = capsys.readouterr().err
    assert f"RUN_DIR={copy.parent}" in err and f"aem_exp.run {copy}" in err


def test_run_of_another_env_version_is_an_error(copy, capsys):
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps(result | {"fingerprint": "household-1-abc"}))
    assert evaluate.main([str(copy)]) == 2
    err = capsys.readouterr().err
    assert f"RUN_DIR={copy.parent}" in err and "household-1-abc" in err
    assert "PYTHONPATH=" in err


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_run_of_another_user_needs_trust(copy, capsys):
    os.chown(copy / "experiment.json", 12345, 12345)
    words = [str(copy), "--tasks", "2", "--repeats", "1", "--only", "random"]
    assert evaluate.main(words) == 2
    assert "--trust" in capsys.readouterr().err
    assert evaluate_rows(capsys, *words, "--trust")["random"]["episodes"] == 2


def test_command_imports_nothing_heavy():
    loaded = (
        "import sys, aem_exp.evaluate.command; print({'torch', 'rich', 'pyarrow', 'numpy', 'hydra'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
