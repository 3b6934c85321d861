"""`aem-exp offer`: OpenEnv's own client, and our adapter, play a world of ours as it is played in process."""

import http.server
import json
import signal
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from random import Random

import pytest
from support.openenv_service import OpenEnvServer
from support.runs import needs

from aem_exp import offer
from aem_exp.config import instantiate, load
from aem_exp.core.errors import ConfigError
from aem_exp.envs.executor import SerialExecutor
from aem_exp.envs.workers import WorkerPool

needs("openenv")
pytestmark = pytest.mark.machine


def start_server(*words, port=None):
    """The command in a process of its own."""
    return OpenEnvServer("-m", "aem_exp.offer", "env=household", *words, "--port", port=port)


@pytest.fixture(scope="module")
def server():
    running = start_server("--sessions", "16")
    yield running
    running.stop(signal.SIGTERM)


@pytest.fixture(scope="module")
def household():
    return instantiate(load(["env=household"]).env.make)


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def play_in_process(world, task, seed, turns=8):
    env, random = world.env(), Random(seed)
    played = [env.reset(task)]
    while not played[-1].done and len(played) <= turns:
        played.append(env.step(random.choice(played[-1].actions)))
    return env.goal, played


def play_as_client(url, choices, turns=8, **start):
    """The results of an episode. `choices` seeds the random actions."""
    from openenv.core.generic_client import GenericEnvClient

    random = Random(choices)
    with GenericEnvClient(base_url=url, message_timeout_s=120).sync() as session:
        results = [session.reset(**start)]
        while not results[-1].done and len(results) <= turns:
            results.append(session.step({"text": random.choice(results[-1].observation["actions"])}))
    return results


def check_same(results, goal, turns):
    assert len(results) == len(turns)
    for result, turn in zip(results, turns, strict=True):
        seen = result.observation
        assert (seen["text"], seen["goal"], tuple(seen["actions"])) == (turn.observation, goal, turn.actions)
        assert (result.reward, result.done, seen["truncated"]) == (turn.reward, turn.done, turn.truncated)
        assert (seen["valid"], seen["metrics"]) == (turn.valid, turn.metrics)


def test_sixteen_sessions_of_the_client_play_what_is_played_in_process(server, household):
    with ThreadPoolExecutor(16) as threads:
        played = [threads.submit(play_as_client, server.url, index, split="test", index=index) for index in range(16)]
    for index, future in enumerate(played):
        check_same(future.result(), *play_in_process(household, household.tasks("test")[index], index))
    check_same(play_as_client(server.url, 5, seed=7), *play_in_process(household, household.tasks("train")[7], 5))


def test_the_task_api_lists_the_tasks_of_the_world(server, household):
    url = f"{server.url}/household"
    with urllib.request.urlopen(f"{url}/splits", timeout=60) as answer:
        types = {entry["name"]: entry["type"] for entry in json.load(answer)}
    assert types == {"train": "train", "dev": "validation", "test": "test"}
    assert post(f"{url}/num_tasks", {"split": "train"}) == {"num_tasks": 4096}
    last = household.tasks("test")[127]
    assert post(f"{url}/task", {"split": "test", "index": 127})["task"] == {
        "id": last.id,
        "index": 127,
        "kind": last.kind,
    }
    assert len(post(f"{url}/tasks", {"split": "train"})["tasks"]) == 1000
    tasks = post(f"{url}/task_range", {"split": "dev", "start": 3, "stop": 5})["tasks"]
    assert [task["index"] for task in tasks] == [3, 4]
    for body in ({"split": "exam"}, {"split": "dev"}):
        with pytest.raises(urllib.error.HTTPError):
            post(f"{url}/task", body | {"index": 128})


def test_wrong_requests_are_answered_and_leave_the_server_running(server):
    from openenv.core.generic_client import GenericEnvClient

    with GenericEnvClient(base_url=server.url).sync() as session:
        with pytest.raises(RuntimeError, match="reset first"):
            session.step({"text": "look"})
        with pytest.raises(RuntimeError, match="no split 'exam'"):
            session.reset(split="exam")
        with pytest.raises(RuntimeError, match="no task 128"):
            session.reset(split="dev", index=128)
        session.reset(split="dev", index=0)
        with pytest.raises(RuntimeError, match="no task -1"):
            session.reset(split="dev", index=-1)
        with pytest.raises(RuntimeError, match="reset first"):  # never the episode before the failed reset
            session.step({"text": "look"})
    assert play_as_client(server.url, 0, split="dev", index=0)


def open_adapter(url, **changes):
    return instantiate(load(["env=openenv"]).env.make | {"base_url": url} | changes)


def test_the_adapter_has_the_panels_and_turns_of_the_world(server, household):
    world = open_adapter(server.url)
    assert world.splits == household.splits
    assert [len(world.tasks(split)) for split in world.splits] == [4096, 128, 128]
    env, random = world.env(), Random(3)
    turns = [env.reset(world.tasks("dev")[9])]
    goal, expected = play_in_process(household, household.tasks("dev")[9], 3)
    assert env.goal == goal
    while not turns[-1].done and len(turns) <= 8:
        turns.append(env.step(random.choice(turns[-1].actions)))
    assert turns == expected
    env.close()
    with pytest.raises(ConfigError) as caught:
        open_adapter(server.url, sizes={"dev": 3})
    assert caught.value.field == "env.make.sizes"


def test_a_response_that_is_not_sent_has_no_metrics_of_the_response_before(server):
    world = open_adapter(server.url, tags=True)
    env = world.env()
    env.reset(world.tasks("dev")[0])
    sent, unsent = env.step("<think></think><action>look</action>"), env.step("look")
    env.close()
    assert (sent.valid, sent.metrics["format_valid"], sent.metrics["admissible"]) == (True, 1.0, 1.0)
    assert (unsent.valid, unsent.metrics["format_valid"], unsent.metrics["admissible"]) == (False, 0.0, 0.0)
    assert unsent.actions == sent.actions and unsent.metrics["won"] == 0


def test_more_sessions_than_the_server_has_are_named(server):
    world = open_adapter(server.url)
    executor = SerialExecutor(world)
    replies = executor.reset({slot: world.tasks("dev")[slot] for slot in range(17)})
    failed = [reply.error for reply in replies.values() if reply.turn is None]
    executor.close()
    assert len(failed) == 1 and "no free session" in failed[0] and "--sessions" in failed[0]


def test_a_lost_session_is_not_silently_replaced():
    """OpenEnv's client would open a new session at the next step, in another game."""
    running = start_server()
    world = open_adapter(running.url)
    env = world.env()
    env.reset(world.tasks("dev")[0])
    assert env.step("look").valid
    running.stop(signal.SIGTERM)
    restarted = start_server(port=running.port)
    for _ in range(3):
        with pytest.raises(Exception, match=r"."):
            env.step("look")
    first = env.reset(world.tasks("dev")[0])
    assert first.observation == world.env().reset(world.tasks("dev")[0]).observation
    restarted.stop(signal.SIGTERM)


def test_a_worker_process_that_hangs_fails_one_request(tmp_path, monkeypatch):
    """The sessions share the executor of a training run, which replaces a hung environment."""
    from fastapi.testclient import TestClient

    (tmp_path / "sleepy.py").write_text(
        "import time\nfrom aem_exp.envs import Task, Turn\n"
        "class World:\n"
        "    fingerprint, splits, goal = 'sleepy', ('train', 'dev', 'test'), 'wake up'\n"
        "    def tasks(self, split): return [Task(f'{split}-{i}', i) for i in range(3)]\n"
        "    def env(self): return World()\n"
        "    def parse(self, response): return response\n"
        "    def reset(self, task): return Turn('zzz')\n"
        "    def step(self, response):\n"
        "        time.sleep(3600 if response == 'sleep' else 0)\n"
        "        return Turn('ok')\n"
        "    def close(self): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    make = {"_target_": "sleepy.World"}
    with closing(WorkerPool(make, 1, 5.0)) as executor:
        app = offer.make_app(instantiate(make), "sleepy", executor, 4)
        with TestClient(app) as client, client.websocket_connect("/ws") as socket:

            def ask(kind, **data):
                socket.send_text(json.dumps({"type": kind, "data": data}))
                return socket.receive_json()

            assert ask("reset", split="dev", index=1)["type"] == "observation"
            assert ask("step", text="hello")["data"]["observation"]["text"] == "ok"
            failed = ask("step", text="sleep")
            assert failed["type"] == "error" and "5 s" in failed["data"]["message"]
            assert ask("step", text="hello")["type"] == "error"
            assert ask("reset", split="dev", index=1)["type"] == "observation"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server(number):
    running = start_server("launch.workers=1")
    play_as_client(running.url, 0, split="dev", index=0)
    shown = running.stop(number)
    assert running.process.returncode in (0, 128 + signal.SIGINT)
    assert f"env.make.base_url={running.url}" in shown and "128 test" in shown


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["trainer.steps=3"], "KEY=VALUE=trainer.steps=3: "),
        (["household"], "KEY=VALUE=household: "),
        (["env=household", "--port", "0"], "--port=0: "),
        (["env=household", "--sessions", "0"], "--sessions=0: "),
        (["env=household", "--host", "192.0.2.1"], "--port=8000: cannot listen on 192.0.2.1"),
        (["env=houshold"], "env=houshold: did you mean household?"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_an_error_of_one_line(words, error, capsys):
    assert offer.main(words) == 2
    out, err = capsys.readouterr()
    assert not out and error in err and len(err.splitlines()) == 1


def test_a_port_in_use_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as used:
        assert offer.main(["env=household", "--port", str(used.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_a_server_of_another_kind_is_refused(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(ConfigError, match="does not describe an environment"):
            open_adapter(f"http://127.0.0.1:{other.server_address[1]}")
        other.shutdown()
