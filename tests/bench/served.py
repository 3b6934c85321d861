"""The speed-up of independent episodes over lockstep, with a server that generates and slow environments.

    .venv/bin/python tests/bench/served.py [--episodes 32] [--turns 6] [--rounds 3]

Two modes alternate in one process, with the same server, worker processes, episodes and seeds:
    lockstep      all live episodes generate, then all environments step: each episode waits for the slowest one in each turn
    independent   each episode continues as soon as its own environment has answered

The server generates with a tiny policy, one request at a time. Each answer takes `--answer` seconds longer; these delays overlap
for concurrent requests, as in a batch on a GPU. An environment step takes 50 to 200 ms, depending on task and turn. Both modes
play the same tokens; the bench asserts this. `idle` is the share of the time in which no request is in progress.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

LOW, HIGH = 0.05, 0.2  # seconds of an environment step


class LockstepSampler:
    """Hides the interface of an independent sampler, so that episodes advance in lockstep."""

    def __init__(self, sampler):
        self.session = sampler.session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer", type=float, default=0.1)
    arguments = parser.parse_args()
    import conftest  # noqa: F401  (sets environment variables first)
    import torch
    from support import delayed_world, toy
    from support.completions_server import CompletionsServer

    from aem_exp.envs.workers import WorkerPool
    from aem_exp.rollout.chat import Chat
    from aem_exp.rollout.play import Rollout
    from aem_exp.rollout.sampling.base import SamplingParams
    from aem_exp.rollout.sampling.vllm import ServerSampler
    from aem_exp.rollout.sampling.vllm_client import Servers
    from aem_exp.rollout.types import Episode

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    _, tokenizer = toy.policy(folder)
    chat, rules = Chat(tokenizer), toy.env("full", max_turns=arguments.turns, context_tokens=40 * arguments.turns)
    tasks = delayed_world.DelayedWorld().tasks("train")
    episodes = [Episode(tasks[n % len(tasks)], n, 0, ("bench", n)) for n in range(arguments.episodes)]
    make = {"_target_": "support.delayed_world.DelayedWorld", "low": LOW, "high": HIGH, "turns": arguments.turns}
    with CompletionsServer(folder / "policy-full-0") as server:
        (folder / "urls").write_text(server.url)
        server.seconds = arguments.answer
        servers = Servers(folder, 60.0)
        sampler = ServerSampler(servers, chat.end_ids, SamplingParams(), vocabulary=len(chat.tokenizer))
        workers = WorkerPool(make, arguments.episodes, 60.0)
        workers.reset({slot: episode.task for slot, episode in enumerate(episodes)})  # start the processes
        modes = {"lockstep": LockstepSampler(sampler), "independent": sampler}
        times, idle, tokens = {mode: [] for mode in modes}, {mode: [] for mode in modes}, {}
        for number in range(arguments.rounds + 1):
            for mode, mode_sampler in modes.items():
                rollout = Rollout(workers, rules, chat)
                start = time.perf_counter()
                played = rollout.play(episodes, mode_sampler)
                seconds, spent = time.perf_counter() - start, rollout.clock.read()
                tokens[mode] = [[r.sample.ids for r in t.responses] for t in played]
                if number:  # the first round is the warm-up
                    times[mode].append(seconds)
                    idle[mode].append(spent["environment"] / (spent["environment"] + spent["generation"]))
            assert tokens["lockstep"] == tokens["independent"]
        workers.close()
        servers.cancel()
    size = f"{arguments.episodes} episodes of {arguments.turns} turns"
    delays = f"answers of at least {arguments.answer * 1000:.0f} ms, steps of {LOW * 1000:.0f} to {HIGH * 1000:.0f} ms"
    print(f"{size}, {delays}, medians of {arguments.rounds} rounds")
    for mode in modes:
        print(f"  {mode:<12} {statistics.median(times[mode]):6.2f} s   idle {statistics.median(idle[mode]):5.1%}")
    ratios = [a / b for a, b in zip(times["lockstep"], times["independent"], strict=True)]
    print(f"  independent is {statistics.median(ratios):.2f} x as fast [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
