"""Studies: real workers in local processes and on a real SLURM cluster; kills, requeues, pruning, and invalid studies."""

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


class UserFolder:
    """The folder of a user: their own world, a sweep file, and the outputs."""

    def __init__(self, folder, cache, **env):
        self.folder, self.outputs = folder, folder / "out"
        shutil.copy(TESTS / "support" / "slow_household.py", folder)
        (folder / "site").mkdir()
        (folder / "site" / "site.yaml").touch()
        self.env = {**os.environ, "AEM_CACHE": str(cache), "AEM_OUTPUTS": str(self.outputs), "COLUMNS": "160"}
        self.env |= {"AEM_SITE": str(folder / "site")} | env
        self.env.pop("AEM_STUDY", None)
        self.processes = []
        self.write()

    def write(self, text=TINY):
        (self.folder / "tiny.yaml").write_text(text)

    def start(self, *words, module="aem_exp.sweep", **env):
        command = [sys.executable, "-m", module, *map(str, words or ["tiny.yaml"])]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.processes.append(subprocess.Popen(command, cwd=self.folder, env=self.env | env, **how))
        return self.processes[-1]

    def close(self):
        """Interrupt the processes that a test left running; they end their workers."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=600)

    def run_command(self, *words, code=0, module="aem_exp.sweep", **env):
        started = self.start(*words, module=module, **env)
        out, _ = started.communicate(timeout=600)
        assert started.returncode == code, out + self.logs()
        return out

    def sweep(self, *words, code=0, **env):
        return self.run_command("tiny.yaml", *words, code=code, **env)

    def plan(self):
        return json.loads(self.sweep("--json"))

    def logs(self):
        logs = [*self.outputs.glob("studies/tiny/worker-*/local.log"), *self.outputs.glob("studies/tiny/logs/*.out")]
        return "".join(f"\n--- {log}\n{log.read_text()}" for log in logs)

    def running_trial(self):
        """An active worker, its trial and its run, which has a checkpoint and is not finished; or None."""
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
    desk = UserFolder(tmp_path, cache)
    yield desk
    desk.close()


@pytest.fixture(scope="module")
def policy(cache, tmp_path_factory):
    """Prepare the policy once, because making it in the slow world takes long."""
    out = UserFolder(tmp_path_factory.mktemp("prepared"), cache).run_command("tiny.yaml", module="aem_exp.prepare")
    assert "policy" in out


@pytest.fixture
def load_study(desk, monkeypatch):
    """A function that loads the study of a sweep file in this process."""
    for name in ("AEM_OUTPUTS", "AEM_CACHE", "AEM_SITE"):
        monkeypatch.setenv(name, desk.env[name])
    for name in ("AEM_STUDY", "AEM_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(desk.folder)
    monkeypatch.syspath_prepend(desk.folder)

    def load(text=TINY, typed=()):
        desk.write(text)
        return study_space.from_sweep(question.load("tiny.yaml", typed), typed)

    return load


def journal(desk):
    return (desk.outputs / "studies" / "tiny" / "journal.log").exists()


@pytest.mark.slow
def test_killed_worker_resumes_its_trial(policy, desk):
    desk.write(TINY.replace("trials: 4", "trials: 3"))
    assert "3 missing, of 3" in desk.sweep()
    assert not desk.outputs.exists()  # a plan writes nothing
    begun = desk.start("tiny.yaml", "--local", "--at-once", "2", SLOW="0.03")
    worker, number, run = wait_until(lambda: journal(desk) and desk.running_trial(), "a running trial")
    os.kill(json.loads((worker / "owner.json").read_text())["pid"], signal.SIGKILL)
    out, _ = begun.communicate(timeout=600)
    assert begun.returncode == 1 and f"{worker.name}: failed: " in out
    assert "2 complete, 0 pruned, 0 running, 1 stopped, 0 failed, 0 missing" in out
    assert {t["trial"]: t["state"] for t in desk.plan()["trials"]}[number] == "stopped"

    out = desk.sweep("--local")
    assert out.count("start   worker") == 1 and f"result   trial {number}: complete" in out
    assert len(starts(run)) == 2 and starts(run)[1] > 0  # it resumed
    assert "3 complete, 0 pruned, 0 running, 0 stopped, 0 failed, 0 missing" in out
    assert "selected on dev" in out and "python -m aem_exp model.make.steps=25" in out
    trials = desk.study().get_trials()
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert len({trial.params["trainer.learning_rate"] for trial in trials}) == 3
    assert all(set(trial.intermediate_values) == {1, 2, 3} for trial in trials)

    before = sorted(path.name for path in desk.outputs.iterdir())
    assert "no trial is missing" in desk.sweep("--local")
    assert sorted(path.name for path in desk.outputs.iterdir()) == before
    status = json.loads(desk.run_command("tiny", "--json", module="aem_exp.status"))
    assert sorted(row["group"] for row in status) == [f"trial {n}" for n in range(3)]
    assert all(row["what"] == "done" and row["steps"] == 3 for row in status)


@pytest.mark.slow
def test_trial_below_the_median_is_pruned_and_its_duplicate_gets_the_same_result(policy, desk, load_study):
    text = TINY.replace("trials: 4", "trials: 5\n  metric: train/success\n  pruner: median")
    opened = study.open_study(load_study(text))
    for i in range(4):  # above any possible success
        values = dict.fromkeys((1, 2, 3), 2.0)
        space = {"trainer.learning_rate": FloatDistribution(1e-4, 2e-3, log=True)}
        done = {"params": {"trainer.learning_rate": (i + 2) * 1e-4}, "distributions": space}
        opened.add_trial(create_trial(value=2.0, intermediate_values=values, **done))
    opened.enqueue_trial({"trainer.learning_rate": 1e-3})
    out = desk.sweep("--local")
    assert "4 complete, 1 pruned, 0 running, 0 stopped, 0 failed, 0 missing" in out
    pruned = desk.trials()[4]
    assert pruned["state"] == TrialState.PRUNED
    assert steps(pruned["run"]) == 1 and not (pruned["run"] / "result.json").exists()  # at its first evaluation
    assert list(pruned["run"].glob("checkpoint-2"))  # the last step is saved
    assert "no trial is missing" in desk.sweep("--local")

    desk.write(text.replace("trials: 5", "trials: 6"))
    opened.enqueue_trial({"trainer.learning_rate": 1e-3})
    assert "result   trial 5: pruned" in desk.sweep("--local")
    assert len(starts(pruned["run"])) == 1
    duplicate = opened.get_trials()[5]
    assert set(duplicate.intermediate_values) == {1} and duplicate.value == opened.get_trials()[4].value


@pytest.mark.slow
def test_unknown_metric_fails_the_trial(policy, desk):
    """The metric is checked at the first evaluation."""
    desk.write(TINY.replace("trials: 4", "trials: 1\n  metric: eval/succes"))
    out = desk.sweep("--local", code=1)
    assert "trial 0: config: search.metric=eval/succes: did you mean eval/success?" in out
    assert "1 failed, 0 missing" in out
    assert steps(desk.trials()[0]["run"]) == 0
    assert "no trial is missing" in desk.sweep("--local")


@pytest.mark.slow
def test_lost_trials_are_retried_at_most_twice(desk, load_study):
    search = load_study()
    opened = study.open_study(search)
    space = {"trainer.learning_rate": study_space.distribution(search, "trainer.learning_rate")}
    for again in range(study_submit.MAX_RETRIES + 1):
        trial = opened.ask(space)  # its worker does not exist
        now = study_status.read_status(search)
        assert [lost.number for lost in now.orphaned_trials] == [trial.number] and now.missing_count == 3
        assert len(study_submit._reconcile_workers(search, [])) == (4 if again < study_submit.MAX_RETRIES else 3)
    trials = opened.get_trials()
    assert {trial.state for trial in trials} == {TrialState.FAIL}
    assert len({trial.params["trainer.learning_rate"] for trial in trials}) == 1
    now = study_status.read_status(search)
    assert [trial.number for trial in now.trials] == [2] and now.missing_count == 3
    assert len(study_submit._reconcile_workers(search, ["killed"])) == 4  # --retry killed
    assert len(list(search.folder.glob("worker-*"))) == 4  # workers without a trial are reused
    assert (search.folder / "worker-000" / "code" / "slow_household.py").exists()


@pytest.mark.slow
def test_worker_that_is_always_killed_at_one_step_is_not_restarted(desk, load_study):
    search = load_study()
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


def test_search_space_uses_hydras_syntax(load_study):
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
    search = load_study(text)
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


@pytest.mark.slow
def test_study_with_other_settings_is_refused(desk, load_study):
    study.open_study(load_study())
    study_status.read_status(load_study(TINY.replace("trials: 4", "trials: 9\n  pruner: median")))  # these may change
    for old, new in [
        ("1e-4", "1e-5"),
        ("trainer.steps=3", "trainer.steps=4"),
        ("trials:", "direction: minimize\n  trials:"),
    ]:
        with pytest.raises(ConfigError) as caught:
            study_status.read_status(load_study(TINY.replace(old, new)))
        assert caught.value.field in ("tiny.space", "tiny.base", "tiny.direction")


@pytest.mark.slow
def test_databases_as_storage_without_leaking_credentials(desk, load_study, monkeypatch):
    monkeypatch.setenv("AEM_STUDY", f"sqlite:///{desk.folder / 'studies.db'}")
    search = load_study()
    opened = study.open_study(search)
    opened.ask({"trainer.learning_rate": study_space.distribution(search, "trainer.learning_rate")})
    assert len(study_status.read_status(search).orphaned_trials) == 1 and not journal(desk)
    worker = study_submit._reconcile_workers(search, [])[0]
    assert trial_worker.read_study(worker).search == search.search
    monkeypatch.delenv("AEM_STUDY")
    with pytest.raises(ConfigError) as caught:
        trial_worker.read_study(worker)
    assert caught.value.field == "AEM_STUDY"
    monkeypatch.setenv("AEM_STUDY", "postgresql://me:secret@nowhere.invalid/base")
    with pytest.raises(ConfigError) as caught:
        study_status.read_status(load_study())
    assert caught.value.field == "search.storage" and "secret" not in str(caught.value)


def with_space(line):
    return TINY.replace("trainer.learning_rate: tag(log, interval(1e-4, 2e-3))", line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (TINY.replace("trials: 4", "trails: 4"), ["tiny.search.trails=4: ", "did you mean trials?"]),
        (TINY.replace("trials: 4", "trials: 0"), ["tiny.search.trials=0: ", "at least 1"]),
        (TINY.replace("trials: 4", "direction: maximize"), ["tiny.search.trials=null: "]),
        (
            TINY.replace("trials: 4", "trials: 4\n  pruner: medium"),
            ["tiny.search.pruner=medium: ", "did you mean median?"],
        ),
        (TINY.replace("trials: 4", "trials: 4\n  metric: test/success"), ["tiny.search.metric=test/success: "]),
        (TINY.replace("tracking=off", "evaluation.panel=test evaluation.final=dev"), ["evaluation.panel=test: "]),
        (
            TINY.replace("trials: 4", "trials: 4\n  storage: mysql://a:b@c/d"),
            ["tiny.search.storage=mysql://***@c/d: ", "AEM_STUDY"],
        ),
        (TINY.partition("search:")[0] + "search: {}\nseeds: 0", ["tiny.search={}: "]),
        (TINY.partition("search:")[0] + "search: {space: {}, trials: 3}\nseeds: 0", ["tiny.search.space={}: "]),
        (TINY.partition("search:")[0] + "search: [1]\nseeds: 0", ["tiny.search=[1]: ", "mapping"]),
        (TINY.replace("seeds: 0", "seeds: 0,1"), ["tiny.seeds=2 values: "]),
        (TINY + "arms: {a: modulation=aem, b: modulation=none}", ["tiny.arms=2 values: "]),
        (TINY + "products: ['baseline=grpo,rloo']", ["tiny.products=2 values: "]),
        (
            with_space("trainer.learning_rat: interval(1, 2)"),
            ["tiny.search.space.trainer.learning_rat: trainer.learning_rat"],
        ),
        (
            with_space("trainer.learning_rate: interval(1e-4)"),
            ["tiny.search.space.trainer.learning_rate=interval(1e-4): "],
        ),
        (
            with_space("trainer.learning_rate: interval(2, 1)"),
            ["tiny.search.space.trainer.learning_rate=interval(2, 1): ", "lower"],
        ),
        (with_space("trainer.learning_rate: tag(log, interval(0, 1))"), ["both above 0"]),
        (with_space("trainer.learning_rate: tag(lgo, interval(1, 2))"), ["interval(1, 2)): ", "lgo"]),
        (with_space("trainer.learning_rate: '1e-3'"), ["tiny.search.space.trainer.learning_rate=1e-3: ", "base:"]),
        (with_space("trainer.learning_rate: 0.1"), ["tiny.search.space.trainer.learning_rate=0.1: ", "text"]),
        (with_space("modulation: aem,nothing"), ["tiny.search.space.modulation: modulation=nothing:"]),
        (with_space("trainer.group_size: range(1, 4)"), ["tiny.search.space.trainer.group_size: trainer.group_size=1"]),
        (with_space("seed: range(0, 9)"), ["tiny.search.space.seed=range(0, 9): "]),
        (with_space("launch.threads: 1,2"), ["tiny.search.space.launch.threads=1,2: "]),
        (with_space("evaluation.repeats: 1,2"), ["tiny.search.space.evaluation.repeats=1,2: "]),
        (with_space("name: a,b"), ["tiny.search.space.name=a,b: ", "a and b"]),
    ],
    ids=lambda value: value[-30:] if isinstance(value, str) else "",
)
def test_invalid_study_is_refused(load_study, text, facts):
    with pytest.raises(ConfigError) as caught:
        load_study(text)
    sentence = str(caught.value)
    assert all(fact in sentence for fact in facts) and "\n" not in sentence


def test_overrides_of_parameters_and_submission_of_local_launches_are_refused(load_study, desk):
    with pytest.raises(ConfigError) as caught:
        load_study(typed=["trainer.learning_rate=1e-3"])
    assert (caught.value.field, caught.value.value) == ("overrides", "trainer.learning_rate=1e-3")
    with pytest.raises(ConfigError) as caught:
        dispatch.check_can_start([load_study().base], True, desk.outputs)
    assert caught.value.field == "launch" and "launch=slurm_cpu" in caught.value.remedy


@pytest.mark.machine
@pytest.mark.slow
def test_requeued_worker_on_slurm_resumes_its_trial(policy, cluster, cache, tmp_path):
    desk = UserFolder(tmp_path, cache, **cluster.env)
    desk.write(TINY.replace(" launch.where=local", "").replace("trials: 4", "trials: 3"))
    assert "sent     3 workers as job" in desk.sweep("--submit", SLOW="0.03")
    assert " with an active worker)" in (plan := desk.sweep()) or "0 running" not in plan
    assert "no trial is missing" in desk.sweep("--submit")  # all have active workers
    worker, number, run = wait_until(
        lambda: journal(desk) and desk.running_trial(), lambda: f"a running trial: {desk.logs()}", 120
    )
    cluster.scontrol("requeue", json.loads((worker / "job.json").read_text())["job"])
    wait_until(lambda: len(starts(run)) == 2, "a second start", 90)
    wait_until(lambda: all(t["state"] == TrialState.COMPLETE for t in desk.trials()), "the end of all", 120)
    assert [t["trial"] for t in desk.trials()] == [0, 1, 2]
    assert json.loads((worker / "trial.json").read_text())["number"] == number
    assert starts(run)[1] > 0
    assert "3 complete, 0 pruned, 0 running, 0 stopped, 0 failed, 0 missing" in desk.sweep()
