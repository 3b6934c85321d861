"""Episodes per second of our rollout, against the two ways that TRL offers. Medians of interleaved rounds, one thread.

    .venv/bin/python tests/bench/rollout.py [--hidden 256] [--turns 6 30] [--rounds 3]

    ours                    Rollout with LocalSampler: one KV cache for the whole episode
    rollout_func            what such a function is usually: each turn, TRL's `generate` reads the whole history again
    environment_factory     TRL's tool loop: the same, and a chat template and a parser for each turn of each episode;
                            with Qwen3's template, which puts the tools into the prompt, and with the barest one there can be

What is the same for all:
    policy      equal weights (a random Qwen3 of two layers), temperature 1, no filters
    world       one observation of some 24 words per turn, random words of the task and the turn alone; it never ends, so all
                episodes are live for all turns. Its steps cost microseconds
    tokens      a hook on the policy's last layer puts every special token at -10,000: nobody samples an end token, so each
                response is exactly as long as its budget, which the bench asserts
    history     full: what a turn reads are all tokens so far

What is timed: from the tasks to the exact tokens of all finished episodes; resets, rendering, generation, parsing and steps.
TRL's padding and rewards afterwards are not. Qwen3's template reads more tokens, which the table shows. All else that is not
equal helps the alternatives: a tool call is the whole response instead of JSON in tags, the last response in the tool loop
is never played, its turns lack the end token that ours get where they are cut, the tokenizer splits at words, and no
alternative measures log-probs and entropies, which ours does.
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
TOKENS = 8  # of a response, as in conf/env/household.yaml
OBSERVATION = 24  # words
WORDS = [a + b for a in "bdfgklmnpr" for b in "aeiou"]
FUNCTION, TOOLS, BARE = "rollout_func", "environment_factory", "environment_factory, bare"
WANTED = {(FUNCTION, 6): 1.5, (FUNCTION, 30): 3.0, (TOOLS, 6): 3.0, (TOOLS, 30): 3.0}

# tiny's ChatML, and what TRL asks of a template with tools: calls and answers are shown. An answer looks like a user's message.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ 'user' if message.role == 'tool' else message.role }}\n"
    "{{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Whatever the policy says is one call of `act`.
CALL = {"type": "function", "function": {"name": "act", "arguments": {"text": "{content}"}}}
PARSER = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant",
    "fields": {"tool_calls": {"content": "text", "repeats": True, "transform": CALL}},
}


class Talk:
    """A world and its environment: talks for ever, in words that follow from the task and the turn."""

    fingerprint, goal = "talk", "talk"

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}-{i}", i) for i in range(EPISODES)]

    def env(self) -> "Talk":
        return Talk()

    def parse(self, response: str) -> str:
        return response

    def reset(self, task: Task) -> Turn:
        self.task, self.turn = task, 0
        return self._say()

    def step(self, response: str) -> Turn:
        self.turn += 1
        return self._say()

    def close(self) -> None: ...

    def _say(self) -> Turn:
        return Turn(" ".join(Random(1000 * self.task.seed + self.turn).choices(WORDS, k=OBSERVATION)))


class TalkByTools:
    """The same environment as TRL's tool loop wants it."""

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


Contender = Callable[[], tuple[float, int, int]]  # plays all episodes: seconds, tokens sampled, tokens of all rows


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
    """A rollout_func, called as TRL calls it, on TRL's own `generate`."""
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
            said, _ = trainer._generate_single_turn(rows, None, {}, 1)
            for env, row, mask, ids in zip(envs, rows, masks, said, strict=True):
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
    """TRL's tool loop under the template that TRL trains Qwen3 with."""
    from trl.chat_template_utils import qwen3_training_chat_template

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = qwen3_training_chat_template
    return by_bare_tools(policy, tokenizer, rules)


def by_bare_tools(policy: Any, tokenizer: Any, rules: Any) -> Contender:
    """TRL's tool loop, with as many responses as the others have."""
    tokenizer.response_template = PARSER
    trainer = trl_trainer(policy, tokenizer, rules, environment_factory=TalkByTools)
    generate, done = trainer._generate, []

    def timed(prompts: list[Any]) -> Any:
        out = generate(prompts)
        done.append(time.perf_counter())  # padding and rewards come after
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


def trl_trainer(policy: Any, tokenizer: Any, rules: Any, **how: Any) -> Any:
    """TRL's own trainer, unmodified; its folder stays empty, as nothing is trained."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=EPISODES,
        num_generations=GROUP,
        max_completion_length=rules.context_tokens,  # TRL's is the budget of the episode
        generation_kwargs={"max_new_tokens": rules.response_tokens},  # ... and this that of a turn
        max_tool_calling_iterations=rules.max_turns - 1,
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"prompt": [""] * EPISODES})
    trainer = GRPOTrainer(policy, args=args, train_dataset=rows, processing_class=tokenizer, **how)
    trainer.model.train()  # as in training
    return trainer


def _no_reward(prompts: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(prompts)


CONTENDERS = {"ours": ours, FUNCTION: by_function, TOOLS: by_tools, BARE: by_bare_tools}


def contenders(turns: int, hidden: int) -> tuple[dict[str, Contender], int]:
    """All that compete, each with its own copy of one policy, and the size of that."""
    import torch

    from aem_exp import tiny
    from aem_exp.config import Env

    prompt = dict.fromkeys(("first", "next", "window"), "{observation}") | {"pair": "{observation} {action}"}
    context = turns * (OBSERVATION + TOKENS + 12) + 300  # enough for all: tags of tools, and their schema
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


def measure(competing: dict[str, Contender], turns: int, rounds: int) -> dict[str, tuple[list[float], float]]:
    """Seconds of each, round by round, and the tokens of an episode; the first round warms up."""
    times: dict[str, tuple[list[float], float]] = {}
    for number in range(rounds + 1):
        for name, play in competing.items():
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
    asked = parser.parse_args()
    import conftest  # noqa: F401  (environment first)
    import torch

    torch.set_num_threads(1)
    for turns in asked.turns:
        competing, size = contenders(turns, asked.hidden)
        times = measure(competing, turns, asked.rounds)
        ours_median = statistics.median(times["ours"][0])
        policy = f"hidden {asked.hidden} ({size / 1e6:.2f} M parameters)"
        print(f"{turns} turns of {TOKENS} tokens, {EPISODES} episodes, {policy}, medians of {asked.rounds} rounds")
        for name, (values, length) in times.items():
            median = statistics.median(values)
            speed = f"{EPISODES / median:6.1f} episodes/s"
            line = (
                f"{name:<26} {median:6.2f} s [{min(values):.2f}, {max(values):.2f}] {speed}, {length:6.1f} tokens each"
            )
            ratio = f"   ours is {median / ours_median:5.2f} x as fast" if name != "ours" else ""
            wanted = f" (wanted: {WANTED[name, turns]})" if (name, turns) in WANTED else ""
            print(f"  {line}{ratio}{wanted}", flush=True)


if __name__ == "__main__":
    main()
