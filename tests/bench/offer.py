"""What it costs to play an environment through `aem-exp offer`: steps per second of the household in this process, in one worker
process, and behind an OpenEnv server with 16 sessions. Medians of interleaved rounds.

.venv/bin/python tests/bench/offer.py
"""

import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

from openenv.core.generic_client import GenericEnvClient

from aem_exp.cluster.rendezvous import find_free_port
from aem_exp.config import instantiate, load
from aem_exp.envs import World
from aem_exp.envs.executor import EnvExecutor, SerialExecutor
from aem_exp.envs.workers import WorkerPool

SESSIONS, STEPS = 16, 60


def play_executor(executor: EnvExecutor, world: World) -> float:
    """Steps per second of 16 episodes in lockstep, with random actions."""
    random, start, steps = Random(0), time.perf_counter(), 0
    tasks = {slot: world.tasks("train")[slot] for slot in range(SESSIONS)}
    replies = executor.reset(tasks)
    for _ in range(STEPS):
        over = {slot: tasks[slot] for slot, reply in replies.items() if reply.turn.done}
        replies |= executor.reset(over) if over else {}
        replies = executor.step({slot: random.choice(reply.turn.actions) for slot, reply in replies.items()})
        steps += len(replies)
    return steps / (time.perf_counter() - start)


def play_session(url: str, index: int) -> int:
    """Steps of one session."""
    random = Random(index)
    with GenericEnvClient(base_url=url).sync() as session:
        result = session.reset(split="train", index=index)
        for _ in range(STEPS):
            if result.done:
                result = session.reset(split="train", index=index)
            result = session.step({"text": random.choice(result.observation["actions"])})
    return STEPS


def play_server(url: str) -> float:
    start = time.perf_counter()
    with ThreadPoolExecutor(SESSIONS) as threads:
        steps = sum(threads.map(lambda index: play_session(url, index), range(SESSIONS)))
    return steps / (time.perf_counter() - start)


def main(rounds: int = 5) -> None:
    experiment = load(["env=household"])
    world = instantiate(experiment.env.make)
    port = find_free_port("127.0.0.1")
    command = [sys.executable, "-m", "aem_exp.offer", "env=household", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    pool = WorkerPool(experiment.env.make, 1, 60.0)
    ways = {
        "in this process": lambda: play_executor(SerialExecutor(world), world),
        "one worker process": lambda: play_executor(pool, world),
        "OpenEnv server, 16 sessions": lambda: play_server(f"http://127.0.0.1:{port}"),
    }
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None
            time.sleep(0.1)
        for play in ways.values():
            play()  # warm up
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, play in ways.items():
                speeds[name].append(play())
    finally:
        server.terminate()
        pool.close()
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, steps in medians.items():
        print(f"{name:30} {steps:8,.0f} steps/s   {steps / medians['one worker process']:.2f} x one worker process")


if __name__ == "__main__":
    main()
