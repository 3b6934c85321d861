"""Trains and scores the policy in one process of a run: score the panel, train, score again.

If several processes share a run, all of them play and train; only the first one writes records (see `recorder`).
"""

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from aem_exp import config, policy
from aem_exp.cluster import distributed
from aem_exp.cluster.signals import Interrupted, Pruned, Signals
from aem_exp.config import Experiment
from aem_exp.core import disk
from aem_exp.core.errors import RunError
from aem_exp.envs import Task
from aem_exp.envs.workers import make_executor
from aem_exp.evaluate.panels import MAX_PANEL_EPISODES
from aem_exp.jobs.sizes import GB
from aem_exp.rollout.play import Rollout, Watcher
from aem_exp.rollout.sampling.base import SamplingParams, keyed_generator
from aem_exp.rollout.types import Episode
from aem_exp.run import scoring
from aem_exp.run.context import LoadedPolicy, RunContext, load_policy
from aem_exp.run.memory_check import MemoryCheck
from aem_exp.run.recorder import RunRecorder
from aem_exp.run.serving import SamplerFactory, build_publisher, choose_sampler, connect_servers
from aem_exp.rundir import BEFORE, DIVERGED, MODEL, checkpoints
from aem_exp.stats.scores import Score
from aem_exp.training import fsdp
from aem_exp.training.build import build_trainer
from aem_exp.training.callback import AEMCallback
from aem_exp.training.credit import MeasuredCredit
from aem_exp.training.step_counter import StepCounter
from aem_exp.training.trainer import NO_HOOKS, AEMTrainer, RolloutSource, TrainerHooks

log = logging.getLogger("aem_exp")


@contextmanager
def open_session(
    context: RunContext, recorder: RunRecorder, signals: Signals, watcher: Watcher | None
) -> Iterator["RunSession"]:
    """Load the policy, start the environments, connect to the servers and build the trainer; close them at the end."""
    experiment, launch = context.experiment, context.experiment.launch
    if launch.threads:
        torch.set_num_threads(launch.threads)
    memory = MemoryCheck(context)
    loaded = load_policy(context)
    executor = make_executor(context.world, experiment.env.make, launch)
    rollout = Rollout(executor, experiment.env, loaded.chat, launch.device_episodes, watcher)
    with closing(rollout), connect_servers(launch, context.folder) as servers:
        make_sampler = choose_sampler(context, loaded, servers, watcher.token if watcher else None)
        publish = build_publisher(context, loaded, servers)
        yield RunSession(context, loaded, rollout, make_sampler, publish, recorder, signals, memory)


class RunSession:
    """Trains a policy, and scores it before and after training.

    Attributes:
        before: score of the policy before the first step; empty until it is known.
        scores: newest score on each panel, by split.
    """

    def __init__(
        self,
        context: RunContext,
        loaded: LoadedPolicy,
        rollout: Rollout,
        make_sampler: SamplerFactory,
        publish: Callable[[AEMTrainer], dict[str, float]] | None,
        recorder: RunRecorder,
        signals: Signals,
        memory: MemoryCheck,
    ) -> None:
        experiment, start = context.experiment, context.start
        self.context, self.loaded, self.rollout, self.make_sampler = context, loaded, rollout, make_sampler
        self.recorder, self.signals, self.memory = recorder, signals, memory
        updates = checkpoints.updates(start.checkpoint) if start.checkpoint else 0
        self.time = StepCounter(experiment.trainer.steps, start.step, experiment.parent_steps, updates)
        self.before: dict[str, Any] = {}
        self.scores: dict[str, Score] = {}
        self.final_scores = scoring.FinalScores(context)
        self.trainer = self._build_trainer(publish)

    def train_and_score(self) -> dict[str, Any]:
        """Score the panel, train, score again and save the model; return the content of `result.json`.

        Raises:
            Interrupted: a signal stopped the run; the last finished step is saved.
            RunError: the run cannot continue. If its numbers are not finite, the policy of the last finite update is scored.
        """
        settings = self.context.experiment.evaluation
        try:
            self._train()
        except RunError as error:
            if error.kind == "nan":
                self._score_diverged(error)
            raise
        after = self.scores.get(settings.panel) or self._evaluate_panel(settings.panel, recorded=True)
        final = self._evaluate_final()
        self._log_step(self.time.step, final.metrics("test/"))
        self._save_model()
        finals = self.final_scores.read()
        result = scoring.build_result(self.context, self.time, self.before, after, finals)
        return result | {"resumed": self.context.start.changes}

    # Training.

    def _build_trainer(self, publish: Callable[[AEMTrainer], dict[str, float]] | None) -> AEMTrainer:
        experiment, settings = self.context.experiment, self.context.experiment.trainer
        lam = experiment.modulation.lam
        callback = AEMCallback(
            self.time,
            config.instantiate(lam) if lam else None,
            experiment.modulation.gate,
            self._log_step,
            lambda: self._evaluate_panel(experiment.evaluation.panel).metrics("eval/"),
            experiment.evaluation.every,
            lambda: self._evaluate_final().metrics("test/"),
            config.final_steps(experiment)[:-1],  # after the last step, with the policy that is saved
            experiment.launch.save_every,
            lambda: self.recorder.is_enough or self.signals.received is not None,
            self._score_before_training,
        )
        sampling = SamplingParams(settings.temperature, settings.top_p, settings.top_k, settings.min_p or 0.0)
        source = RolloutSource(
            draw=partial(draw_episodes, experiment, self.context.world.tasks("train")),
            rollout=self.rollout,
            make_sampler=lambda trainer: self.make_sampler(trainer, sampling),
            publish=publish,
        )
        recorder, hooks = self.recorder, NO_HOOKS
        if distributed.is_main_process():
            hooks = TrainerHooks(
                record_step=self._record_training,
                before_save=partial(recorder.prepare_save, policy=self.loaded.model),
            )
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        return build_trainer(experiment, self.context.folder, model, tokenizer, callback, source, hooks)

    def _train(self) -> None:
        """Train the remaining steps. If there are none, this only loads the policy and moves it to its device."""
        start = self.context.start
        if self.time.is_finished:
            self.trainer.args.max_steps = 1  # transformers asks for one update; none is made
        with self.signals.defer():
            self.trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
        if not self.time.is_finished:
            if distributed.broadcast_from_main(lambda: self.recorder.is_enough):
                raise Pruned(f"pruned at step {self.time.step}")
            raise Interrupted(self.signals.received or signal.SIGTERM)  # only another process may have received one

    def _record_training(self, step: int, credit: MeasuredCredit) -> None:
        self.recorder.record_training(step, credit.played)
        self.memory.add_played(credit.played)

    def _log_step(self, step: int, row: dict[str, float]) -> None:
        self.recorder.log_step(step, self.time.steps, row)
        if "memory/peak_gb" in row:
            self.memory.finish_step(step, row["memory/peak_gb"] * GB, self.trainer.batch_sizes)

    def _save_model(self) -> None:
        """Save the policy in Hugging Face format, and write the record of all episodes."""
        trained = self.trainer.accelerator.unwrap_model(self.trainer.model)
        weights = fsdp.gather_state_dict(trained)
        if not distributed.is_main_process():
            return
        self.recorder.finish_episodes()
        if weights is not None:
            experiment = self.context.experiment
            trained, _ = policy.load(experiment.model, self.context.weights, experiment.seed)
            missing, _ = trained.load_state_dict(weights, strict=False)  # TRL adds an adapter for its reference policy
            assert not missing, missing
        policy.save(trained, self.loaded.tokenizer, self.context.folder / MODEL)

    # Evaluation.

    def _score_before_training(self) -> None:
        """Score the policy before the first step. A resumed run reads the saved score."""
        file = self.context.folder / BEFORE
        if self.context.start.is_scored:
            self.before = disk.read_json(file)
            if not self.time.is_finished and distributed.is_main_process():
                log.info("training from step %d of %d", self.time.step + 1, self.time.steps)
        else:
            with self.signals.interruptible():
                score = self._evaluate_panel(self.context.experiment.evaluation.panel)
            self.before = asdict(score)
            self._log_step(self.time.step, score.metrics("eval/"))
            self.recorder.write_before(file, self.time.step, self.before)
        self.recorder.tracker.wait_until_ready()

    def _evaluate_panel(self, split: str, recorded: bool = False) -> Score:
        """Score the policy on a panel. `recorded`: its episodes are already recorded."""
        sampling = SamplingParams(self.context.experiment.evaluation.temperature)
        play = partial(self.trainer.play_distributed, sampler=self.make_sampler(self.trainer, sampling))
        panel, played = scoring.play_run_panel(self.context, split, self.rollout, play)
        self.memory.add_played(played[:MAX_PANEL_EPISODES])
        if not recorded:
            self.recorder.record_panel(self.time.step, panel.name, played)
        self.scores[split] = score = scoring.score_run_panel(panel, played)
        return score

    def _evaluate_final(self) -> Score:
        """Score the policy on the final panel, and keep the score for the mean over the last steps."""
        score = self._evaluate_panel(self.context.experiment.evaluation.final)
        self.final_scores.add(self.time.step, score)
        return score

    def _score_diverged(self, reason: RunError) -> None:
        """Score the weights of the last finite update. A comparison without the runs that diverged would favour their arm."""
        log.warning("%s; evaluating the policy with the weights of the last finite update", reason)
        settings, file = self.context.experiment.evaluation, self.context.folder / DIVERGED
        if distributed.is_main_process():
            file.unlink(missing_ok=True)
        try:
            after, final = self._evaluate_panel(settings.panel), self._evaluate_panel(settings.final)
            result = scoring.build_result(self.context, self.time, self.before, after, {self.time.step: final})
        except Exception as error:  # weights that diverged can fail in any way; the caller raises the first error
            log.warning("the policy cannot be evaluated: %s", error)
            return
        self.recorder.write_diverged(file, result | {"diverged": str(reason)})


def draw_episodes(experiment: Experiment, tasks: Sequence[Task], step: int | str, number: int) -> list[Episode]:
    """Return the episodes of a sampling round: tasks drawn without replacement, with one group of episodes per task.

    Args:
        step: index of the step, or the name of a batch that is not part of the run.
    """
    settings, seed = experiment.trainer, experiment.seed
    count = settings.tasks_per_step * settings.oversample
    chosen = keyed_generator((seed, "tasks", step, number)).choice(len(tasks), count, replace=False)
    return [
        Episode(tasks[int(index)], draw, member, (seed, step, number, draw, member))
        for draw, index in enumerate(chosen, start=number * count)
        for member in range(settings.group_size)
    ]
