"""Executors: environments that fail in every way that we know, in this process and in worker processes."""

import contextlib
import json
import os
import shutil
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
from aem_exp.core import disk
from aem_exp.core.errors import ConfigError
from aem_exp.envs import Task, worker_process, workers
from aem_exp.envs.executor import SerialExecutor
from aem_exp.envs.workers import WorkerPool

SECONDS = 120.0  # more than any request needs, even on a busy machine
HANG_SECONDS = 6.0  # limit for a request that never returns, and more than the other requests need
MISCHIEF = '''
"""An environment that does what a response says. Each turn counts the calls since the reset."""

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
        turn = Turn(f"{self.calls}: {response}", 1, actions=["a", "b"], metrics={"won": self.calls == 3, "calls": self.calls})
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
                child = os.fork() or time.sleep(1000)  # the signal may arrive before the sleep begins
                os.kill(child, signal.SIGTERM)
                return Turn(f"signal {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
            case "child":
                return Turn(str(subprocess.Popen(["sleep", "1000"]).pid))
            case "meet":  # wait until as many processes are in this step
                (self.world.folder / f"in-{os.getpid()}").touch()
                until = time.monotonic() + 120
                while len(list(self.world.folder.glob("in-*"))) < int(rest):
                    if time.monotonic() > until:
                        raise TimeoutError("the other processes did not come")
                    time.sleep(0.01)
        return turn
'''


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """A folder with a module that only the sys.path of this process contains."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "mischief.py").write_text(MISCHIEF)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture
def mischief(modules, tmp_path):
    """The `make` block of the world in MISCHIEF."""
    return {"_target_": "mischief.World", "folder": str(tmp_path)}


@pytest.fixture
def open_workers(mischief):
    """Makes worker pools for the world in MISCHIEF, and closes them at the end."""
    opened = []

    def make(count=2, seconds=SECONDS, **keywords):
        opened.append(WorkerPool(mischief | keywords, count, seconds))
        return opened[-1]

    yield make
    for executor in opened:
        executor.close()


@pytest.fixture(params=["serial", "workers"])
def executor(request, mischief, open_workers):
    yield open_workers() if request.param == "workers" else SerialExecutor(instantiate(mischief))


@pytest.fixture(scope="module", params=["serial", "workers"])
def shared(request, modules, tmp_path_factory):
    """An executor for many failures, and the file with a line for each closed environment."""
    folder = tmp_path_factory.mktemp(request.param)
    make = {"_target_": "mischief.World", "folder": str(folder)}
    executor = WorkerPool(make, 2, SECONDS) if request.param == "workers" else SerialExecutor(instantiate(make))
    (folder / "closed").touch()
    yield executor, folder / "closed"
    executor.close()


def tasks(*slots, do=None):
    return {slot: Task(f"task-{slot}", slot, payload={"do": do} if do else {}) for slot in slots}


def pids(executor, slots):
    """The worker processes of these slots. The replies differ when replayed."""
    executor.reset(tasks(*slots))
    return {slot: int(reply.turn.observation) for slot, reply in executor.step(dict.fromkeys(slots, "pid")).items()}


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # in a container, orphans may stay zombies
    except psutil.NoSuchProcess:
        return True


def wait_for(holds, seconds):
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


# Both executors.


def test_a_reply_has_turn_goal_and_action(executor):
    first = executor.reset(tasks(4, 0, 1))
    assert list(first) == [4, 0, 1]
    assert first[4].turn.observation == "0: task-4"
    assert (first[4].goal, first[4].action, first[4].error) == ("goal of task-4", "", "")
    replies = executor.step({1: "odd", 4: "say it" + " " * 20 + "\0 🧊"})  # `parse` cuts at 20 characters
    assert list(replies) == [1, 4]
    assert replies[1].turn.observation == "\0 \u2028 \U0001f9ca \ufeff \r\n \u202e"
    assert replies[4].action == "SAY IT" + " " * 14
    turn = replies[4].turn
    assert (turn.reward, turn.terminated, turn.truncated, turn.valid) == (1.0, False, False, True)
    assert turn.actions == ("a", "b")
    assert turn.metrics == {"won": 0.0, "calls": 1.0}
    assert {type(turn.reward), *map(type, turn.metrics.values())} == {float}


@pytest.mark.slow
def test_any_response_reaches_the_environment(executor):
    """Escaped JSON would turn a surrogate pair into one character."""
    executor.reset(tasks(0))
    reply = executor.step({0: "code \ud83d\ude00 \udcff \0"})[0]
    assert reply.turn.observation == "d83d de00 20 dcff 20 0"


@pytest.mark.slow
def test_a_large_observation_arrives(executor):
    executor.reset(tasks(0, 1, 2))
    replies = executor.step(dict.fromkeys(range(3), "large"))
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
        ("surrogate", "ValueError: Turn.observation is not valid Unicode: surrogates not allowed at character 3"),
        ("huge", "ValueError: Turn.observation has 100,000,000 bytes; at most 16,777,216 are allowed"),
        ("goal", "TypeError: goal must be a str, not NoneType"),
        ("parse", "TypeError: parse() must be a str, not int"),
    ],
)
def test_a_failed_environment_affects_only_its_own_slot(shared, response, error):
    executor, closed = shared
    before = closed.read_text().count("\n")
    executor.reset(tasks(0, 2, 1))
    replies = executor.step({0: "hello", 2: response, 1: "hello"})
    assert replies[2].turn is None
    assert replies[2].error == error
    assert replies[2].trace.startswith("Traceback")
    assert replies[0].turn.observation == replies[1].turn.observation == "1: hello"
    assert closed.read_text().count("\n") == before + 1  # the failed environment was closed
    assert executor.reset(tasks(2))[2].turn.observation == "0: task-2"
    replies = executor.step({0: "on", 2: "on"})
    assert [replies[slot].turn.observation for slot in (0, 2)] == ["2: on", "1: on"]


def test_after_an_error_the_slot_gets_a_new_environment(executor):
    executor.reset(tasks(0))
    assert executor.step({0: "which"})[0].turn.observation == "1"
    executor.reset(tasks(0))
    assert executor.step({0: "which"})[0].turn.observation == "1"  # reused
    executor.step({0: "raise"})
    executor.reset(tasks(0))
    assert executor.step({0: "which"})[0].turn.observation == "2"


def test_a_failed_reset_affects_only_its_own_slot(executor):
    replies = executor.reset(tasks(0, 1) | tasks(2, do="none"))
    assert replies[2].error == "TypeError: reset must return a Turn, not NoneType"
    assert replies[0].turn and replies[1].turn
    with pytest.raises(AssertionError, match="without a reset"):
        executor.step({2: "hello"})
    assert executor.step({0: "hello"})[0].turn.observation == "1: hello"


@pytest.mark.parametrize("payload", [{"place": (1, 2)}, {1: "x"}, {"x": float("nan")}, {"x": object()}, {"x": {1}}])
def test_a_payload_that_json_would_change_is_refused(executor, payload):
    replies = executor.reset(
        {0: Task("odd", payload=payload), 1: Task("plain", payload={"do": "hello", "x": [1.5, None]})}
    )
    assert replies[0].error.startswith(("TypeError", "ValueError"))
    assert replies[1].turn.observation == "0: hello"


def test_closing_closes_every_environment_and_may_be_repeated(executor, tmp_path):
    executor.reset(tasks(0, 1, 2))
    executor.close()
    assert (tmp_path / "closed").read_text().count("\n") == 3
    executor.close()
    assert (tmp_path / "closed").read_text().count("\n") == 3


def test_ctrl_c_in_a_serial_environment_is_raised(mischief):
    executor = SerialExecutor(instantiate(mischief))
    executor.reset(tasks(0))
    with pytest.raises(KeyboardInterrupt):
        executor.step({0: "interrupt"})


# Workers play the same games, in parallel.


@pytest.fixture(scope="module")
def household():
    """A function that plays sixteen random episodes, some responses nonsense, and the replies of a serial executor."""
    make = {"_target_": "aem_exp.envs.household.Household", "receptacles": 4}
    world = instantiate(make)

    def play(executor, rounds=2):
        replies = []
        for number in range(rounds):
            random = Random(number)
            chosen = {slot: world.tasks("train")[8 * number + slot] for slot in range(8)}
            last = executor.reset(chosen)
            replies.append(last)
            for _ in range(8):
                live = {slot: reply.turn for slot, reply in last.items() if not reply.turn.done}
                responses = {slot: random.choice([*turn.actions, "xyzzy"]) for slot, turn in live.items()}
                last = executor.step(responses)
                replies.append(last)
        executor.close()
        return replies

    return make, play, play(SerialExecutor(world))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 8])
def test_workers_give_the_replies_of_a_serial_executor(household, count):
    make, play, expected = household
    assert sum(map(len, expected)) > 100
    assert play(WorkerPool(make, count, SECONDS)) == expected


@pytest.mark.slow
def test_workers_step_in_parallel(open_workers):
    """Each of four steps returns only after all four have begun."""
    executor = open_workers(4)
    executor.reset(tasks(*range(4)))
    replies = executor.step(dict.fromkeys(range(4), "meet 4"))
    assert [reply.error for reply in replies.values()] == [""] * 4


@pytest.mark.slow
def test_a_slot_keeps_its_worker_and_only_needed_workers_start(open_workers):
    before = len(psutil.Process().children())
    executor = open_workers(3)
    first = pids(executor, range(2))
    assert len(psutil.Process().children()) == before + 2
    later = pids(executor, range(7))
    assert {slot: later[slot] for slot in first} == first
    assert [later[slot] == later[slot % 3] for slot in range(7)] == [True] * 7
    assert len(set(later.values())) == 3


# Workers that hang or die.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("response", "error", "trace"),
    [
        ("hang", "hung: no answer within 6 s", "mischief.py"),
        ("exit", "(exit code 3) last words", "first words\nlast words"),
        ("quit", "(exit code 4)", ""),
        ("kill", "(signal 9)", ""),
        ("segfault", f"(signal {signal.SIGSEGV.value})", "mischief.py"),
        ("interrupt", f"(signal {signal.SIGINT.value})", "KeyboardInterrupt"),
    ],
)
@pytest.mark.parametrize("call", ["step", "reset"])
def test_a_lost_worker_affects_only_one_slot(open_workers, response, error, trace, call):
    """Slots 0, 2 and 4 share a worker. Slot 2 fails; slot 0 was answered before, and the new worker answers slot 4."""
    executor = open_workers(2, seconds=HANG_SECONDS if response == "hang" else SECONDS)
    executor.reset(tasks(*range(5)))
    executor.step(dict.fromkeys(range(5), "one"))
    if call == "step":
        replies = executor.step({0: "two", 2: response, 4: "two", 1: "two", 3: "two"})
    else:
        replies = executor.reset(tasks(2, do=response)) | executor.step(dict.fromkeys((0, 4, 1, 3), "two"))
    assert replies[2].error.strip().endswith(error)
    assert trace in replies[2].trace
    assert [replies[slot].turn.observation for slot in (0, 4, 1, 3)] == ["2: two"] * 4
    with pytest.raises(AssertionError, match="without a reset"):
        executor.step({2: "on"})
    assert executor.reset(tasks(2))[2].turn.observation == "0: task-2"
    replies = executor.step(dict.fromkeys(range(5), "three"))
    assert [replies[slot].turn.observation for slot in range(5)] == [
        "3: three",
        "3: three",
        "1: three",
        "3: three",
        "3: three",
    ]


@pytest.mark.slow
def test_a_worker_that_dies_between_two_calls_is_replaced_without_an_error(open_workers):
    executor = open_workers(1)
    (pid,) = set(pids(executor, [0]).values())
    executor.reset(tasks(0, 1))
    os.kill(pid, signal.SIGKILL)
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT  # until all threads have ended: one dead thread already makes a zombie
    assert wait_for(lambda: os.waitid(os.P_PID, pid, ended) is not None, SECONDS)
    replies = executor.step({0: "one", 1: "one"})
    answers = [reply.error or (reply.turn and reply.turn.observation) for reply in replies.values()]
    assert answers == ["1: one", "1: one"]


@pytest.mark.slow
def test_a_replay_with_another_reply_is_an_error(open_workers):
    executor = open_workers(1)
    executor.reset(tasks(0, 1, 2))
    executor.step({0: "pid", 1: "one", 2: "one"})  # the reply to "pid" differs in the new worker
    replies = executor.step({2: "kill", 1: "two", 0: "two"})
    assert replies[0].error.startswith("turn 1 ") and "deterministic" in replies[0].error
    assert replies[1].turn.observation == "2: two"
    assert pids(executor, [0])[0] == pids(executor, [1])[1]  # the slot works again


@pytest.mark.slow
def test_every_slot_may_lose_its_worker_in_one_call(open_workers):
    executor = open_workers(2)
    executor.reset(tasks(*range(6)))
    replies = executor.step(dict.fromkeys(range(6), "kill"))
    assert all("(signal 9)" in reply.error for reply in replies.values())
    assert [reply.turn.observation for reply in executor.reset(tasks(0, 5)).values()] == ["0: task-0", "0: task-5"]


@pytest.mark.slow
def test_child_processes_of_an_environment_end_with_a_lost_worker(open_workers):
    executor = open_workers(1, seconds=HANG_SECONDS)
    executor.reset(tasks(0))
    child = int(executor.step({0: "child"})[0].turn.observation)
    assert not gone(child)
    executor.step({0: "hang"})
    assert wait_for(lambda: gone(child), SECONDS)


@pytest.mark.slow
def test_all_slots_of_a_worker_that_cannot_be_replaced_fail(open_workers, tmp_path):
    """The world can be made only once. There is no endless retry, and the slots work again when the world does."""
    executor = open_workers(1, start="once")
    executor.reset(tasks(0, 1, 2))
    replies = executor.step({0: "kill", 1: "one", 2: "one"})
    assert "(signal 9)" in replies[0].error
    assert replies[1].error == replies[2].error
    assert "replaced" in replies[1].error and "OSError: no second time" in replies[1].error
    (tmp_path / "once").unlink()
    assert executor.reset(tasks(1))[1].turn.observation == "0: task-1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "reason"),
    [
        ("raise", "OSError: no display"),
        ("exit", "(exit code 7) out of licences"),
        ("hang", "hung: no answer within"),
    ],
)
def test_a_world_that_cannot_be_made_is_a_config_error(open_workers, monkeypatch, start, reason):
    monkeypatch.setattr(workers, "START_SECONDS", 2.0 if start == "hang" else workers.START_SECONDS)
    before = psutil.Process().children()
    executor = open_workers(1 if start == "hang" else 2, start=start)
    with pytest.raises(ConfigError) as caught:
        executor.reset(tasks(*range(4)))
    assert (caught.value.field, caught.value.value) == ("env.make", "mischief.World")
    assert reason in caught.value.remedy
    assert psutil.Process().children() == before


# Worker processes.


@pytest.mark.parametrize("variables", [{}, {"PYTHONPATH": "/somewhere"}], ids=str)
def test_a_worker_imports_little_and_finds_the_users_modules(open_workers, monkeypatch, tmp_path, variables):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "aem_exp").mkdir()  # another package with our name, which must not come first
    (tmp_path / "aem_exp" / "__init__.py").write_text("raise ImportError('the wrong package')")
    executor = open_workers(1)
    executor.reset(tasks(0))
    seen = json.loads(executor.step({0: "look"})[0].turn.observation)
    heavy = {"torch", "transformers", "trl", "mlflow", "hydra", "numpy", "omegaconf", "accelerate", "datasets"}
    assert not heavy & {name.partition(".")[0] for name in seen["modules"]}
    assert seen["path"] == [os.path.abspath(entry) for entry in sys.path]
    assert seen["environ"].get("PYTHONPATH") == variables.get("PYTHONPATH")  # child programs get the user's value
    assert {seen["environ"][f"{library}_NUM_THREADS"] for library in ("OMP", "MKL", "OPENBLAS")} == {"1"}


def test_output_of_a_worker_is_discarded_and_its_stdin_is_empty(open_workers, capfd):
    executor = open_workers(1)
    executor.reset(tasks(0))
    assert executor.step({0: "print"})[0].turn.observation == "''"
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_stderr_of_a_worker_does_not_fill_the_disk(open_workers):
    executor = open_workers(1)
    (pid,) = pids(executor, [0]).values()
    for _ in range(4):
        executor.step({0: "shout"})
    assert os.stat(f"/proc/{pid}/fd/2").st_size <= 3_000_001
    assert executor.step({0: "exit"})[0].trace == "first words\nlast words\n"  # only of the last request


def test_a_worker_ignores_a_schedulers_signals(open_workers):
    """A scheduler signals every process of a job before it preempts the job."""
    executor = open_workers(1)
    executor.reset(tasks(0, 1))
    replies = executor.step({0: "signals", 1: "terminate"})
    assert replies[0].turn.observation == "1: signals"
    assert replies[1].turn.observation == "signal -15"  # SIGTERM ends its forks as usual


@pytest.mark.slow
def test_closing_leaves_no_processes_files_or_descriptors(open_workers, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    me = psutil.Process()
    before = me.num_fds()
    executor = open_workers(3)
    running = set(pids(executor, range(5)).values())
    assert len(running) == 3
    executor.close()
    executor.close()
    assert all(not psutil.pid_exists(pid) for pid in running)  # not even a zombie
    assert me.num_fds() == before
    assert list((tmp_path / "tmp").iterdir()) == []
    assert executor.reset(tasks(0))[0].turn.observation == "0: task-0"  # a closed pool can be used again


PARENT = """
import os, sys, time
sys.path.insert(0, {modules!r})
from aem_exp.envs import Task
from aem_exp.envs.workers import WorkerPool
pool = WorkerPool({make!r}, 2, 1000)
pool.reset({{0: Task("a"), 1: Task("b")}})
print(*[reply.turn.observation for reply in pool.step({{0: "pid", 1: "pid"}}).values()], flush=True)
{then}
"""


def start_parent(modules, mischief, then):
    """Start another process with two workers. Returns the process and the pids of the workers."""
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
    """One worker is idle and ends at once; the other one is in a step that never returns."""
    child, running = start_parent(modules, mischief, 'pool.step({0: "hang"})')
    assert len(running) == 2
    assert wait_for((tmp_path / f"busy-{running[0]}").exists, SECONDS)
    child.kill()
    child.communicate()
    assert wait_for(lambda: gone(running[1]), SECONDS)
    assert (tmp_path / "closed").read_text() == "1\n"
    assert wait_for(lambda: gone(running[0]), worker_process.GRACE_SECONDS + SECONDS)


@pytest.mark.slow
def test_ctrl_c_ends_workers_quietly(modules, mischief, tmp_path):
    child, running = start_parent(modules, mischief, 'pool.step({0: "hang 1", 1: "hang 1"})')
    assert wait_for((tmp_path / f"busy-{running[0]}").exists, SECONDS)
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=SECONDS)
    assert child.returncode == -signal.SIGINT
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt") == 1
    assert all(gone(pid) for pid in running)


@pytest.mark.slow
def test_after_ctrl_c_late_replies_are_not_confused_with_new_ones(modules, mischief, tmp_path):
    then = """
    try:
        pool.step({0: "hang 1", 1: "hang 1"})
    except KeyboardInterrupt:
        print([pool.reset({slot: Task("again")})[slot].turn.observation for slot in (0, 1)])
    """
    child, running = start_parent(modules, mischief, then)
    assert wait_for((tmp_path / f"busy-{running[0]}").exists, SECONDS)
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=SECONDS) == ("['0: again', '0: again']\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("then", ["", "del pool", "raise SystemExit(0)"])
def test_workers_that_were_never_closed_end_with_the_interpreter(modules, mischief, tmp_path, then):
    child, running = start_parent(modules, mischief, then)
    _, errors = child.communicate(timeout=SECONDS)
    assert (child.returncode, errors) == (0, "")
    assert all(gone(pid) for pid in running)
    assert (tmp_path / "closed").read_text() == "1\n1\n"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_of_the_parent_does_not_end_its_workers(modules, mischief):
    then = """
    if os.fork() == 0:
        sys.exit()  # runs the exit handlers
    os.wait()
    print([reply.error for reply in pool.step({0: "one"}).values()])
    """
    child, _ = start_parent(modules, mischief, then)
    assert child.communicate(timeout=SECONDS) == ("['']\n", "")


@pytest.mark.slow
def test_threads_do_not_wait_for_the_workers_of_other_threads(open_workers):
    """Two workers, and a thread for each slot: a hung step delays only the slots of its own worker."""
    executor = open_workers(2, seconds=HANG_SECONDS)
    executor.reset(tasks(0, 1, 2, 3))
    replies = {}

    def play(slot, response):
        replies[slot] = executor.step({slot: response})[slot]

    playing = [BackgroundCall(play, slot, "hang" if slot == 0 else "hello") for slot in (0, 1, 3)]
    for each in playing:
        each.end()
    assert "hung" in replies[0].error and not replies[1].error and not replies[3].error
    assert [*replies][-1] == 0, "the hung step must end last"
    assert not executor.step({2: "hello"})[2].error, "the other slot of that worker must be replayed"


@pytest.mark.slow
def test_closing_ends_the_steps_of_other_threads(open_workers, tmp_path):
    executor = open_workers(2)
    executor.reset(tasks(0, 1))
    stepping = [BackgroundCall(executor.step, {slot: "hang 1"}) for slot in range(2)]
    assert wait_for(lambda: len(list(tmp_path.glob("busy-*"))) == 2, SECONDS)
    executor.close()
    for each in stepping:
        with contextlib.suppress(Exception):  # an interrupted step may raise anything
            each.end(SECONDS)
        assert not each.busy


# Workers behind a command that runs them elsewhere.


def write_prefix(folder, text):
    """A script that stands in front of a worker's command, like srun or ssh."""
    script = folder / "prefix"
    script.write_text(f"#!/bin/bash\n{text}\n")
    script.chmod(0o755)
    return [str(script)]


@pytest.mark.slow
def test_workers_behind_a_prefix_give_the_replies_of_a_serial_executor(household, tmp_path):
    """Also if the prefix prints a banner and runs the worker in another folder, without the environment's variables."""
    make, play, expected = household
    prefix = write_prefix(tmp_path, 'echo "Welcome to the cluster"; cd /; exec env -i PATH="$PATH" "$@"')
    assert play(WorkerPool(make, 3, SECONDS, prefix)) == expected


@pytest.mark.slow
def test_a_worker_behind_ssh_gets_quoted_words_and_the_folders_of_data(mischief, tmp_path, monkeypatch):
    """ssh joins the words of the command, and the shell of the other node splits them again."""
    monkeypatch.setenv("AEM_CACHE", "/shared/my cache")
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text('#!/bin/bash\n[[ $1 == node1 ]] || exit 255\nexec env -i PATH="$PATH" sh -c "${*:2}"\n')
    ssh.chmod(0o755)
    executor = WorkerPool(mischief, 1, SECONDS, [str(ssh), "node1"])
    assert not executor.reset(tasks(0))[0].error
    seen = json.loads(executor.step({0: "look"})[0].turn.observation)["environ"]
    assert (seen["AEM_CACHE"], seen["OMP_NUM_THREADS"]) == ("/shared/my cache", "1")
    executor.close()


@pytest.mark.slow
def test_what_a_library_prints_does_not_disturb_the_messages(mischief):
    executor = WorkerPool(mischief, 1, SECONDS)
    executor.reset(tasks(0))
    assert not executor.step({0: "print"})[0].error
    assert not executor.step({0: "hello"})[0].error
    executor.close()


@pytest.mark.slow
def test_a_worker_behind_a_prefix_that_dies_or_hangs_is_replaced(mischief, tmp_path):
    prefix = write_prefix(tmp_path, '"$@"; exit 3')  # not exec: the prefix outlives the worker for a moment
    executor = WorkerPool(mischief, 2, HANG_SECONDS, prefix)
    before = pids(executor, [0, 1])
    assert "exit code 3" in executor.step({0: "kill"})[0].error
    assert pids(executor, [0, 1])[1] == before[1]
    assert "hung" in executor.step({1: "hang"})[1].error
    assert not executor.reset(tasks(1))[1].error
    executor.close()
    assert wait_for(lambda: gone(before[1]), SECONDS)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo 'Permission denied (publickey).' >&2; exit 255", r"exit code 255\) Permission denied"),
        ("exec cat", "closed its connection|no answer|without end"),
        ("yes", "prints without end"),
        ("echo hello", r"exit code 0\)"),
    ],
    ids=["refused", "echo", "endless", "ends"],
)
def test_a_prefix_that_starts_no_worker_is_one_sentence(mischief, tmp_path, monkeypatch, script, error):
    monkeypatch.setattr(workers, "START_SECONDS", 3.0)
    with pytest.raises(ConfigError, match=error):
        WorkerPool(mischief, 1, SECONDS, write_prefix(tmp_path, script)).reset(tasks(0))


def test_a_prefix_without_a_program_is_refused(mischief):
    with pytest.raises(ConfigError, match=r"launch\.worker_prefix=/no/srun: /no/srun cannot be started"):
        WorkerPool(mischief, 1, SECONDS, ["/no/srun"]).reset(tasks(0))


@pytest.mark.slow
def test_a_node_that_sees_other_files_is_refused(mischief, tmp_path, monkeypatch):
    """A copy of the package stands for the local disk of another node."""
    copy = tmp_path / "node"
    shutil.copytree(disk.PACKAGE, copy / "aem_exp", ignore=shutil.ignore_patterns("__pycache__", "_bundled"))
    prefix = write_prefix(tmp_path, f'exec "${{@/PYTHONPATH=*/PYTHONPATH={copy}}}"')
    executor = WorkerPool(mischief, 1, SECONDS, prefix)
    assert not executor.reset(tasks(0))[0].error  # the same files
    executor.close()
    with (copy / "aem_exp" / "envs" / "worker_process.py").open("a") as file:
        file.write("# newer\n")
    with pytest.raises(ConfigError, match="another version of aem_exp"):
        WorkerPool(mischief, 1, SECONDS, prefix).reset(tasks(0))
    missing = worker_process.describe_files(["/no/such/folder"]) | {"folders": ["/no/such/folder"]}
    monkeypatch.setattr(workers, "describe_files", lambda path: missing)
    with pytest.raises(ConfigError, match="has no /no/such/folder"):
        WorkerPool(mischief, 1, SECONDS, write_prefix(tmp_path, 'exec "$@"')).reset(tasks(0))
