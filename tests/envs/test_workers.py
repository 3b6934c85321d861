"""The stage: environments that misbehave in every way we know, in this process and in worker processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from random import Random

import psutil
import pytest
from support.runs import BackgroundCall

from aem_exp.config.targets import instantiate
from aem_exp.core.errors import ConfigError, RunError
from aem_exp.envs import Task, worker_process, workers
from aem_exp.envs.executor import SerialExecutor
from aem_exp.envs.remote_nodes import RemoteNodes
from aem_exp.envs.workers import WorkerPool

SECONDS = 120.0  # more than any request here needs, on a busy machine too
HANGS = 6.0  # for a request that never returns: more than those beside it need
MISCHIEF = '''
"""An environment whose responses say what it does. Each turn counts the calls since the reset."""

import ctypes, json, os, signal, subprocess, sys, time
from pathlib import Path

from aem_exp.envs import Task, Turn


class World:
    fingerprint = "mischief"

    def __init__(self, folder=".", start=""):
        self.folder, self.made = Path(folder), 0
        once = self.folder / "once"
        if start == "once" and once.exists():
            raise OSError("no second time")
        once.touch()
        match start:
            case "raise":
                raise OSError("no display")
            case "exit":
                print("out of licences", file=sys.stderr)
                os._exit(7)
            case "hang":
                time.sleep(1000)

    def tasks(self, split):
        return []

    def env(self):
        self.made += 1
        return Env(self, self.made)


class Env:
    def __init__(self, world, number):
        self.world, self.number, self.goal = world, number, ""

    def parse(self, response):
        if response == "parse":
            return 3
        return response[:20].upper().partition("CODE")[0]

    def close(self):
        with open(self.world.folder / "closed", "a") as file:
            file.write(f"{self.number}\\n")

    def reset(self, task):
        self.calls, self.goal = 0, f"goal of {task.id}"
        return self.turn(task.payload.get("do", task.id))

    def step(self, response):
        self.calls += 1
        return self.turn(response)

    def turn(self, response):
        word, _, rest = response.partition(" ")
        said = Turn(f"{self.calls}: {response}", 1, actions=["a", "b"], metrics={"won": self.calls == 3, "calls": self.calls})
        match word:
            case "raise":
                raise ValueError("the world\\nbroke")
            case "surrogate_error":
                raise ValueError("bad name \\udcff\\0")
            case "unprintable":
                raise type("Odd", (Exception,), {"__str__": lambda self: 1 / 0})
            case "interrupt":
                raise KeyboardInterrupt
            case "none":
                return None
            case "dict":
                return {"observation": "x"}
            case "nan":
                return Turn("x", float("nan"))
            case "infinite":
                return Turn("x", metrics={"m": float("inf")})
            case "reward":
                return Turn("x", "1.0")
            case "observation":
                return Turn(b"x")
            case "done":
                return Turn("x", terminated=1)
            case "actions":
                return Turn("x", actions="go")
            case "action":
                return Turn("x", actions=("go", 3))
            case "metrics":
                return Turn("x", metrics=None)
            case "surrogate":
                return Turn("caf\\udce9")
            case "huge":
                return Turn("x" * 100_000_000)
            case "large":
                return Turn("x" * 10_000_000)
            case "odd":
                return Turn("\\0 \\u2028 \\U0001f9ca \\ufeff \\r\\n \\u202e")
            case "code":
                return Turn(" ".join(f"{ord(letter):x}" for letter in rest))
            case "goal":
                self.goal = None
            case "which":
                return Turn(f"{self.number}")
            case "print":
                for stream in (sys.stdout, sys.__stdout__):
                    print("noise " * 100_000, file=stream)
                os.system("echo noise; echo noise >&2")
                return Turn(repr(sys.stdin.read()))
            case "shout":
                print("x" * 3_000_000, file=sys.stderr, flush=True)
            case "look":
                return Turn(json.dumps({"modules": sorted(sys.modules), "environ": dict(os.environ), "path": sys.path}))
            case "pid":
                return Turn(str(os.getpid()))
            case "hang":
                (self.world.folder / f"busy-{os.getpid()}").touch()
                time.sleep(float(rest or 1000))
            case "exit":
                print("first words", file=sys.stderr)
                print("last words", file=sys.stderr)
                sys.stderr.flush()
                os._exit(3)
            case "quit":
                sys.exit(4)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                ctypes.string_at(0)
            case "signals":
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                    os.kill(os.getpid(), number)
            case "terminate":
                child = os.fork() or time.sleep(1000)  # which may not have begun to sleep
                os.kill(child, signal.SIGTERM)
                return Turn(f"signal {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
            case "child":
                return Turn(str(subprocess.Popen(["sleep", "1000"]).pid))
            case "meet":  # come in, and wait for the others
                (self.world.folder / f"in-{os.getpid()}").touch()
                until = time.monotonic() + 120
                while len(list(self.world.folder.glob("in-*"))) < int(rest):
                    if time.monotonic() > until:
                        raise TimeoutError("nobody else came")
                    time.sleep(0.01)
        return said
'''


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """A folder with a module that only this process's sys.path leads to."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "mischief.py").write_text(MISCHIEF)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture
def mischief(modules, tmp_path):
    """The `make` block of the mischievous world."""
    return {"_target_": "mischief.World", "folder": str(tmp_path)}


@pytest.fixture
def open_workers(mischief):
    """Makes Workers in the mischievous world, and closes them."""
    opened = []

    def make(count=2, seconds=SECONDS, **keywords):
        opened.append(WorkerPool(mischief | keywords, count, seconds))
        return opened[-1]

    yield make
    for stage in opened:
        stage.close()


@pytest.fixture(params=["serial", "workers"])
def stage(request, mischief, open_workers):
    yield open_workers() if request.param == "workers" else SerialExecutor(instantiate(mischief))


@pytest.fixture(scope="module", params=["serial", "workers"])
def shared(request, modules, tmp_path_factory):
    """A stage that lives through many failures, and the file in which environments say that they were closed."""
    folder = tmp_path_factory.mktemp(request.param)
    make = {"_target_": "mischief.World", "folder": str(folder)}
    stage = WorkerPool(make, 2, SECONDS) if request.param == "workers" else SerialExecutor(instantiate(make))
    (folder / "closed").touch()
    yield stage, folder / "closed"
    stage.close()


def tasks(*slots, do=None):
    return {slot: Task(f"task-{slot}", slot, payload={"do": do} if do else {}) for slot in slots}


def pids(stage, slots):
    """The processes in which these slots live. What it asks is not the same when played again."""
    stage.reset(tasks(*slots))
    return {slot: int(reply.turn.observation) for slot, reply in stage.step(dict.fromkeys(slots, "pid")).items()}


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # in a container nobody may reap orphans
    except psutil.NoSuchProcess:
        return True


def wait_for(holds, seconds):
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


# What both stages promise.


def test_a_reply_says_what_the_environment_said(stage):
    first = stage.reset(tasks(4, 0, 1))
    assert list(first) == [4, 0, 1]
    assert first[4].turn.observation == "0: task-4"
    assert (first[4].goal, first[4].action, first[4].error) == ("goal of task-4", "", "")
    replies = stage.step({1: "odd", 4: "say it" + " " * 20 + "\0 🧊"})
    assert list(replies) == [1, 4]
    assert replies[1].turn.observation == "\0 \u2028 \U0001f9ca \ufeff \r\n \u202e"
    assert replies[4].action == "SAY IT" + " " * 14
    turn = replies[4].turn
    assert (turn.reward, turn.terminated, turn.truncated, turn.valid) == (1.0, False, False, True)
    assert turn.actions == ("a", "b")
    assert turn.metrics == {"won": 0.0, "calls": 1.0}
    assert {type(turn.reward), *map(type, turn.metrics.values())} == {float}


def test_any_response_may_be_said(stage):
    """Of a surrogate pair JSON would make one character."""
    stage.reset(tasks(0))
    reply = stage.step({0: "code \ud83d\ude00 \udcff \0"})[0]
    assert reply.turn.observation == "d83d de00 20 dcff 20 0"


def test_a_large_observation_arrives(stage):
    stage.reset(tasks(0, 1, 2))
    replies = stage.step(dict.fromkeys(range(3), "large"))
    assert [len(reply.turn.observation) for reply in replies.values()] == [10_000_000] * 3


@pytest.mark.parametrize(
    ("response", "error"),
    [
        ("raise", "ValueError: the world broke"),
        ("surrogate_error", r"ValueError: bad name \udcff" + "\0"),
        ("unprintable", "mischief.Odd: <exception str() failed>"),
        ("none", "TypeError: step must return a Turn, not NoneType"),
        ("dict", "TypeError: step must return a Turn, not dict"),
        ("nan", "ValueError: Turn.reward must be a finite number, not nan"),
        ("infinite", "ValueError: Turn.metrics['m'] must be a finite number, not inf"),
        ("reward", "ValueError: Turn.reward must be a finite number, not '1.0'"),
        ("observation", "TypeError: Turn.observation must be a str, not bytes"),
        ("done", "TypeError: Turn.terminated must be a bool, not int"),
        ("actions", "TypeError: Turn.actions must be a tuple of str or None, not str"),
        ("action", "TypeError: Turn.actions must be a str, not int"),
        ("metrics", "TypeError: Turn.metrics must be a dict, not NoneType"),
        ("surrogate", "ValueError: Turn.observation is not Unicode text: surrogates not allowed at character 3"),
        ("huge", "ValueError: Turn.observation has 100,000,000 bytes, more than the 16,777,216 that are allowed"),
        ("goal", "TypeError: goal must be a str, not NoneType"),
        ("parse", "TypeError: parse() must be a str, not int"),
    ],
)
def test_a_failing_environment_costs_its_own_slot_only(shared, response, error):
    stage, closed = shared
    before = closed.read_text().count("\n")
    stage.reset(tasks(0, 2, 1))
    replies = stage.step({0: "hello", 2: response, 1: "hello"})
    assert replies[2].turn is None
    assert replies[2].error == error
    assert replies[2].trace.startswith("Traceback")
    assert replies[0].turn.observation == replies[1].turn.observation == "1: hello"
    assert closed.read_text().count("\n") == before + 1  # the broken environment, at once
    assert stage.reset(tasks(2))[2].turn.observation == "0: task-2"
    replies = stage.step({0: "on", 2: "on"})
    assert [replies[slot].turn.observation for slot in (0, 2)] == ["2: on", "1: on"]


def test_after_an_error_the_slot_gets_a_new_environment(stage):
    stage.reset(tasks(0))
    assert stage.step({0: "which"})[0].turn.observation == "1"
    stage.reset(tasks(0))
    assert stage.step({0: "which"})[0].turn.observation == "1"  # reused
    stage.step({0: "raise"})
    stage.reset(tasks(0))
    assert stage.step({0: "which"})[0].turn.observation == "2"


def test_a_reset_may_fail_too(stage):
    replies = stage.reset(tasks(0, 1) | tasks(2, do="none"))
    assert replies[2].error == "TypeError: reset must return a Turn, not NoneType"
    assert replies[0].turn and replies[1].turn
    with pytest.raises(AssertionError, match="without a reset"):
        stage.step({2: "hello"})
    assert stage.step({0: "hello"})[0].turn.observation == "1: hello"


@pytest.mark.parametrize("payload", [{"place": (1, 2)}, {1: "x"}, {"x": float("nan")}, {"x": object()}, {"x": {1}}])
def test_a_task_that_json_would_change_is_refused_everywhere(stage, payload):
    replies = stage.reset(
        {0: Task("odd", payload=payload), 1: Task("plain", payload={"do": "hello", "x": [1.5, None]})}
    )
    assert replies[0].error.startswith(("TypeError", "ValueError"))
    assert replies[1].turn.observation == "0: hello"


def test_closing_closes_every_environment_and_may_be_repeated(stage, tmp_path):
    stage.reset(tasks(0, 1, 2))
    stage.close()
    assert (tmp_path / "closed").read_text().count("\n") == 3
    stage.close()
    assert (tmp_path / "closed").read_text().count("\n") == 3


def test_ctrl_c_passes_through_an_environment_in_this_process(mischief):
    stage = SerialExecutor(instantiate(mischief))
    stage.reset(tasks(0))
    with pytest.raises(KeyboardInterrupt):
        stage.step({0: "interrupt"})


# Workers: the same games, at the same time.


@pytest.fixture(scope="module")
def household():
    """Episodes of one hundred responses in two rounds of eight slots, some sensible, some not."""
    make = {"_target_": "aem_exp.envs.household.Household", "receptacles": 4}
    world = instantiate(make)

    def play(stage, rounds=2):
        replies = []
        for number in range(rounds):
            random = Random(number)
            chosen = {slot: world.tasks("train")[8 * number + slot] for slot in range(8)}
            last = stage.reset(chosen)
            replies.append(last)
            for _ in range(8):
                live = {slot: reply.turn for slot, reply in last.items() if not reply.turn.done}
                said = {slot: random.choice([*turn.actions, "xyzzy"]) for slot, turn in live.items()}
                last = stage.step(said)
                replies.append(last)
        stage.close()
        return replies

    return make, play, play(SerialExecutor(world))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_workers_play_what_serial_plays(household, count):
    make, play, expected = household
    assert sum(map(len, expected)) > 100
    assert play(WorkerPool(make, count, SECONDS)) == expected


def test_workers_play_at_the_same_time(open_workers):
    """Each of four steps returns only once all four have begun."""
    stage = open_workers(4)
    stage.reset(tasks(*range(4)))
    replies = stage.step(dict.fromkeys(range(4), "meet 4"))
    assert [reply.error for reply in replies.values()] == [""] * 4


def test_a_slot_keeps_its_worker_and_only_those_needed_are_started(open_workers):
    before = len(psutil.Process().children())
    stage = open_workers(3)
    first = pids(stage, range(2))
    assert len(psutil.Process().children()) == before + 2
    later = pids(stage, range(7))
    assert {slot: later[slot] for slot in first} == first
    assert [later[slot] == later[slot % 3] for slot in range(7)] == [True] * 7
    assert len(set(later.values())) == 3


# Workers: what is lost, and what is not.


@pytest.mark.parametrize(
    ("response", "error", "trace"),
    [
        ("hang", "hung: no answer within 6 s", "mischief.py"),
        ("exit", "its process died (exit code 3) last words", "first words\nlast words"),
        ("quit", "its process died (exit code 4)", ""),
        ("kill", "its process died (signal 9)", ""),
        ("segfault", f"its process died (signal {signal.SIGSEGV.value})", "mischief.py"),
        ("interrupt", f"its process died (signal {signal.SIGINT.value})", "KeyboardInterrupt"),
    ],
)
@pytest.mark.parametrize("call", ["step", "reset"])
def test_a_lost_worker_costs_one_slot(open_workers, response, error, trace, call):
    """Slots 0, 2 and 4 share a worker. 2 is lost; 0 was answered before, 4 is answered after, by the replacement."""
    stage = open_workers(2, seconds=HANGS if response == "hang" else SECONDS)
    stage.reset(tasks(*range(5)))
    stage.step(dict.fromkeys(range(5), "one"))
    if call == "step":
        replies = stage.step({0: "two", 2: response, 4: "two", 1: "two", 3: "two"})
    else:
        replies = stage.reset(tasks(2, do=response)) | stage.step(dict.fromkeys((0, 4, 1, 3), "two"))
    assert replies[2].error.strip() == error
    assert trace in replies[2].trace
    assert [replies[slot].turn.observation for slot in (0, 4, 1, 3)] == ["2: two"] * 4
    with pytest.raises(AssertionError, match="without a reset"):
        stage.step({2: "on"})
    assert stage.reset(tasks(2))[2].turn.observation == "0: task-2"
    replies = stage.step(dict.fromkeys(range(5), "three"))
    assert [replies[slot].turn.observation for slot in range(5)] == [
        "3: three",
        "3: three",
        "1: three",
        "3: three",
        "3: three",
    ]


def test_a_worker_that_dies_between_two_calls_costs_nothing(open_workers):
    stage = open_workers(1)
    (pid,) = set(pids(stage, [0]).values())
    stage.reset(tasks(0, 1))
    os.kill(pid, signal.SIGKILL)
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT  # all of its threads: the first to die makes it a zombie already
    assert wait_for(lambda: os.waitid(os.P_PID, pid, ended) is not None, SECONDS)
    replies = stage.step({0: "one", 1: "one"})
    said = [reply.error or (reply.turn and reply.turn.observation) for reply in replies.values()]
    assert said == ["1: one", "1: one"]


def test_what_comes_out_different_when_played_again_is_an_error(open_workers):
    stage = open_workers(1)
    stage.reset(tasks(0, 1, 2))
    stage.step({0: "pid", 1: "one", 2: "one"})  # the answer to "pid" is another in the replacement
    replies = stage.step({2: "kill", 1: "two", 0: "two"})
    assert replies[0].error == "turn 1 came out different when played again: it is not deterministic"
    assert replies[1].turn.observation == "2: two"
    assert pids(stage, [0])[0] == pids(stage, [1])[1]  # and the slot works again


def test_every_slot_may_lose_its_worker_in_one_call(open_workers):
    stage = open_workers(2)
    stage.reset(tasks(*range(6)))
    replies = stage.step(dict.fromkeys(range(6), "kill"))
    assert {reply.error for reply in replies.values()} == {"its process died (signal 9)"}
    assert [reply.turn.observation for reply in stage.reset(tasks(0, 5)).values()] == ["0: task-0", "0: task-5"]


def test_the_environments_own_children_die_with_a_lost_worker(open_workers):
    stage = open_workers(1, seconds=HANGS)
    stage.reset(tasks(0))
    child = int(stage.step({0: "child"})[0].turn.observation)
    assert not gone(child)
    stage.step({0: "hang"})
    assert wait_for(lambda: gone(child), SECONDS)


def test_a_worker_that_cannot_be_replaced_costs_its_slots(open_workers, tmp_path):
    """The world can be made once. Nothing is tried for ever, and it works again when the world does."""
    stage = open_workers(1, start="once")
    stage.reset(tasks(0, 1, 2))
    replies = stage.step({0: "kill", 1: "one", 2: "one"})
    assert replies[0].error == "its process died (signal 9)"
    assert replies[1].error == replies[2].error == "its process could not be replaced: OSError: no second time"
    (tmp_path / "once").unlink()
    assert stage.reset(tasks(1))[1].turn.observation == "0: task-1"


@pytest.mark.parametrize(
    ("start", "why"),
    [
        ("raise", "OSError: no display"),
        ("exit", "its process died (exit code 7) out of licences"),
        ("hang", "hung: no answer within"),
    ],
)
def test_a_world_that_cannot_be_made_is_the_users_mistake(open_workers, monkeypatch, start, why):
    monkeypatch.setattr(workers, "START_SECONDS", 2.0 if start == "hang" else workers.START_SECONDS)
    before = psutil.Process().children()
    stage = open_workers(1 if start == "hang" else 2, start=start)
    with pytest.raises(ConfigError) as caught:
        stage.reset(tasks(*range(4)))
    assert str(caught.value).startswith("env.make=mischief.World: a worker could not make it: " + why)
    assert psutil.Process().children() == before


# Workers as processes.


@pytest.mark.parametrize("given", [{}, {"PYTHONPATH": "/somewhere"}], ids=str)
def test_a_worker_is_light_and_finds_the_users_modules(open_workers, monkeypatch, tmp_path, given):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "aem_exp").mkdir()  # not ours, and not to be found first
    (tmp_path / "aem_exp" / "__init__.py").write_text("raise ImportError('the wrong package')")
    stage = open_workers(1)
    stage.reset(tasks(0))
    seen = json.loads(stage.step({0: "look"})[0].turn.observation)
    heavy = {"torch", "transformers", "trl", "mlflow", "hydra", "numpy", "omegaconf", "accelerate", "datasets"}
    assert not heavy & {name.partition(".")[0] for name in seen["modules"]}
    assert seen["path"] == [os.path.abspath(entry) for entry in sys.path]
    assert seen["environ"].get("PYTHONPATH") == given.get("PYTHONPATH")  # what the environment starts gets the user's
    assert {seen["environ"][f"{library}_NUM_THREADS"] for library in ("OMP", "MKL", "OPENBLAS")} == {"1"}


def test_a_worker_may_print_and_reads_nothing(open_workers, capfd):
    stage = open_workers(1)
    stage.reset(tasks(0))
    assert stage.step({0: "print"})[0].turn.observation == "''"
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_worker_writes_to_stderr_does_not_fill_the_disk(open_workers):
    stage = open_workers(1)
    (pid,) = pids(stage, [0]).values()
    for _ in range(4):
        stage.step({0: "shout"})
    assert os.stat(f"/proc/{pid}/fd/2").st_size <= 3_000_001
    assert stage.step({0: "exit"})[0].trace == "first words\nlast words\n"  # of this request


def test_a_schedulers_signals_are_for_the_parent(open_workers):
    """They reach every process of a job that is about to be preempted; the worker plays on."""
    stage = open_workers(1)
    stage.reset(tasks(0, 1))
    replies = stage.step({0: "signals", 1: "terminate"})
    assert replies[0].turn.observation == "1: signals"
    assert replies[1].turn.observation == "signal -15"  # what it forks can be ended as ever


def test_closing_leaves_nothing_behind(open_workers, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    me = psutil.Process()
    before = me.num_fds()
    stage = open_workers(3)
    running = set(pids(stage, range(5)).values())
    assert len(running) == 3
    stage.close()
    stage.close()
    assert all(not psutil.pid_exists(pid) for pid in running)  # not even a zombie
    assert me.num_fds() == before
    assert list((tmp_path / "tmp").iterdir()) == []
    assert stage.reset(tasks(0))[0].turn.observation == "0: task-0"  # a closed stage may open again


PARENT = """
import os, sys, time
sys.path.insert(0, {modules!r})
from aem_exp.envs import Task
from aem_exp.envs.workers import WorkerPool
stage = WorkerPool({make!r}, 2, 1000)
stage.reset({{0: Task("a"), 1: Task("b")}})
print(*[reply.turn.observation for reply in stage.step({{0: "pid", 1: "pid"}}).values()], flush=True)
{then}
"""


def parent(modules, mischief, then):
    """Another process with two workers: itself, and their pids."""
    script = PARENT.format(modules=str(modules), make=mischief, then=textwrap.dedent(then))
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    return child, [int(pid) for pid in child.stdout.readline().split()]


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(modules, mischief, tmp_path):
    """One is idle and ends at once, one is in a step that never returns."""
    child, running = parent(modules, mischief, 'stage.step({0: "hang"})')
    assert len(running) == 2
    assert wait_for((tmp_path / f"busy-{running[0]}").exists, SECONDS)
    child.kill()
    child.communicate()
    assert wait_for(lambda: gone(running[1]), SECONDS)
    assert (tmp_path / "closed").read_text() == "1\n"
    assert wait_for(lambda: gone(running[0]), worker_process.GRACE_SECONDS + SECONDS)


def test_ctrl_c_ends_workers_quietly(modules, mischief, tmp_path):
    child, running = parent(modules, mischief, 'stage.step({0: "hang 1", 1: "hang 1"})')
    assert wait_for((tmp_path / f"busy-{running[0]}").exists, SECONDS)
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=SECONDS)
    assert child.returncode == -signal.SIGINT
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt") == 1
    assert all(gone(pid) for pid in running)


def test_after_ctrl_c_no_answer_is_taken_for_another(modules, mischief, tmp_path):
    then = """
    try:
        stage.step({0: "hang 1", 1: "hang 1"})
    except KeyboardInterrupt:
        print([stage.reset({slot: Task("again")})[slot].turn.observation for slot in (0, 1)])
    """
    child, running = parent(modules, mischief, then)
    assert wait_for((tmp_path / f"busy-{running[0]}").exists, SECONDS)
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=SECONDS) == ("['0: again', '0: again']\n", "")


@pytest.mark.parametrize("then", ["", "del stage", "raise SystemExit(0)"])
def test_workers_that_were_never_closed_end_with_the_interpreter(modules, mischief, tmp_path, then):
    child, running = parent(modules, mischief, then)
    _, errors = child.communicate(timeout=SECONDS)
    assert (child.returncode, errors) == (0, "")
    assert all(gone(pid) for pid in running)
    assert (tmp_path / "closed").read_text() == "1\n1\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_of_the_parent_does_not_end_its_workers(modules, mischief):
    then = """
    if os.fork() == 0:
        sys.exit()  # with all that is done at exit
    os.wait()
    print([reply.error for reply in stage.step({0: "one"}).values()])
    """
    child, _ = parent(modules, mischief, then)
    assert child.communicate(timeout=SECONDS) == ("['']\n", "")


def test_threads_play_their_own_slots_and_wait_for_no_other_worker(open_workers):
    """Two workers, a thread for each slot: one that hangs costs its own worker's slots the wait, and nobody else."""
    stage = open_workers(2, seconds=HANGS)
    stage.reset(tasks(0, 1, 2, 3))
    replies = {}

    def play(slot, said):
        replies[slot] = stage.step({slot: said})[slot]

    playing = [BackgroundCall(play, slot, "hang" if slot == 0 else "hello") for slot in (0, 1, 3)]
    for each in playing:
        each.end()
    assert "hung" in replies[0].error and not replies[1].error and not replies[3].error
    assert [*replies][-1] == 0, "it is the last"
    assert not stage.step({2: "hello"})[2].error, "the other slot of that worker is played again"


def test_closing_ends_the_steps_of_other_threads(open_workers, tmp_path):
    stage = open_workers(2)
    stage.reset(tasks(0, 1))
    stepping = [BackgroundCall(stage.step, {slot: "hang 1"}) for slot in range(2)]
    assert wait_for(lambda: len(list(tmp_path.glob("busy-*"))) == 2, SECONDS)
    stage.close()
    for each in stepping:
        with contextlib.suppress(Exception):  # whatever a step says of being cut off
            each.end(SECONDS)
        assert not each.busy


# Workers of machines that lend their cores.


@pytest.fixture
def lent(tmp_path, monkeypatch):
    """A folder that two lenders, processes of this machine, have written down where they are in."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "site.yaml").write_text("interface: lo\n")
    folder = tmp_path / "lent"
    command = [sys.executable, "-m", "aem_exp.jobs.lend", str(folder)]
    env = os.environ | {"AEM_SITE": str(tmp_path / "site")}
    lenders = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert wait_for(lambda: len(list(folder.glob("node-*"))) == 2, SECONDS)
    yield folder, lenders
    for lender in lenders:
        lender.terminate()
    assert [lender.wait(SECONDS) for lender in lenders]
    assert not list(folder.glob("node-*"))


def test_lent_workers_play_what_serial_plays(household, lent):
    make, play, expected = household
    assert play(WorkerPool(make, 3, SECONDS, RemoteNodes(lent[0], 0))) == expected


def test_one_that_dies_over_there_is_replaced(mischief, lent):
    folder, lenders = lent
    stage = WorkerPool(mischief, 2, SECONDS, RemoteNodes(folder, 1))
    before = pids(stage, [0, 1])
    assert {psutil.Process(pid).ppid() for pid in before.values()} == {lender.pid for lender in lenders}
    assert "ended" in stage.step({0: "kill"})[0].error
    assert pids(stage, [0, 1])[1] == before[1]
    stage.close()
    assert wait_for(lambda: gone(before[1]), SECONDS)


def test_what_hangs_over_there_is_left(mischief, lent):
    stage = WorkerPool(mischief, 1, HANGS, RemoteNodes(lent[0], 0))
    stage.reset(tasks(0))
    assert "hung: no answer from 127.0.0.1:" in stage.step({0: "hang"})[0].error
    assert not stage.reset(tasks(0))[0].error
    stage.close()


def test_where_all_lenders_are_stoppedthe_run_stops_and_may_go_on_later(mischief, lent):
    folder, lenders = lent
    stage = WorkerPool(mischief, 1, SECONDS, RemoteNodes(folder, 0))
    stage.reset(tasks(0))
    for lender in lenders:
        lender.terminate()
        lender.wait(SECONDS)
    with pytest.raises(RunError, match=r"no node that lends its cores is left: launch\.workers_at=") as stopped:
        stage.step({0: "hello"})
    assert stopped.value.kind == "node"


def test_who_does_not_know_the_key_is_not_let_in(mischief, lent):
    folder, _ = lent
    assert (folder / "key").stat().st_mode & 0o077 == 0
    (folder / "key").write_text("another")
    with pytest.raises(ConfigError, match=r"launch.workers_at=.*no node there answers"):
        WorkerPool(mischief, 1, SECONDS, RemoteNodes(folder, 0)).reset(tasks(0))


def test_a_folder_of_nobody_is_one_sentence(mischief, tmp_path):
    with pytest.raises(ConfigError, match=r"launch.workers_at=.*says of no node"):
        WorkerPool(mischief, 1, SECONDS, RemoteNodes(tmp_path, 0)).reset(tasks(0))
