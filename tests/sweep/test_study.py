"""Studies: real workers in processes of their own and on a real SLURM; killed, requeued, pruned; and every refusal."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from support import TESTS
from support.runs import wait_until

from aem_exp.core.errors import ConfigError
from aem_exp.jobs import dispatch
from aem_exp.rundir import attempts, checkpoints
from aem_exp.sweep import question, study, study_space, study_spec, study_status, study_submit
from aem_exp.sweep import trial as trial_worker

TINY = """
question: Which?
base: >-
  model.make.steps=25 model.make.habit_steps=5 model.make.episodes=128 env.make._target_=slow_household.SlowHousehold
  env.invalid_penalty=0.1 trainer.steps=3 trainer.tasks_per_step=2 trainer.group_size=4 trainer.mini_batch=4
  evaluation.tasks=4 evaluation.every=1 launch.save_every=1 tracking=off
search:
  space:
    trainer.learning_rate: tag(log, interval(1e-4, 2e-3))
  trials: 4
seeds: 0
launch: launch=slurm_cpu launch.where=local
"""


class Desk:
    """A user's folder with a world of their own, a sweep file, and the outputs."""

    def __init__(self, folder, cache, **env):
        self.folder, self.outputs = folder, folder / "out"
        shutil.copy(TESTS / "support" / "slow_household.py", folder)
        (folder / "site").mkdir()
        (folder / "site" / "site.yaml").touch()
        self.env = {**os.environ, "AEM_CACHE": str(cache), "AEM_OUTPUTS": str(self.outputs), "COLUMNS": "160"}
        self.env |= {"AEM_SITE": str(folder / "site")} | env
        self.env.pop("AEM_STUDY", None)
        self.begun = []
        self.write()

    def write(self, text=TINY):
        (self.folder / "tiny.yaml").write_text(text)

    def begin(self, *words, module="aem_exp.sweep", **env):
        command = [sys.executable, "-m", module, *map(str, words or ["tiny.yaml"])]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.begun.append(subprocess.Popen(command, cwd=self.folder, env=self.env | env, **how))
        return self.begun[-1]

    def close(self):
        """Ctrl-C for whatever a test has left at work; it ends its workers."""
        for process in self.begun:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=600)

    def door(self, *words, code=0, module="aem_exp.sweep", **env):
        started = self.begin(*words, module=module, **env)
        out, _ = started.communicate(timeout=600)
        assert started.returncode == code, out + self.logs()
        return out

    def sweep(self, *words, code=0, **env):
        return self.door("tiny.yaml", *words, code=code, **env)

    def plan(self):
        return json.loads(self.sweep("--json"))

    def logs(self):
        logs = [*self.outputs.glob("studies/tiny/worker-*/local.log"), *self.outputs.glob("studies/tiny/logs/*.out")]
        return "".join(f"\n--- {log}\n{log.read_text()}" for log in logs)

    def holding(self):
        """A worker at work, its trial and its run, which has saved some steps and has some to train."""
        for card in sorted(self.outputs.glob("studies/tiny/worker-*/trial.json")):
            number = json.loads(card.read_text()).get("number")
            runs = {trial["trial"]: trial["run"] for trial in self.trials()}
            run = Path(runs[number]) if runs.get(number) else None
            if run and checkpoints.find_newest(run) and steps(run) < 3 and (card.parent / "run.lock").exists():
                return card.parent, number, run
        return None

    def trials(self):
        return [
            {
                "trial": t.number,
                "state": t.state,
                "run": self.outputs / t.user_attrs["run"] if "run" in t.user_attrs else None,
            }
            for t in self.study().get_trials()
        ]

    def study(self):
        backend = optuna.storages.journal.JournalFileBackend(str(self.outputs / "studies" / "tiny" / "journal.log"))
        return optuna.load_study(study_name="tiny", storage=optuna.storages.JournalStorage(backend))


def steps(folder):
    file = folder / "metrics.jsonl"
    return sum("train/success" in line for line in file.read_text().splitlines()) if file.exists() else 0


def starts(folder):
    return [event["step"] for event in attempts.read(folder) if event["event"] == "start"]


@pytest.fixture
def desk(tmp_path, cache):
    desk = Desk(tmp_path, cache)
    yield desk
    desk.close()


@pytest.fixture(scope="module")
def policy(cache, tmp_path_factory):
    """Prepared, as a cluster wants it; a policy made in a slow world would take its time."""
    out = Desk(tmp_path_factory.mktemp("prepared"), cache).door("tiny.yaml", module="aem_exp.prepare")
    assert "policy" in out


@pytest.fixture
def asked(desk, monkeypatch):
    """The study of a sweep file, in this process."""
    for name in ("AEM_OUTPUTS", "AEM_CACHE", "AEM_SITE"):
        monkeypatch.setenv(name, desk.env[name])
    for name in ("AEM_STUDY", "AEM_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(desk.folder)
    monkeypatch.syspath_prepend(desk.folder)

    def ask(text=TINY, typed=()):
        desk.write(text)
        return study_space.from_sweep(question.load("tiny.yaml", typed), typed)

    return ask


def journal(desk):
    return (desk.outputs / "studies" / "tiny" / "journal.log").exists()


@pytest.mark.slow
def test_a_killed_worker_comes_back_to_its_trial_and_asking_again_does_nothing(policy, desk):
    desk.write(TINY.replace("trials: 4", "trials: 3"))
    assert "3 missing, of 3" in desk.sweep()
    assert not desk.outputs.exists()  # a plan makes nothing
    begun = desk.begin("tiny.yaml", "--local", "--at-once", "2", SLOW="0.03")
    worker, number, run = wait_until(lambda: journal(desk) and desk.holding(), "a trial in its midst")
    os.kill(json.loads((worker / "owner.json").read_text())["pid"], signal.SIGKILL)
    out, _ = begun.communicate(timeout=600)
    assert begun.returncode == 1 and f"{worker.name}: failed: " in out
    assert "2 complete, 0 pruned, 0 running, 1 stopped, 0 failed, 0 missing" in out
    assert {t["trial"]: t["state"] for t in desk.plan()["trials"]}[number] == "stopped"

    out = desk.sweep("--local")
    assert out.count("start   worker") == 1 and f"told     trial {number}: complete" in out
    assert len(starts(run)) == 2 and starts(run)[1] > 0  # it went on
    assert "3 complete, 0 pruned, 0 running, 0 stopped, 0 failed, 0 missing" in out
    assert "chosen on dev" in out and "python -m aem_exp model.make.steps=25" in out
    trials = desk.study().get_trials()
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert len({trial.params["trainer.learning_rate"] for trial in trials}) == 3
    assert all(set(trial.intermediate_values) == {1, 2, 3} for trial in trials)

    before = sorted(path.name for path in desk.outputs.iterdir())
    assert "nothing is missing" in desk.sweep("--local")
    assert sorted(path.name for path in desk.outputs.iterdir()) == before
    status = json.loads(desk.door("tiny", "--json", module="aem_exp.status"))
    assert sorted(row["group"] for row in status) == [f"trial {n}" for n in range(3)]
    assert all(row["what"] == "done" and row["steps"] == 3 for row in status)


@pytest.mark.slow
def test_a_trial_below_the_median_is_stopped_early_and_its_twin_is_told_the_same(policy, desk, asked):
    text = TINY.replace("trials: 4", "trials: 5\n  metric: train/success\n  pruner: median")
    opened = study.open_study(asked(text))
    for i in range(4):  # better than any policy can be
        values = dict.fromkeys((1, 2, 3), 2.0)
        space = {"trainer.learning_rate": FloatDistribution(1e-4, 2e-3, log=True)}
        done = {"params": {"trainer.learning_rate": (i + 2) * 1e-4}, "distributions": space}
        opened.add_trial(create_trial(value=2.0, intermediate_values=values, **done))
    opened.enqueue_trial({"trainer.learning_rate": 1e-3})
    out = desk.sweep("--local")
    assert "4 complete, 1 pruned, 0 running, 0 stopped, 0 failed, 0 missing" in out
    pruned = desk.trials()[4]
    assert pruned["state"] == TrialState.PRUNED
    assert steps(pruned["run"]) == 1 and not (pruned["run"] / "result.json").exists()  # at the first sight of it
    assert list(pruned["run"].glob("checkpoint-2"))  # all up to here is saved
    assert "nothing is missing" in desk.sweep("--local")

    desk.write(text.replace("trials: 5", "trials: 6"))
    opened.enqueue_trial({"trainer.learning_rate": 1e-3})
    assert "told     trial 5: pruned" in desk.sweep("--local")
    assert len(starts(pruned["run"])) == 1
    twin = opened.get_trials()[5]
    assert set(twin.intermediate_values) == {1} and twin.value == opened.get_trials()[4].value


@pytest.mark.slow
def test_a_run_that_cannot_be_is_a_failed_trial_with_its_sentence(policy, desk):
    """The name of the metric is a guess, which shows at the first evaluation."""
    desk.write(TINY.replace("trials: 4", "trials: 1\n  metric: eval/succes"))
    out = desk.sweep("--local", code=1)
    assert "trial 0: config: search.metric=eval/succes: did you mean eval/success?" in out
    assert "1 failed, 0 missing" in out
    assert steps(desk.trials()[0]["run"]) == 0
    assert "nothing is missing" in desk.sweep("--local")


def test_lost_trials_are_asked_for_again_at_most_twice(desk, asked):
    search = asked()
    opened = study.open_study(search)
    space = {"trainer.learning_rate": study_space.distribution(search, "trainer.learning_rate")}
    for again in range(study_submit.MAX_RETRIES + 1):
        trial = opened.ask(space)  # by a worker that nobody has seen since
        now = study_status.read_status(search)
        assert [lost.number for lost in now.orphaned_trials] == [trial.number] and now.missing_count == 3
        assert len(study_submit._reconcile_workers(search, [])) == (4 if again < study_submit.MAX_RETRIES else 3)
    trials = opened.get_trials()
    assert {trial.state for trial in trials} == {TrialState.FAIL}
    assert len({trial.params["trainer.learning_rate"] for trial in trials}) == 1
    now = study_status.read_status(search)
    assert [trial.number for trial in now.trials] == [2] and now.missing_count == 3
    assert len(study_submit._reconcile_workers(search, ["killed"])) == 4  # --retry killed
    assert len(list(search.folder.glob("worker-*"))) == 4  # those without a trial are used again
    assert (search.folder / "worker-000" / "code" / "slow_household.py").exists()


def test_a_worker_that_only_dies_is_given_up(desk, asked):
    search = asked()
    opened = study.open_study(search)
    trial = opened.ask({"trainer.learning_rate": study_space.distribution(search, "trainer.learning_rate")})
    trial_worker._record_membership(search, opened, trial, search.base)
    worker = search.folder / "worker-000"
    worker.mkdir()
    (worker / "trial.json").write_text(json.dumps({"number": 0}))
    file = desk.outputs / trial.user_attrs["run"] / attempts.FILE
    for number in range(study_submit.MAX_KILLS):
        assert study_submit._reconcile_workers(search, [])[0] == worker, number
        with file.open("a") as events:
            events.write(json.dumps({"event": "start", "step": 1, "at": 0}) + "\n")
    assert worker not in study_submit._reconcile_workers(search, [])
    assert "killed 3 times at step 1" in opened.get_trials()[0].user_attrs["sentence"]
    assert opened.get_trials()[1].state == TrialState.WAITING


def test_ranges_are_hydras_and_parameters_are_ready_to_type(asked):
    text = TINY.replace(
        "  trials:",
        """\
    modulation.lam.value: choice(0.5, 1, 2)
    env.max_turns: range(4, 9)
    trainer.group_size: int(interval(2, 8))
    modulation.gate: range(0, 1, 0.25)
    baseline: grpo,rloo
  trials:""",
    )
    search = asked(text)
    assert {key: study_space.distribution(search, key) for key in search.search.space} == {
        "trainer.learning_rate": FloatDistribution(1e-4, 2e-3, log=True),
        "modulation.lam.value": CategoricalDistribution(["0.5", "1", "2"]),
        "env.max_turns": IntDistribution(4, 8),
        "trainer.group_size": IntDistribution(2, 8),
        "modulation.gate": FloatDistribution(0, 0.75, step=0.25),
        "baseline": CategoricalDistribution(["grpo", "rloo"]),
    }
    e = search.experiment({"trainer.learning_rate": study_spec.format_override(0.000123456789), "baseline": "rloo"})
    assert e.trainer.learning_rate == 0.000123457 and e.baseline.name == "rloo"
    assert search.trial_overrides({"baseline": "rloo"})[-1] == "baseline=rloo"


def test_another_search_does_not_go_on_with_this_one(desk, asked):
    study.open_study(asked())
    study_status.read_status(asked(TINY.replace("trials: 4", "trials: 9\n  pruner: median")))  # more of the same
    for old, new in [
        ("1e-4", "1e-5"),
        ("trainer.steps=3", "trainer.steps=4"),
        ("trials:", "direction: minimize\n  trials:"),
    ]:
        with pytest.raises(ConfigError, match="was begun with"):
            study_status.read_status(asked(TINY.replace(old, new)))


def test_data_bases_are_taken_and_their_secrets_kept(desk, asked, monkeypatch):
    monkeypatch.setenv("AEM_STUDY", f"sqlite:///{desk.folder / 'studies.db'}")
    search = asked()
    opened = study.open_study(search)
    opened.ask({"trainer.learning_rate": study_space.distribution(search, "trainer.learning_rate")})
    assert len(study_status.read_status(search).orphaned_trials) == 1 and not journal(desk)
    worker = study_submit._reconcile_workers(search, [])[0]
    assert trial_worker.read_study(worker).search == search.search
    monkeypatch.delenv("AEM_STUDY")
    with pytest.raises(ConfigError, match="does the job get the environment"):
        trial_worker.read_study(worker)
    monkeypatch.setenv("AEM_STUDY", "postgresql://me:secret@nowhere.invalid/base")
    with pytest.raises(ConfigError) as caught:
        study_status.read_status(asked())
    assert "cannot be used" in str(caught.value) and "secret" not in str(caught.value)


def with_space(line):
    return TINY.replace("trainer.learning_rate: tag(log, interval(1e-4, 2e-3))", line)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TINY.replace("trials: 4", "trails: 4"), "tiny.search.trails=4: no such key; did you mean trials?"),
        (TINY.replace("trials: 4", "trials: 0"), "tiny.search.trials=0: must be a whole number of at least 1"),
        (TINY.replace("trials: 4", "direction: maximize"), "tiny.search.trials=null: must hold something"),
        (TINY.replace("trials: 4", "trials: 4\n  pruner: medium"), "did you mean median?"),
        (TINY.replace("trials: 4", "trials: 4\n  metric: test/success"), "tuning reads the dev panel only"),
        (
            TINY.replace("tracking=off", "evaluation.panel=test evaluation.final=dev"),
            "evaluation.panel=test: is the final test; tuning reads another",
        ),
        (TINY.replace("trials: 4", "trials: 4\n  storage: mysql://a:b@c/d"), "mysql://***@c/d: holds credentials"),
        (TINY.partition("search:")[0] + "search: {}\nseeds: 0", "tiny.search={}: must hold something"),
        (TINY.partition("search:")[0] + "search: {space: {}, trials: 3}\nseeds: 0", "tiny.search.space={}: must hold"),
        (TINY.partition("search:")[0] + "search: [1]\nseeds: 0", "tiny.search=[1]: must be a mapping"),
        (TINY.replace("seeds: 0", "seeds: 0,1"), "tiny.seeds=2 of them: a search goes around one experiment"),
        (TINY + "arms: {a: modulation=aem, b: modulation=none}", "tiny.arms=2 of them: a search goes around one"),
        (TINY + "products: ['baseline=grpo,rloo']", "tiny.products=2 of them: a search goes around one"),
        (
            with_space("trainer.learning_rat: interval(1, 2)"),
            "tiny.search.space.trainer.learning_rat: trainer.learning_rat",
        ),
        (
            with_space("trainer.learning_rate: interval(1e-4)"),
            "tiny.search.space.trainer.learning_rate=interval(1e-4): must",
        ),
        (with_space("trainer.learning_rate: interval(2, 1)"), "must go from a lower to a higher number"),
        (with_space("trainer.learning_rate: tag(log, interval(0, 1))"), "both above 0"),
        (with_space("trainer.learning_rate: tag(lgo, interval(1, 2))"), "only read with the tag log, not lgo"),
        (with_space("trainer.learning_rate: '1e-3'"), "one value; it belongs in base:"),
        (with_space("trainer.learning_rate: 0.1"), "must be text"),
        (with_space("modulation: aem,nothing"), "tiny.search.space.modulation: modulation=nothing:"),
        (with_space("trainer.group_size: range(1, 4)"), "tiny.search.space.trainer.group_size: trainer.group_size=1"),
        (with_space("seed: range(0, 9)"), "a seed is luck"),
        (with_space("launch.threads: 1,2"), "decides no result"),
        (with_space("evaluation.repeats: 1,2"), "trials are compared by one measure"),
        (with_space("name: a,b"), "changes nothing between a and b"),
    ],
    ids=lambda value: value[-30:] if isinstance(value, str) else "",
)
def test_what_is_wrong_is_one_sentence(asked, text, said):
    with pytest.raises(ConfigError) as caught:
        asked(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_searched_is_not_typed_and_what_runs_here_is_not_submitted(asked, desk):
    with pytest.raises(ConfigError, match="is searched"):
        asked(typed=["trainer.learning_rate=1e-3"])
    with pytest.raises(ConfigError, match="runs here; to submit"):
        dispatch.check_can_start([asked().base], True, desk.outputs)


@pytest.mark.machine
@pytest.mark.slow
def test_on_slurm_a_requeued_worker_has_its_own_trial_again(policy, cluster, cache, tmp_path):
    desk = Desk(tmp_path, cache, **cluster.env)
    desk.write(TINY.replace(" launch.where=local", "").replace("trials: 4", "trials: 3"))
    assert "sent     3 workers as job" in desk.sweep("--submit", SLOW="0.03")
    assert " on the way)" in (plan := desk.sweep()) or "0 running" not in plan
    assert "nothing is missing" in desk.sweep("--submit")  # they are on their way
    worker, number, run = wait_until(
        lambda: journal(desk) and desk.holding(), lambda: f"a trial in its midst: {desk.logs()}", 120
    )
    cluster.scontrol("requeue", json.loads((worker / "job.json").read_text())["job"])
    wait_until(lambda: len(starts(run)) == 2, "a second start", 90)
    wait_until(lambda: all(t["state"] == TrialState.COMPLETE for t in desk.trials()), "the end of all", 120)
    assert [t["trial"] for t in desk.trials()] == [0, 1, 2]
    assert json.loads((worker / "trial.json").read_text())["number"] == number
    assert starts(run)[1] > 0
    assert "3 complete, 0 pruned, 0 running, 0 stopped, 0 failed, 0 missing" in desk.sweep()
