"""Policies on panels: the arithmetic by hand, and a real run scored, killed, asked again, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

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


def ask(capsys, *words):
    """The rows that the door finds."""
    capsys.readouterr()
    code = evaluate.main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["rows"]


def outcome(task, won, kind="", crashed=False, valid=(True,), entropies=(0.5,), tokens=4):
    return Outcome(task, kind, won, won, "crashed" if crashed else "over", crashed, valid, entropies, tokens)


# The arithmetic.


def test_pass_at_k_and_pass_hat_k_by_hand():
    assert [scores.pass_at(4, 1, j) for j in (1, 2, 3, 4)] == [1 / 4, 1 / 2, 3 / 4, 1]
    assert [scores.pass_hat(4, 2, j) for j in (1, 2, 3, 4)] == [1 / 2, 1 / 6, 0, 0]
    assert [scores.pass_at(3, 0, j) for j in (1, 2, 3)] == [0, 0, 0]
    assert [scores.pass_hat(3, 3, j) for j in (1, 2, 3)] == [1, 1, 1]


def test_statistics_of_a_panel_by_hand():
    """Three tasks, two episodes each: won 2, 1 and 0 times."""
    played = [outcome(task, won) for task, wins in enumerate([(1, 1), (1, 0), (0, 0)]) for won in wins]
    found = scores.statistics(played, 2)
    assert found["pass_at"] == {"1": 0.5, "2": pytest.approx(2 / 3)}
    assert found["pass_hat"] == {"1": 0.5, "2": pytest.approx(1 / 3)}
    assert found["standard_error"] == pytest.approx((0.25 / 3) ** 0.5)  # variance of 1, 1/2, 0 is 1/4
    assert found["effective_episodes"] == 3  # 0.25 / (0.25 / 3)
    assert found["endings"] == {"over": 6}


def test_repeats_count_as_far_as_they_are_independent():
    assert scores.effective_episodes([1.0, 0.0, 1.0, 0.0], 1) == 4
    assert scores.effective_episodes([1.0, 0.0] * 10, 8) == 20  # all repeats alike: no more than the tasks
    assert scores.effective_episodes([0.5, 0.625] * 10, 8) == 160  # tasks alike: as many as the episodes
    assert scores.effective_episodes([1.0] * 10, 8) == 10  # nothing is known about the spread
    assert scores.standard_error([1.0]) is None


def test_a_task_that_was_not_played_as_often_is_refused():
    with pytest.raises(AssertionError, match="exactly"):
        scores.statistics([outcome(0, 1), outcome(0, 1), outcome(1, 1)], 2)


def test_crashed_is_lost_and_unknown_is_none():
    said = scores.summarize_outcomes(
        "dev", "", [outcome(0, 1.0, "a", crashed=True), outcome(1, 1.0, "b", valid=(True, False))]
    )
    assert (said.success, said.crashed, said.by_kind) == (0.5, 1, {"a": 0.0, "b": 1.0})
    assert said.invalid_share == pytest.approx(1 / 3)
    mute = scores.summarize_outcomes("dev", "", [outcome(0, 0.0, crashed=True, valid=(), entropies=(), tokens=None)])
    assert (mute.turns, mute.invalid_share, mute.response_entropy, mute.tokens) == (0, None, None, None)
    assert "eval/invalid_share" not in mute.metrics("eval/")
    assert mute.metrics("eval/")["eval/success"] == 0


# A run.


def test_it_scores_as_the_run_did(trained, capsys, tmp_path):
    """One episode per task at the run's own temperature: what the run says of itself, before and after."""
    rows = ask(capsys, trained, f"outputs={tmp_path}", "--panel", "dev", "--tasks", 12, "--repeats", 1)
    said = json.loads((trained / "result.json").read_text())
    assert {name: rows["policy"][name] for name in said["after"]} == said["after"]
    assert {name: rows["untrained"][name] for name in said["before"]} == said["before"]
    assert rows["policy"]["temperature"] == 0.4
    assert (rows["policy"]["steps"], rows["untrained"]["steps"]) == (2, 0)
    assert rows["random"]["tokens"] is rows["random"]["response_entropy"] is None
    assert rows["random"]["invalid_share"] == 0
    low, high = rows["policy"]["interval"]
    assert 0 <= low <= rows["policy"]["success"] <= high <= 1


def test_every_task_is_played_exactly_k_times_and_asking_again_does_nothing(trained, capsys):
    words = [trained, "--panel", "dev", "--tasks", 6, "--repeats", 2]
    rows = ask(capsys, *words)
    (folder,) = (trained / "evaluations").glob("dev-6-*-k2-T0.4-policy")
    played = pd.read_parquet(folder / "episodes.parquet")
    assert [*zip(played.draw, played.member, strict=True)] == [(task, k) for task in range(6) for k in (0, 1)]
    assert rows["policy"]["success"] == played.won.mean()
    assert rows["policy"]["pass_at"]["2"] == played.groupby("draw").won.max().mean()
    assert rows["policy"]["pass_hat"]["2"] == played.groupby("draw").won.min().mean()
    texts = [tuple(said["text"] for said in episode) for episode in played.responses]
    assert len(set(texts)) > 6  # repeats of a task differ
    files = {file: file.stat().st_mtime_ns for file in (trained / "evaluations").rglob("*.*")}
    assert ask(capsys, *words) == rows
    assert {file: file.stat().st_mtime_ns for file in (trained / "evaluations").rglob("*.*")} == files
    assert {"episodes.parquet", "result.json"} <= {file.name for file in folder.iterdir()}


def test_how_many_are_played_together_changes_nothing(trained, capsys, tmp_path):
    words = ["--panel", "dev", "--tasks", 5, "--repeats", 2, "--only", "policy"]
    played = []
    for size in (3, 10):
        ask(capsys, trained, f"outputs={tmp_path / str(size)}", *words, "--at-once", size)
        (file,) = (tmp_path / str(size) / trained.name / "evaluations").glob("*/episodes.parquet")
        played.append(pd.read_parquet(file))
    texts = [[[said["text"] for said in episode] for episode in table.responses] for table in played]
    assert texts[0] == texts[1]


def test_killed_it_goes_on_and_ends_the_same(trained, capsys, tmp_path):
    words = [trained, "--panel", "dev", "--tasks", "64", "--repeats", "2", "--only", "policy", "--at-once", "8"]
    whole = ask(capsys, *words, f"outputs={tmp_path / 'whole'}")
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
    with pytest.MonkeyPatch.context() as patch:  # which episodes are still played
        from aem_exp.rollout.play import Rollout

        real = Rollout.play
        patch.setattr(Rollout, "play", lambda self, part, sampler: seen.extend(part) or real(self, part, sampler))
        assert ask(capsys, *broken) == whole
    assert len(seen) == 128 - 8 * parts
    assert not list((tmp_path / "broken").rglob("episodes"))  # joined


def test_random_is_the_same_every_time(trained, capsys, tmp_path):
    words = [trained, "--panel", "dev", "--tasks", 8, "--repeats", 2, "--only", "random"]
    rows = [ask(capsys, *words, f"outputs={tmp_path / name}") for name in "ab"]
    assert rows[0] == rows[1]
    tables = [pd.read_parquet(next((tmp_path / name).rglob("episodes.parquet"))) for name in "ab"]
    pd.testing.assert_frame_equal(*tables)
    first = tables[0].responses.map(lambda said: [response["text"] for response in said])
    assert first[0] != first[1]  # another repeat, other actions


def test_a_random_player_speaks_as_the_world_listens():
    from aem_exp.envs.executor import SerialExecutor
    from aem_exp.evaluate.agents import _random_action, play_without_model
    from aem_exp.rollout.types import Episode

    for tags in (False, True):
        world = Household(tags=tags)
        episodes = [Episode(task, 0, 0, (task.id,)) for task in world.tasks("dev")[:10]]
        played = play_without_model(episodes, SerialExecutor(world), partial(_random_action, world.env().parse), 10)
        said = [response for trajectory in played for response in trajectory.responses]
        assert len(said) > 50
        assert all(response.valid and response.metrics["admissible"] for response in said)


# Any model, any world.


def test_a_folder_of_weights_is_scored_without_a_run(trained, capsys, tmp_path):
    words = ["--panel", "dev", "--tasks", 12, "--repeats", 1]
    rows = ask(capsys, trained / "model", "env=household", f"outputs={tmp_path}", *words)
    assert set(rows) == {"policy", "random", "scripted"}
    said = json.loads((trained / "result.json").read_text())["after"]
    assert {name: rows["policy"][name] for name in said} == said  # it is the same policy in the same world
    (home,) = tmp_path.iterdir()
    assert home.name.startswith(f"{trained.name}-model"[:60])
    assert len(list((home / "evaluations").glob("*/result.json"))) == len(rows)
    other = ask(capsys, trained / "model", "env.max_turns=3", f"outputs={tmp_path}", *words, "--only", "policy")
    assert other["policy"]["turns"] <= 3
    assert len(list(tmp_path.iterdir())) == 2  # another game, another folder


class Mute(toy.ChatterWorld):
    """Crashes at once in half of its tasks, and lists no actions in the others."""

    def env(self):
        class Env(toy.Chatter):
            def reset(self, task: Task) -> Turn:
                if task.seed % 2:
                    raise OSError("no container")
                return Turn("hello")

        return Env()


def sat(world, folder, tasks=4):
    from aem_exp.evaluate.agents import Agent
    from aem_exp.evaluate.display import ProgressLine

    chosen = panel.build_panel(world, "dev", tasks)
    setting = evaluation.EvaluationSetup(toy.experiment(), world, chosen, 2, 1.0, 4, folder)
    with ProgressLine() as line:
        return evaluation.evaluate_agent(setting, Agent("random"), line)[1]


def test_a_crashed_episode_is_a_failure_and_is_counted(tmp_path):
    result = sat(toy.ChatterWorld(breaks=True), tmp_path, tasks=16)
    assert result["episodes"] == 32
    assert 0 < result["crashed"] == result["endings"]["crashed"] < 32
    assert result["errors"] == ["ValueError: the world broke"]
    (file,) = tmp_path.rglob("episodes.parquet")
    played = pd.read_parquet(file)
    assert result["success"] == (played.won * (played.ended != "crashed")).mean()
    assert sum(result["tasks_by_kind"].values()) == 16


def test_where_nothing_was_said_nothing_is_claimed(tmp_path):
    class Broken(Mute):
        fingerprint = "broken"

        def tasks(self, split):
            return [task for task in super().tasks(split) if task.seed % 2]

    result = sat(Broken(), tmp_path)
    assert (result["crashed"], result["success"], result["turns"]) == (8, 0, 0)
    assert result["invalid_share"] is None
    assert result["errors"] == ["OSError: no container"]


def test_a_world_without_actions_has_no_random_player():
    from aem_exp.evaluate.agents import unavailable_reason

    tasks = Mute().tasks("dev")
    assert "lists no actions" in unavailable_reason("random", toy.experiment(), Mute(), tasks[0])
    assert "no container" in unavailable_reason("random", toy.experiment(), Mute(), tasks[1])
    assert unavailable_reason("random", toy.experiment(), toy.ChatterWorld(), tasks[0]) is None
    assert "brings no oracle" in unavailable_reason("oracle", toy.experiment(), toy.ChatterWorld(), tasks[0])


# The door.


def test_at_a_terminal_it_says_who_reached_what_and_what_comes_next(trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert evaluate.main([str(trained), "--panel", "dev", "--tasks", "6", "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    for word in ("policy", "untrained", "random", "pass@2", "pass^2", "ended", "dev[:6]", "6 tasks x 2"):
        assert word in out
    assert "…" not in out  # nothing is cut off in 80 columns
    assert f"from={trained} trainer.steps=4" in out
    (path,) = [line.split()[-1] for line in out.splitlines() if line.strip().startswith("result")]
    assert json.loads(Path(path).read_text())["player"] == "policy"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a run dir, a hub id or a folder of weights"),
        (["RUN", "--panel", "nope"], "--panel=nope: choose from dev, test"),
        (["RUN", "--panel", "train"], "--panel=train: must name a panel of held-out tasks"),
        (["RUN", "--repeats", "0"], "--repeats=0: must be a whole number of at least 1"),
        (["RUN", "--repeats", "two"], "--repeats"),
        (["RUN", "--temperature", "0"], "--temperature=0.0: must be above 0"),
        (["RUN", "--temperature", "nan"], "--temperature=nan: must be above 0"),
        (["RUN", "--tasks", "1000"], "--tasks=1000: the panel 'test' has 128 tasks"),
        (["RUN", "--only", "nobody"], "--only"),
        (["RUN", "--wrong"], "--wrong"),
        (["RUN", "trainer.steps=3"], "trainer.steps=3: decides nothing here"),
        (["RUN", "env.max_turn=3"], "did you mean max_turns?"),
        (["RUN", "model.dtype=float8"], "model.dtype=float8"),
        (["RUN", "model.lora={r: 2}"], "the weights that it holds"),
        (["RUN/model", "--only", "untrained"], "only a run dir knows"),
        (["RUN/model", "--trust"], "only read with a run dir"),
        (
            ["RUN/model", "env=alfworld"],
            "has no json_2.1.1" if all(map(find_spec, ALFWORLD)) else "[alfworld]'",
        ),
        (["RUN", "RUN"], "one at a time"),
        (["RUN/model", "env=household", "evaluation.final=nope"], "decides nothing here"),
        (["RUN/code"], "holds neither a run nor a model"),
        (["/nowhere/at/all"], "there is no such folder"),
        (["nobody/no-such-model"], "hf download nobody/no-such-model"),
        (["env=household"], "comes first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_sentence(trained, capsys, words, said):
    assert evaluate.main([word.replace("RUN", str(trained)) for word in words]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not out


def test_a_panel_that_a_config_asks_for_is_named_as_the_config_does():
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


def test_an_unfinished_run_is_refused(copy, capsys):
    (copy / "result.json").unlink()
    assert evaluate.main([str(copy)]) == 2
    assert "is not finished" in capsys.readouterr().err


def test_a_run_of_another_world_is_refused(copy, capsys):
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps(result | {"fingerprint": "household-1-abc"}))
    assert evaluate.main([str(copy)]) == 2
    err = capsys.readouterr().err
    assert "was trained in the world household-1-abc" in err
    assert "PYTHONPATH=" in err


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_somebody_elses_run_is_read_only_when_trusted(copy, capsys):
    os.chown(copy / "experiment.json", 12345, 12345)
    words = [str(copy), "--tasks", "2", "--repeats", "1", "--only", "random"]
    assert evaluate.main(words) == 2
    assert "--trust" in capsys.readouterr().err
    assert ask(capsys, *words, "--trust")["random"]["episodes"] == 2


def test_help_loads_nothing_heavy():
    loaded = (
        "import sys, aem_exp.evaluate.command; print({'torch', 'rich', 'pyarrow', 'numpy', 'hydra'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
