"""Warm start: supervised training of a policy on episodes before the first step, so that it succeeds at times.

`imitate` trains on episodes of the scripted player of the environment. `own_successes` trains on the episodes in which the
policy itself succeeds (rejection sampling), which keeps its own way of speaking. The result is cached by its content: the
initial weights, the environment, the settings and the code.
"""

import json
import logging
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Final

from aem_exp import policy
from aem_exp.config import ConfigError, Env, Experiment, WarmStart
from aem_exp.core import disk, extras
from aem_exp.core.console import PRINT_SECONDS, format_duration
from aem_exp.core.errors import RunError
from aem_exp.envs import World

log = logging.getLogger("aem_exp")
MODEL: Final = "model"  # subfolder of the weights
FACTS: Final = "warm_start.json"
PLAYED: Final = "played.json"  # of an unfinished warm start: the first measurement, and the rows to train on
MEASURED_GROUPS, MEASURED_MEMBERS = 4, 4  # groups of training tasks that are played before and after
AT_ONCE: Final = 64  # episodes that the policy plays at the same time, unless launch.device_episodes limits them
_CODE: Final = (
    "warm_start.py",
    "demonstrations.py",
    "training/imitation.py",
)  # decide the result, besides the settings
Report = Callable[[str], None]


@dataclass(frozen=True)
class WarmStarted:
    """The initial weights of a run after its warm start."""

    weights: str
    """Folder of the weights."""
    facts: dict[str, Any] | None = None
    """What was trained and measured; None without a warm start."""


def check_world(experiment: Experiment, world: World) -> None:
    """Refuse imitation in an environment without a scripted player."""
    if experiment.warm_start.method == "imitate" and not hasattr(world, "expert"):
        remedy = f"env {experiment.env.name} has no scripted player (method expert) to imitate"
        raise ConfigError("warm_start.method", "imitate", f"{remedy}; use warm_start=own_successes or warm_start=none")


def cached(experiment: Experiment, world: World, weights: str) -> WarmStarted | None:
    """The initial weights of a run if they need no work: without a warm start, or from the cache; else None."""
    if experiment.warm_start.method is None:
        return WarmStarted(weights)
    folder = cache_folder(experiment, world, weights)
    return _read(folder) if folder.exists() else None


def make_cached(experiment: Experiment, world: World, weights: str, report: Report) -> WarmStarted:
    """The initial weights of a run, trained once and cached. Without a warm start: `weights`.

    Args:
        weights: folder of the weights of the model.
        report: receives a line about the progress from time to time.

    Raises:
        ConfigError: the environment has no scripted player, or its responses are longer than `env.response_tokens`.
        RunError: the policy never succeeded (`own_successes`), or the loss is not finite.
    """
    if experiment.warm_start.method is None:
        return WarmStarted(weights)
    check_world(experiment, world)
    extras.require_training("warm_start.method", experiment.warm_start.method, "a warm start")
    folder = cache_folder(experiment, world, weights)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    with disk.create_folder_once(folder) as part:
        if part is not None:
            report(f"warm start ({experiment.warm_start.method}): only once; it is cached in {folder}")
            _make(experiment, world, weights, part, unfinished, report)
    shutil.rmtree(unfinished, ignore_errors=True)
    return _read(folder)


def cache_folder(experiment: Experiment, world: World, weights: str) -> Path:
    """The folder of the result in the cache, named by its content."""
    model, digest = experiment.model, sha256()
    for name in _CODE:
        digest.update((disk.PACKAGE / name).read_bytes())
    recipe = {
        "weights": policy.fingerprint(weights),
        "model": {key: getattr(model, key) for key in ("dtype", "system", "thinking")},
        "env": {key: value for key, value in asdict(experiment.env).items() if key != "name"},
        "world": world.fingerprint,
        "warm_start": {key: value for key, value in asdict(experiment.warm_start).items() if key != "name"},
        "bf16": experiment.trainer.bf16,
        "code": digest.hexdigest(),
    }
    key = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return disk.cache_dir() / "warm_starts" / f"{model.name}-{key}"


def gated_share(measured: dict[str, Any], gate: float) -> float:
    """Share of the measured groups that a gate (in nats) leaves unmodulated: their responses span less entropy than it."""
    return fmean(span < gate or span == 0 for span in measured["entropy_spans"])


def _read(folder: Path) -> WarmStarted:
    facts = disk.read_json(folder / FACTS, "before", "after", "weights")
    return WarmStarted(str(folder / MODEL), facts)


def _make(experiment: Experiment, world: World, weights: str, part: Path, unfinished: Path, report: Report) -> None:
    """Play, train and measure; write the weights and the facts into `part`.

    Args:
        unfinished: keeps the rows and the checkpoints of the training after an interruption.
    """
    import torch

    settings, launch, begun = experiment.warm_start, experiment.launch, time.monotonic()
    if launch.threads:
        torch.set_num_threads(launch.threads)
    cpu_before = _cpu_seconds()
    with _Session(experiment, world, weights) as session:
        if interrupted := (unfinished / PLAYED).exists():
            report("warm start: continuing the interrupted one")
            played = disk.read_json(unfinished / PLAYED, "before", "rows")
        else:
            played = session.prepare(settings, report)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            disk.write_atomically(unfinished / PLAYED, json.dumps(played))
        before, rows = played["before"], played["rows"]
        updates = session.train(rows, unfinished, report)
        report("warm start: playing the same tasks again")
        after = session.measure()
        report(f"warm start: after, {describe_measured(after)}")
        session.save(part / MODEL)
    facts = {
        "method": settings.method,
        "episodes": settings.episodes,
        "rows": len(rows),
        "updates": updates,
        "interrupted": interrupted,  # then the times are those since the last start
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(_cpu_seconds() - cpu_before, 1),
        "before": before,
        "after": after,
        "weights": policy.fingerprint(part / MODEL),
    }
    disk.write_atomically(part / FACTS, json.dumps(facts, indent=1) + "\n")


def describe_measured(measured: dict[str, Any]) -> str:
    """A measurement in words."""
    return (
        f"on {measured['episodes']} training episodes: success {measured['success']:.0%}, "
        f"invalid turns {measured['invalid_share']:.0%}, "
        f"response entropy {measured['response_entropy']:.2f} nats, {measured['response_tokens']:.0f} tokens per response"
    )


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _mean_tokens(rows: Sequence[Any]) -> float:
    return fmean(len(row.prompt) + len(row.completion) for row in rows)


class _Session:
    """The policy with its environments: it plays, learns and is saved."""

    def __init__(self, experiment: Experiment, world: World, weights: str) -> None:
        from aem_exp.envs.workers import make_executor
        from aem_exp.rollout.chat import Chat
        from aem_exp.rollout.play import Rollout

        self.experiment, self.world = experiment, world
        self.device = policy.select_device(experiment.launch)
        # An adapter is merged afterwards, so the run does not see it. All weights are trained in float32.
        model = replace(experiment.model, lora=experiment.warm_start.lora, dtype="float32")
        self.model, self.tokenizer = policy.load(model, weights, experiment.warm_start.seed)
        self.chat = Chat(self.tokenizer, experiment.model.system, experiment.model.thinking)
        executor = make_executor(world, experiment.env.make, experiment.launch)
        self.rollout = Rollout(executor, experiment.env, self.chat, experiment.launch.device_episodes or AT_ONCE)

    def __enter__(self) -> "_Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.rollout.close()

    def prepare(self, settings: WarmStart, report: Report) -> dict[str, Any]:
        """Measure the policy as it is, and play the episodes to train on; return both as JSON values."""
        report(f"warm start: playing {MEASURED_GROUPS * MEASURED_MEMBERS} episodes, to measure the policy as it is")
        before = self.measure()
        report(f"warm start: before, {describe_measured(before)}")
        report(f"warm start: playing {settings.episodes:,} episodes to train on")
        rows, played = self.play(settings)
        report(f"warm start: {played}; {len(rows):,} rows of {_mean_tokens(rows):.0f} tokens")
        return {"before": before, "rows": [[row.prompt, row.completion, row.mask] for row in rows]}

    def measure(self) -> dict[str, Any]:
        """Play a few groups of training tasks at temperature 1; return success, validity and entropies."""
        from aem_exp.rollout.types import Ending

        episodes = self._draw("measure", MEASURED_GROUPS, MEASURED_MEMBERS)
        played = [t for t in self._play(episodes, 1.0) if t.responses and t.ended != Ending.CRASHED]
        if not played:
            raise RunError("every episode that the warm start played crashed", "env")
        groups: dict[int, list[float]] = {}
        for trajectory in played:
            groups.setdefault(trajectory.draw, []).extend(r.entropy or 0.0 for r in trajectory.responses)
        responses = [r for t in played for r in t.responses]
        return {
            "episodes": len(played),
            "success": fmean(t.won for t in played),
            "invalid_share": fmean(not r.valid for r in responses),
            "response_entropy": fmean(value for values in groups.values() for value in values),
            "response_tokens": fmean(len(r.sample.ids) for r in responses),
            "entropy_spans": [max(values) - min(values) for values in groups.values()],
        }

    def play(self, settings: WarmStart) -> tuple[list[Any], str]:
        """Play the episodes to train on; return their rows and a description."""
        from aem_exp.demonstrations import play_scripted
        from aem_exp.rollout.rows import build_rows

        episodes, env = self._draw("play", settings.episodes, 1), self.experiment.env
        if settings.method == "imitate":
            random = Random(settings.seed)
            chosen, _ = play_scripted(self.world, env, self.chat, episodes, settings.noise, 0.0, random)
            check_lengths(chosen, env)
            solved = sum(t.won for t in chosen)
            told = f"the scripted player solved {solved:.0f} of {len(chosen)} episodes"
        else:
            chosen = [t for t in self._play(episodes, settings.temperature) if t.won]
            told = f"{len(chosen)} of {len(episodes)} episodes succeeded"
            if not chosen:
                raise RunError(f"warm start: {told}; imitate a scripted player first (warm_start=imitate)", "env")
        return build_rows(chosen, env.history), told

    def train(self, rows: Sequence[Sequence[list[int]]], folder: Path, report: Report) -> int:
        """Train on the responses in the rows, each with its prompt, completion and mask; return the number of updates."""
        from aem_exp.rollout.rows import Row
        from aem_exp.training import imitation

        experiment, settings = self.experiment, self.experiment.warm_start
        launch = experiment.launch
        chosen = imitation.ImitationSettings(
            epochs=settings.epochs,
            batch=settings.batch,
            learning_rate=settings.learning_rate,
            device_rows=launch.device_rows,
            device_tokens=launch.device_tokens,
            seed=settings.seed,
            use_cpu=not launch.gpus_per_node,
            bf16=experiment.trainer.bf16,
            gradient_checkpointing=bool(launch.trainer.get("gradient_checkpointing", False)),
        )
        made = [Row(prompt, completion, mask, [], [], 0, []) for prompt, completion, mask in rows]
        return imitation.train_on_rows(self.model, self.tokenizer, made, chosen, folder, _Progress(report))

    def save(self, folder: Path) -> None:
        """Save the weights, with the adapter merged, in the data type of the model."""
        import torch

        merged = self.model.merge_and_unload() if hasattr(self.model, "merge_and_unload") else self.model
        policy.save(merged.to(getattr(torch, self.experiment.model.dtype)), self.tokenizer, folder)

    def _draw(self, purpose: str, groups: int, members: int) -> list[Any]:
        """Episodes on training tasks, drawn without replacement as long as there are tasks."""
        from aem_exp.rollout.sampling.base import keyed_generator
        from aem_exp.rollout.types import Episode

        key = (self.experiment.warm_start.seed, "warm_start", purpose)
        tasks = self.world.tasks("train")
        order = keyed_generator(key).permutation(len(tasks))
        return [
            Episode(tasks[int(order[draw % len(tasks)])], draw, member, (*key, draw, member))
            for draw in range(groups)
            for member in range(members)
        ]

    def _play(self, episodes: Sequence[Any], temperature: float) -> list[Any]:
        from aem_exp.rollout.sampling.base import SamplingParams
        from aem_exp.rollout.sampling.local import LocalSampler

        self.model.to(self.device)
        sampler = LocalSampler(self.model, self.chat.end_ids, SamplingParams(temperature))
        return self.rollout.play(episodes, sampler)


def check_lengths(played: Sequence[Any], env: Env) -> None:
    """Refuse responses of the scripted player that the policy could not generate within its budget."""
    longest = max(len(r.sample.ids) for t in played for r in t.responses)
    if longest > env.response_tokens:
        remedy = f"must be at least {longest}: the longest response of the scripted player with this tokenizer"
        raise ConfigError("env.response_tokens", env.response_tokens, remedy)


class _Progress:
    """Reports the updates from time to time, with the remaining time.

    Raises:
        RunError: the loss is not finite.
    """

    def __init__(self, report: Report) -> None:
        self.report, self.printed = report, time.monotonic()

    def __call__(self, update: int, updates: int, loss: float, left: float) -> None:
        if not abs(loss) < float("inf"):
            raise RunError(f"warm start: the loss is {loss} at update {update}; lower warm_start.learning_rate", "nan")
        if time.monotonic() - self.printed < PRINT_SECONDS and update != updates:
            return
        self.printed = time.monotonic()
        self.report(f"warm start: update {update}/{updates}, loss {loss:.3f}, {format_duration(left)} left")
