"""The time of a training step without its rollout: AEMTrainer against TRL's unmodified GRPOTrainer, on the same rows.

    .venv/bin/python tests/bench/train_step.py [--device-rows 0 16] [--rounds 31]

The rows come from the first step of the default experiment (64 episodes, full history, the warm-started tiny policy). All arms
start from the same weights and repeat the same update, interleaved, on one thread. The bench prints medians of CPU time, and of
the ratio to TRL in the same round. On a busy machine, two equal arms still differ by several percent between runs. Therefore the
time to build the batch, in which the arms do differ, is also printed separately; forward pass, backward pass and optimizer are
the same code.

    AEM             AEMTrainer with modulation=aem; the sampler measures the entropies
    no modulation   AEMTrainer with modulation=none
    TRL             GRPOTrainer(rollout_func=...); the function returns the rows immediately, the reward is their return

Timed for AEMTrainer: `iterate_updates()` from the trajectories to the micro-batches (credit, rows, packing, the sampler's
log-probs and entropies, coefficients, advantages, weights, metrics), then `training_step` (forward and backward passes).
Timed for TRL: `training_step` of each micro-batch; the first one builds the batch (rows, padding, rewards, advantages, TRL's
metrics, shuffling). Timed for both: gradient clipping, AdamW, zeroing the gradients.
Not timed: the training loop of transformers, logging and saving, which are equal for all arms; and our comparison of sampler and
trainer, which is one forward pass of one micro-batch every 50 steps.

No arm scores old log-probs, because all rows form one update, as in TRL by default. Loss, clips, group size, optimizer and rows
per micro-batch are equal. The bench asserts that, without modulation, the norms of the first gradients are equal too. Several
micro-batches differ in their rows: TRL shuffles the rows and pads all to the longest one, we sort them by length.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

TARGET = 1.05
# Makes one step; returns its CPU seconds, the CPU seconds to build the batch, and the norm of the gradient.
Arm = Callable[[], tuple[float, float, float]]


def prepare(device_rows: int) -> tuple[Any, Callable[[], tuple[Any, Any]], Any, list[Any]]:
    """The default experiment with one update per step, a loader of its policy, its rollout, and its first trajectories."""
    from aem_exp import config, policy
    from aem_exp.envs import opening
    from aem_exp.envs.executor import SerialExecutor
    from aem_exp.rollout.chat import Chat
    from aem_exp.rollout.play import Rollout
    from aem_exp.rollout.sampling.base import SamplingParams
    from aem_exp.rollout.sampling.local import LocalSampler
    from aem_exp.run import session

    # TRL adds 1e-4 to the standard deviation; our default is 1e-6.
    overrides = [
        "trainer.mini_batch=all",
        f"launch.device_rows={device_rows}",
        "baseline.advantage.eps=1e-4",
        "tracking=off",
    ]
    experiment = config.load(overrides)
    world = opening.open_world(experiment)
    load = partial(policy.load, experiment.model, policy.make_cached(experiment, world), experiment.seed)
    model, tokenizer = load()
    chat = Chat(tokenizer)
    rollout = Rollout(SerialExecutor(world), experiment.env, chat)
    episodes = session.draw_episodes(experiment, world.tasks("train"), 0, 0)
    return experiment, load, rollout, rollout.play(episodes, LocalSampler(model, chat.end_ids, SamplingParams()))


def ours(experiment: Any, load: Any, rollout: Any, played: list[Any], folder: Path, modulated: bool) -> Arm:
    from aem_exp import config
    from aem_exp.rollout.sampling.base import SamplingParams
    from aem_exp.rollout.sampling.local import LocalSampler
    from aem_exp.training.build import build_trainer
    from aem_exp.training.callback import AEMCallback
    from aem_exp.training.dynamic_sampling import PlayedStep
    from aem_exp.training.step_counter import StepCounter
    from aem_exp.training.trainer import RolloutSource

    model, tokenizer = load()
    modulation = experiment.modulation if modulated else config.load(["modulation=none"]).modulation
    lam = config.instantiate(modulation.lam) if modulated else None
    counter = StepCounter(10**6, step=1)  # at step 0, the trainer also compares the sampler with a scoring pass
    trainer = build_trainer(
        replace(experiment, modulation=modulation),
        folder,
        model,
        tokenizer,
        AEMCallback(counter, lam, modulation.gate),
        RolloutSource(
            draw=lambda step, number: [],
            rollout=rollout,
            make_sampler=lambda trainer: LocalSampler(trainer.model, rollout.chat.end_ids, SamplingParams()),
        ),
    )
    trainer.play = lambda step: PlayedStep(played, [], 1)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    updates = trainer.iterate_updates()

    def step() -> tuple[float, float, float]:
        start = time.process_time()
        update = next(updates)
        batch = time.process_time() - start
        trainer.training_step(trainer.model, update)
        norm = finish(trainer)
        seconds = time.process_time() - start
        assert ("aem/lam" in trainer.aem_callback.metrics) == modulated
        counter.step = counter.step % 49 + 1  # skips the comparisons at multiples of 50
        clear_metrics(trainer)
        return seconds, batch, norm

    return step


def plain(experiment: Any, load: Any, rollout: Any, played: list[Any], folder: Path) -> Arm:
    """Unmodified TRL: one generation batch per optimizer step, with as many micro-batches as ours."""
    from datasets import Dataset
    from trl import GRPOTrainer

    from aem_exp.rollout import rows as episodes
    from aem_exp.training.arguments import build_grpo_config

    model, tokenizer = load()
    rows = episodes.build_rows(played, "full")
    micro = experiment.launch.device_rows or len(rows)
    micros, odd = divmod(len(rows), micro)
    assert not odd, f"{len(rows)} rows do not divide by {micro}"
    answer = {
        "prompt_ids": [row.prompt for row in rows],
        "completion_ids": [row.completion for row in rows],
        "env_mask": [row.mask for row in rows],
        "logprobs": None,
        "ret": [played[row.trajectory].ret for row in rows],
    }

    def replay(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return dict(answer)

    def returned(prompts: list[str], ret: list[float], **_: Any) -> list[float]:
        return ret

    args = build_grpo_config(experiment, folder)
    args.per_device_train_batch_size, args.generation_batch_size = micro, len(rows)
    args.gradient_accumulation_steps = args.steps_per_generation = micros
    data = Dataset.from_dict({"prompt": ["x"] * len(rows)})
    trainer = GRPOTrainer(model, returned, args, data, processing_class=tokenizer, rollout_func=replay)
    trainer.current_gradient_accumulation_steps = micros
    trainer.model.train()
    trainer.create_optimizer()
    prepare_inputs, batch_seconds = trainer._prepare_inputs, []

    def timed_prepare_inputs(inputs: Any) -> Any:
        start = time.process_time()
        out = prepare_inputs(inputs)
        batch_seconds.append(time.process_time() - start)
        return out

    trainer._prepare_inputs = timed_prepare_inputs

    def step() -> tuple[float, float, float]:
        inputs = [{"prompt": "x"} for _ in rows]
        batch_seconds.clear()
        start = time.process_time()
        for _ in range(micros):
            trainer.training_step(trainer.model, inputs, None)
        norm = finish(trainer)
        seconds = time.process_time() - start
        clear_metrics(trainer)
        return seconds, sum(batch_seconds), norm

    return step


def finish(trainer: Any) -> float:
    """Clip the gradient, step the optimizer and zero the gradients; return the norm of the gradient."""
    norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return float(norm)


def clear_metrics(trainer: Any) -> None:
    """Clear TRL's metrics, which its logging would do."""
    for metrics in trainer._metrics.values():
        metrics.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device-rows", type=int, nargs="+", default=[0, 16], help="rows per micro-batch; 0: all")
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    import conftest  # noqa: F401  (sets environment variables first)
    import torch

    from aem_exp.core import console

    console.silence_libraries()
    torch.set_num_threads(1)
    for device_rows in arguments.device_rows:
        experiment, *parts = prepare(device_rows)
        with tempfile.TemporaryDirectory() as folder:
            arms = {
                "TRL": plain(experiment, *parts, Path(folder) / "trl"),
                "no modulation": ours(experiment, *parts, Path(folder) / "none", modulated=False),
                "AEM": ours(experiment, *parts, Path(folder) / "aem", modulated=True),
            }
            first = {name: step()[2] for name, step in arms.items()}
            assert abs(first["no modulation"] / first["TRL"] - 1) < 1e-4, f"the updates differ: {first}"
            times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in arms}
            for number in range(arguments.rounds):
                names = list(arms) if number % 2 else list(arms)[::-1]
                for name in names:
                    times[name].append(arms[name]())
        lengths = [sum(len(r.prompt) + len(r.sample.ids) for r in t.responses) for t in parts[2]]
        size = f"{len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens"
        print(f"{size}, {device_rows or 'all'} per micro-batch, medians of {arguments.rounds} rounds")
        median, trl = statistics.median, times["TRL"]
        for name, values in times.items():
            step, batch = 1e3 * median(v[0] for v in values), 1e3 * median(v[1] for v in values)
            ratios = sorted(ours[0] / theirs[0] for ours, theirs in zip(values, trl, strict=True))
            half = f"half of the rounds within [{ratios[len(ratios) // 4]:.2f}, {ratios[-len(ratios) // 4]:.2f}]"
            target = f" (target: at most {TARGET})" if name == "AEM" else ""
            ratio = f"   {median(ratios):5.3f} x TRL, {half}{target}" if name != "TRL" else ""
            print(f"  {name:<14} {step:6.1f} ms, of which {batch:5.1f} ms for the batch{ratio}", flush=True)


if __name__ == "__main__":
    main()
