"""Episodes per second of our rollout, against the two methods of TRL. Medians of interleaved rounds on one thread.

    .venv/bin/python tests/bench/rollout.py [--hidden 256] [--turns 6 30] [--rounds 3]

    ours                    Rollout with LocalSampler: one KV cache for the whole episode
    rollout_func            a typical function: in each turn, TRL's `generate` reads the whole history again
    environment_factory     TRL's tool loop: the same, plus a chat template and a parser for each turn of each episode; with
                            Qwen3's template, which puts the tools into the prompt, and with a minimal template

Equal for all:
    policy      equal weights (a random Qwen3 with two layers), temperature 1, no filters
    environment one observation of 24 words per turn, random words that depend on the task and the turn only. Episodes never end,
                so all are live in all turns. A step takes microseconds
    tokens      a hook on the last layer sets the logits of all special tokens to -10,000. No end token is sampled, so each
                response is exactly as long as its budget; the bench asserts this
    history     full: each turn reads all tokens so far

Timed: everything from the tasks to the exact tokens of all finished episodes, that is resets, rendering, generation, parsing and
steps. TRL's padding and rewards are not timed. Qwen3's template reads more tokens; the table shows this. All other differences
help the alternatives: a tool call is the whole response instead of JSON in tags, the tool loop never plays the last response, its
turns lack the end token that our cut responses get, the tokenizer splits at words, and only our rollout measures log-probs and
entropies.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from aem_exp.envs import Task, Turn

EPISODES, GROUP = 32, 8
TOKENS = 8  # tokens of a response, as in conf/env/household.yaml
OBSERVATION = 24  # words of an observation
WORDS = [a + b for a in "bdfgklmnpr" for b in "aeiou"]
FUNCTION, TOOLS, BARE = "rollout_func", "environment_factory", "environment_factory, bare"
TARGETS = {(FUNCTION, 6): 1.5, (FUNCTION, 30): 3.0, (TOOLS, 6): 3.0, (TOOLS, 30): 3.0}

# The ChatML of aem_exp.tiny, plus tool calls and tool answers, which TRL requires. A tool answer looks like a user message.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}\n"
    "{{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Each response is parsed as one call of `act`.
CALL = {"type": "function", "function": {"name": "act", "arguments": {"text": "{content}"}}}
PARSER = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant",
    "fields": {"tool_calls": {"content": "text", "repeats": True, "transform": CALL}},
}


class Talk:
    """A world and its environment that never ends; its words depend on the task and the turn only."""

    fingerprint, goal = "talk", "talk"

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}-{i}", i) for i in range(EPISODES)]

    def env(self) -> "Talk":
        return Talk()

    def parse(self, response: str) -> str:
        return response

    def reset(self, task: Task) -> Turn:
        self.task, self.turn = task, 0
        return self._turn()

    def step(self, response: str) -> Turn:
        self.turn += 1
        return self._turn()

    def close(self) -> None: ...

    def _turn(self) -> Turn:
        return Turn(" ".join(Random(1000 * self.task.seed + self.turn).choices(WORDS, k=OBSERVATION)))


class TalkByTools:
    """The same environment with the interface of TRL's tool loop."""

    def __init__(self) -> None:
        self._env = Talk()

    def reset(self, seed: int, **_: Any) -> str:
        return self._env.reset(Task("", seed)).observation

    def act(self, text: str) -> str:
        """Say something.

        Args:
            text: What to say.
        """
        return self._env.step(text).observation

    def get_reward(self) -> float:
        return 0.0


Contender = Callable[
    [], tuple[float, int, int]
]  # plays all episodes; returns seconds, sampled tokens, tokens of all rows


def ours(policy: Any, tokenizer: Any, rules: Any) -> Contender:
    from aem_exp.envs.executor import SerialExecutor
    from aem_exp.rollout.chat import Chat
    from aem_exp.rollout.play import Rollout
    from aem_exp.rollout.sampling.base import SamplingParams
    from aem_exp.rollout.sampling.local import LocalSampler
    from aem_exp.rollout.types import Episode

    world, chat = Talk(), Chat(tokenizer)
    rollout, sampler = Rollout(SerialExecutor(world), rules, chat), LocalSampler(policy, chat.end_ids, SamplingParams())
    episodes = [Episode(task, task.seed // GROUP, task.seed % GROUP, (task.seed,)) for task in world.tasks("train")]

    def play() -> tuple[float, int, int]:
        start = time.perf_counter()
        played = rollout.play(episodes, sampler)
        seconds = time.perf_counter() - start
        return (
            seconds,
            sum(t.tokens for t in played),
            sum(len(r.prompt) + len(r.sample.ids) for t in played for r in t.responses),
        )

    return play


def by_function(policy: Any, tokenizer: Any, rules: Any) -> Contender:
    """A `rollout_func`, called as TRL calls it, that uses TRL's `generate`."""
    from aem_exp.rollout.chat import Chat

    chat = Chat(tokenizer)

    def rollout_func(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        envs = [Talk() for _ in prompts]
        rows = [
            chat.first_prompt(env.reset(Task("", int(prompt))).observation)
            for env, prompt in zip(envs, prompts, strict=True)
        ]
        starts, masks = [len(row) for row in rows], [[] for _ in rows]
        for turn in range(rules.max_turns):
            responses, _ = trainer._generate_single_turn(rows, None, {}, 1)
            for env, row, mask, ids in zip(envs, rows, masks, responses, strict=True):
                row += ids
                mask += [1] * len(ids)
                observation = env.step(chat.decode(ids)).observation
                if turn + 1 < rules.max_turns:
                    follow = chat.next_prompt(observation, ids[-1])
                    row += follow
                    mask += [0] * len(follow)
        pairs = list(zip(rows, starts, strict=True))
        completions = [row[start:] for row, start in pairs]
        return {
            "prompt_ids": [r[:s] for r, s in pairs],
            "completion_ids": completions,
            "env_mask": masks,
            "logprobs": None,
        }

    trainer = trl_trainer(policy, tokenizer, rules, reward_funcs=_no_reward, rollout_func=rollout_func)
    prompts = [str(seed) for seed in range(EPISODES)]

    def play() -> tuple[float, int, int]:
        start = time.perf_counter()
        out = trainer.rollout_func(prompts, trainer)
        seconds = time.perf_counter() - start
        return seconds, sum(map(sum, out["env_mask"])), sum(map(len, out["prompt_ids"] + out["completion_ids"]))

    return play


def by_tools(policy: Any, tokenizer: Any, rules: Any) -> Contender:
    """TRL's tool loop with TRL's training template for Qwen3."""
    from trl.chat_template_utils import qwen3_training_chat_template

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = qwen3_training_chat_template
    return by_bare_tools(policy, tokenizer, rules)


def by_bare_tools(policy: Any, tokenizer: Any, rules: Any) -> Contender:
    """TRL's tool loop with the minimal template, and with as many responses as the other methods."""
    tokenizer.response_template = PARSER
    trainer = trl_trainer(policy, tokenizer, rules, environment_factory=TalkByTools)
    generate, done = trainer._generate, []

    def timed(prompts: list[Any]) -> Any:
        out = generate(prompts)
        done.append(time.perf_counter())  # padding and rewards follow and are not timed
        return out

    trainer._generate = timed
    inputs = [{"prompt": [{"role": "user", "content": ""}], "seed": seed} for seed in range(EPISODES)]

    def play() -> tuple[float, int, int]:
        start = time.perf_counter()
        out = trainer._generate_and_score_completions(inputs)
        sampled, length = (
            out["tool_mask"] * out["completion_mask"],
            out["prompt_mask"].sum() + out["completion_mask"].sum(),
        )
        return done.pop() - start, int(sampled.sum()), int(length)

    return play


def trl_trainer(policy: Any, tokenizer: Any, rules: Any, **settings: Any) -> Any:
    """TRL's unmodified trainer. Its output folder stays empty, because nothing is trained."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=EPISODES,
        num_generations=GROUP,
        max_completion_length=rules.context_tokens,  # the token budget of an episode
        generation_kwargs={"max_new_tokens": rules.response_tokens},  # the token budget of a turn
        max_tool_calling_iterations=rules.max_turns - 1,
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"prompt": [""] * EPISODES})
    trainer = GRPOTrainer(policy, args=args, train_dataset=rows, processing_class=tokenizer, **settings)
    trainer.model.train()  # the mode in which a trainer generates
    return trainer


def _no_reward(prompts: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(prompts)


CONTENDERS = {"ours": ours, FUNCTION: by_function, TOOLS: by_tools, BARE: by_bare_tools}


def make_contenders(turns: int, hidden: int) -> tuple[dict[str, Contender], int]:
    """All methods, each with its own copy of the policy, and the number of parameters of the policy."""
    import torch

    from aem_exp import tiny
    from aem_exp.config import Env

    prompt = dict.fromkeys(("first", "next", "window"), "{observation}") | {"pair": "{observation} {action}"}
    context = turns * (OBSERVATION + TOKENS + 12) + 300  # includes the tool tags and the tool schema
    rules = Env("talk", {}, "full", 0, turns, TOKENS, context, prompt=prompt)
    tokenizer = tiny.make_tokenizer(WORDS, rules)
    tokenizer.chat_template = TEMPLATE
    special = torch.tensor(tokenizer.all_special_ids)
    out: dict[str, Contender] = {}
    for name, make in CONTENDERS.items():
        torch.manual_seed(0)
        policy = tiny.make_policy(tokenizer, rules, hidden, 2, 4, 0.1)
        policy.lm_head.register_forward_hook(lambda head, inputs, logits: logits.index_fill(-1, special, -1e4))
        out[name] = make(policy, tokenizer, rules)
    return out, sum(p.numel() for p in policy.parameters())


def measure(contenders: dict[str, Contender], turns: int, rounds: int) -> dict[str, tuple[list[float], float]]:
    """Seconds per round, and mean tokens of an episode, of each method. An additional first round is the warm-up."""
    times: dict[str, tuple[list[float], float]] = {}
    for number in range(rounds + 1):
        for name, play in contenders.items():
            seconds, sampled, length = play()
            assert sampled == EPISODES * turns * TOKENS, f"{name} sampled {sampled} tokens"
            if number == 0:
                times[name] = [], length / EPISODES
            else:
                times[name][0].append(seconds)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--turns", type=int, nargs="+", default=[6, 30])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    import conftest  # noqa: F401  (sets environment variables first)
    import torch

    torch.set_num_threads(1)
    for turns in arguments.turns:
        contenders, size = make_contenders(turns, arguments.hidden)
        times = measure(contenders, turns, arguments.rounds)
        ours_median = statistics.median(times["ours"][0])
        policy = f"hidden {arguments.hidden} ({size / 1e6:.2f} M parameters)"
        print(f"{turns} turns of {TOKENS} tokens, {EPISODES} episodes, {policy}, medians of {arguments.rounds} rounds")
        for name, (values, length) in times.items():
            median = statistics.median(values)
            speed = f"{EPISODES / median:6.1f} episodes/s"
            line = (
                f"{name:<26} {median:6.2f} s [{min(values):.2f}, {max(values):.2f}] {speed}, {length:6.1f} tokens each"
            )
            ratio = f"   ours is {median / ours_median:5.2f} x as fast" if name != "ours" else ""
            target = f" (target: {TARGETS[name, turns]})" if (name, turns) in TARGETS else ""
            print(f"  {line}{ratio}{target}", flush=True)


if __name__ == "__main__":
    main()
