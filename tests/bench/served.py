"""What it gains that episodes wait for nobody, where a server generates and environments take their time.

    .venv/bin/python tests/bench/served.py [--episodes 32] [--turns 6] [--rounds 3]

One run, the same server, worker processes, episodes and seeds for both, in turns:
    in step     all live episodes generate, then all environments step: each waits for the slowest of a turn
    by itself   each episode goes on when its own environment has answered

The server really generates, with a tiny policy, one request at a time; each answer takes `--answer` seconds more, together for
all that wait, as a GPU's batch does. An environment takes 50 to 200 ms a step, as its task and turn decide. Both play the same
tokens, which the bench asserts. `idle` is the share of the play in which no request was in flight.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

LOW, HIGH = 0.05, 0.2  # seconds of an environment's step


class InStep:
    """A sampler that is not known to be independent."""

    def __init__(self, sampler):
        self.session = sampler.session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer", type=float, default=0.1)
    asked = parser.parse_args()
    import conftest  # noqa: F401  (environment first)
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
    chat, rules = Chat(tokenizer), toy.env("full", max_turns=asked.turns, context_tokens=40 * asked.turns)
    tasks = delayed_world.DelayedWorld().tasks("train")
    episodes = [Episode(tasks[n % len(tasks)], n, 0, ("bench", n)) for n in range(asked.episodes)]
    make = {"_target_": "support.delayed_world.DelayedWorld", "low": LOW, "high": HIGH, "turns": asked.turns}
    with CompletionsServer(folder / "policy-full-0") as server:
        (folder / "urls").write_text(server.url)
        server.seconds = asked.answer
        servers = Servers(folder, 60.0)
        sampler, stage = (
            ServerSampler(servers, chat.end_ids, SamplingParams(), vocabulary=len(chat.tokenizer)),
            WorkerPool(make, asked.episodes, 60.0),
        )
        stage.reset({slot: episode.task for slot, episode in enumerate(episodes)})  # processes start
        ways = {"in step": InStep(sampler), "by itself": sampler}
        walls, idle, said = {way: [] for way in ways}, {way: [] for way in ways}, {}
        for number in range(asked.rounds + 1):
            for way, sampling in ways.items():
                rollout = Rollout(stage, rules, chat)
                start = time.perf_counter()
                played = rollout.play(episodes, sampling)
                seconds, spent = time.perf_counter() - start, rollout.clock.read()
                said[way] = [[r.sample.ids for r in t.responses] for t in played]
                if number:  # the first round warms up
                    walls[way].append(seconds)
                    idle[way].append(spent["environment"] / (spent["environment"] + spent["generation"]))
            assert said["in step"] == said["by itself"]
        stage.close()
        servers.cancel()
    how = f"{asked.episodes} episodes of {asked.turns} turns, answers of {asked.answer * 1000:.0f} ms and more"
    print(f"{how}, steps of {LOW * 1000:.0f} to {HIGH * 1000:.0f} ms, medians of {asked.rounds} rounds")
    for way in ways:
        print(f"  {way:<10} {statistics.median(walls[way]):6.2f} s   idle {statistics.median(idle[way]):5.1%}")
    ratios = [a / b for a, b in zip(walls["in step"], walls["by itself"], strict=True)]
    print(f"  by itself is {statistics.median(ratios):.2f} x as fast [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
