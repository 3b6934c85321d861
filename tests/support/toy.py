"""A toy world for tests of training: short episodes in which different responses of a random policy earn different rewards."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from aem_exp import advantages, schedules, tiny
from aem_exp.config import Env, Experiment, Launch, Trainer
from aem_exp.envs import Task, Turn
from aem_exp.envs.executor import SerialExecutor
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.sampling.agreement import Agreement
from aem_exp.rollout.sampling.base import SamplingParams
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.rollout.sampling.weight_sync import FilePublisher
from aem_exp.rollout.types import Episode
from aem_exp.training.arguments import build_grpo_config
from aem_exp.training.callback import AEMCallback
from aem_exp.training.credit import CreditRules
from aem_exp.training.dynamic_sampling import DynamicSampling
from aem_exp.training.modulation import ModulationVariant
from aem_exp.training.step_counter import StepCounter
from aem_exp.training.token_selection import ALL_TOKENS
from aem_exp.training.trainer import AEMTrainer, RolloutSource, TrainerHooks
from aem_exp.training.updates import UpdateSettings
from aem_exp.training.weight_agreement import CheckedPublisher

WORDS = [chr(ord("a") + i) for i in range(12)]

_NUMBERS = itertools.count()  # each trainer gets its own folder; the processes of one distributed run share theirs


class Chatter:
    """Plays 1 to 4 turns. The response decides the reward, and a response that starts with `a` is invalid."""

    goal = "talk"

    def __init__(self, breaks: bool = False) -> None:
        self.breaks = breaks

    def parse(self, response: str) -> str:
        return response[:5]

    def reset(self, task: Task) -> Turn:
        self.left = self.turns = task.seed % 4 + 1
        return self._turn("hello " + WORDS[task.seed % 12])

    def step(self, response: str) -> Turn:
        self.left -= 1
        if self.breaks and response.startswith("b"):
            raise ValueError("the world broke")
        return self._turn("go " + (response[:1] or "z"), sum(map(ord, response)) % 7 / 7, self.left == 0, response)

    def close(self) -> None: ...

    def _turn(self, text: str, reward: float = 0.0, over: bool = False, response: str = "z") -> Turn:
        won = {"won": float(reward > 0.5)}
        return Turn(text, reward, terminated=over, valid=not response.startswith("a"), actions=("a", "b"), metrics=won)


class ChatterWorld:
    fingerprint = "toy"
    splits = ("train", "dev", "test")

    def __init__(self, breaks: bool = False) -> None:
        self.breaks = breaks

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(f"{split}-{i}", i, kind=f"turns{i % 4 + 1}") for i in range(16)]

    def env(self) -> Chatter:
        return Chatter(self.breaks)

    def words(self) -> list[str]:
        return ["hello", "go", "z", *WORDS]


def env(history: str, **changes: Any) -> Env:
    prompt = {
        "first": "{observation}",
        "next": "{observation}",
        "window": "{history} {observation}",
        "pair": "{observation} {action}",
    }
    rules = Env("toy", {}, history, 2 if history == "window" else 0, 4, 5, 120, prompt=prompt)
    return replace(rules, **changes)


def experiment(history: str = "full", **trainer: Any) -> Experiment:
    settings: dict[str, Any] = {
        "steps": 2,
        "tasks_per_step": 4,
        "group_size": 4,
        "mini_batch": "all",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "loss_type": "dapo",
        "epsilon": 0.2,
        "optim": "adamw_torch_fused",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "beta": 0.0,
        "temperature": 1.0,
        "bf16": False,
        "use_bias_correction_kl": False,
    }
    return Experiment(
        name="toy", env=env(history), trainer=Trainer(**settings | trainer), launch=Launch(trainer={"use_cpu": True})
    )


def policy(folder: Path, history: str = "full", seed: int = 0) -> tuple[Any, Any]:
    """A random tiny Qwen3 and its tokenizer. The model is saved once per test session and loaded again at each call."""
    from transformers import AutoModelForCausalLM

    rules = env(history)
    tokenizer = tiny.make_tokenizer(ChatterWorld().words(), rules)
    target = folder / f"policy-{history}-{seed}"
    if not target.exists():
        torch.manual_seed(seed)
        tiny.make_policy(tokenizer, rules, 32, 2, 2, 0.3).save_pretrained(target)
    return AutoModelForCausalLM.from_pretrained(target), tokenizer


def draw(step: int, number: int = 0, seed: int = 0, tasks: int = 4, group: int = 4) -> list[Episode]:
    chosen = ChatterWorld().tasks("train")
    return [
        Episode(
            chosen[((step + 7 * number) * tasks + d) % 16], d + number * tasks, m, (seed, step, d + number * tasks, m)
        )
        for d in range(tasks)
        for m in range(group)
    ]


def checked_publisher(
    servers: Any, tokenizer: Any, exact: bool = True, publisher: Any = FilePublisher, context_tokens: int = 120
) -> CheckedPublisher:
    """Publishes weights to servers and checks that they use them."""
    return CheckedPublisher(publisher(servers), Agreement(len(tokenizer), context_tokens), exact=exact)


def trainer(
    folder: Path,
    run: Experiment,
    *,
    lam: float | None = None,
    estimator: Any = None,
    kind: type[AEMTrainer] = AEMTrainer,
    **changes: Any,
) -> Any:
    """A trainer on the toy world, of the class `kind`. `changes` are its keywords, or fields of the parts in its keywords."""
    loaded, tokenizer = policy(folder, run.env.history)
    model = changes.pop("model", loaded)
    chat = Chat(tokenizer)
    callback = AEMCallback(StepCounter(run.trainer.steps), schedules.Constant(lam) if lam is not None else None)
    settings: dict[str, Any] = {
        "draw": draw,
        "rollout": Rollout(SerialExecutor(ChatterWorld()), run.env, chat),
        "make_sampler": lambda trainer: LocalSampler(trainer.model, chat.end_ids, SamplingParams()),
        "estimator": estimator or advantages.group_normalised,
        "mini_batch": 0 if run.trainer.mini_batch == "all" else run.trainer.mini_batch,
        "epochs": run.trainer.num_iterations,
        "variant": ModulationVariant(),
        "token_rules": ALL_TOKENS,
        "trust_sampler": True,
    } | changes
    parts = {
        "source": RolloutSource,
        "dynamic_sampling": DynamicSampling,
        "credit_rules": CreditRules,
        "update_settings": UpdateSettings,
        "hooks": TrainerHooks,
    }
    grouped = {
        name: part(**{f.name: settings.pop(f.name) for f in fields(part) if f.name in settings})
        for name, part in parts.items()
    }
    return kind(
        model,
        build_grpo_config(run, folder / f"out-{os.getppid()}-{next(_NUMBERS)}"),
        tokenizer,
        callback=callback,
        **grouped,
        **settings,
    )
