"""The parts of one run, put together: score the panel, train, score again.

Where several processes share a run, all of them play and train; the first one alone keeps records.
"""

import errno
import json
import logging
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from aem_exp import config, policy, provenance
from aem_exp.cluster import distributed
from aem_exp.cluster.signals import Interrupted, Pruned, Signals
from aem_exp.config import Experiment
from aem_exp.core import disk
from aem_exp.core.errors import RunError
from aem_exp.rundir import checkpoints, metrics

log = logging.getLogger("aem_exp")
StepCallback = Callable[
    [int, int, dict[str, float]], bool | None
]  # finished steps, all steps, the last one's metrics -> enough?
BEFORE_FILE = "before.json"
DIVERGED_FILE = "diverged.json"  # the score of a run that can have no result
SPARE_BYTES = 50_000_000  # bytes for everything but weights


@dataclass(frozen=True)
class ResumePoint:
    """Where a start of a run begins, as its first process found it."""

    step: int  # steps that need not be trained again
    checkpoint: Path | None
    is_scored: bool  # the policy was scored before the first step
    changes: list[str] = field(default_factory=list)  # of code, libraries or machine since its first start

    @property
    def last_measured_step(self) -> int:
        """The last step whose measurements stand; -1 where not even the untrained policy was scored."""
        return self.step if self.checkpoint or self.is_scored else -1


def find_resume_point(folder: Path) -> ResumePoint:
    """What a run dir holds to go on from."""
    checkpoint = checkpoints.find_newest(folder)
    return ResumePoint(checkpoints.steps(checkpoint) if checkpoint else 0, checkpoint, (folder / BEFORE_FILE).exists())


def check_record(folder: Path, start: ResumePoint) -> None:
    """Refuse to go on with a run that could not be recorded to its end.

    Raises:
        Damaged: the score before the first step, or a part of the episodes.
    """
    from aem_exp.rundir import episodes

    if start.is_scored:
        disk.read_json(folder / BEFORE_FILE, "success")
    for part in episodes.list_parts(folder, start.last_measured_step):
        episodes.check_file(part)


class RunSession:
    """The parts of one run in one of its processes. All play and train; the first keeps records."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        world: Any,
        weights: str,
        start: ResumePoint,
        tracker: Any,
        watch: StepCallback | None,
        signals: Signals,
    ) -> None:
        import torch

        from aem_exp.envs.workers import make_executor
        from aem_exp.rollout.chat import Chat
        from aem_exp.rollout.play import Rollout, Watcher
        from aem_exp.rundir.episodes import EpisodeWriter
        from aem_exp.training import fsdp
        from aem_exp.training.callback import StepCounter

        if experiment.launch.threads:
            torch.set_num_threads(experiment.launch.threads)
        self.experiment, self.folder, self.world, self.start = experiment, folder, world, start
        self.weights, self.before = weights, dict[str, Any]()
        self.tracker, self.watch, self.signals, self.first = tracker, watch, signals, distributed.is_main_process()
        log.info("loading %s", weights)
        fsdp.enable_ram_efficient_loading(experiment.launch.trainer)
        self.model, self.tokenizer = policy.load(experiment.model, weights, experiment.seed)
        self.chat = Chat(self.tokenizer, experiment.model.system, experiment.model.thinking)
        launch = experiment.launch
        stage = make_executor(world, experiment.env.make, launch, distributed.rank())
        self.watcher = watch if isinstance(watch, Watcher) else None
        self.rollout = Rollout(stage, experiment.env, self.chat, launch.device_episodes, self.watcher)
        made = checkpoints.updates(start.checkpoint) if start.checkpoint else 0
        self.time = StepCounter(experiment.trainer.steps, start.step, experiment.parent_steps, made)
        self.episodes = EpisodeWriter(folder, start.last_measured_step) if self.first else None
        self.scores: dict[str, Any] = {}
        self.crashes: set[str] = set()  # kinds that were told
        self.enough = False  # the watcher has seen enough
        self.servers = self._connect_servers() if launch.sampler == "served" else None
        self.trainer = self._build_trainer()

    def close(self) -> None:
        """Leave environments and servers."""
        from aem_exp.cluster.rendezvous import release_servers

        self.rollout.close()
        if self.servers:
            self.servers.cancel()
            if self.first:
                release_servers(self.servers.folder)
                self.alone.release()

    def play(self) -> dict[str, Any]:
        """Score the panel, train, score again; what `result.json` says.

        Raises:
            Interrupted: by a signal; a checkpoint has the last finished step.
            Stop: it cannot go on. Where that is because numbers are no longer finite, the policy is scored as it is by then.
        """
        how = self.experiment.evaluation
        try:
            self._train()
        except RunError as stop:
            if stop.kind == "nan":
                self._score_diverged(stop)
            raise
        after = self.scores.get(how.panel) or self._evaluate_panel(how.panel, recorded=True)
        final = self._evaluate_panel(how.final)
        self._log_step(self.time.step, final.metrics("test/"))
        self._save_model()
        return self._build_result(after, final)

    def _score_diverged(self, stop: RunError) -> None:
        """Score the weights as the last finite update left them: a comparison without such runs would favour their arm."""
        log.warning("%s; scoring the policy as it is", stop)
        how, file = self.experiment.evaluation, self.folder / DIVERGED_FILE
        if self.first:
            file.unlink(missing_ok=True)
        try:
            result = self._build_result(self._evaluate_panel(how.panel), self._evaluate_panel(how.final)) | {
                "diverged": str(stop)
            }
        except Exception as error:  # of many kinds, as its numbers may be anything; it is the first that counts
            log.warning("it cannot be scored: %s", error)
            return
        if self.episodes:
            self.episodes.finish()
            disk.write_atomically(file, json.dumps(result, indent=1) + "\n")

    def _build_result(self, after: Any, final: Any) -> dict[str, Any]:
        return {
            "experiment": self.experiment.name,
            "signature": config.signature(self.experiment),
            "steps": self.time.step,
            "updates": self.time.updates,
            "before": self.before,
            "after": asdict(after),
            "final": asdict(final),
            "checkpoint_rule": "last step",
            "crashed_in_training": count_crashed(self.folder),
            "fingerprint": self.world.fingerprint,
            "packages": provenance.read(self.folder)["packages"],
        }

    def _train(self) -> None:
        """All steps that are left. None may be: then the policy is loaded, and put where it plays."""
        checkpoint = str(self.start.checkpoint) if self.start.checkpoint else None
        if self.time.is_finished:
            self.trainer.args.max_steps = 1  # updates that transformers would ask for, one by one, and not get
        with self.signals.defer():
            self.trainer.train(resume_from_checkpoint=checkpoint)
        if not self.time.is_finished:
            if distributed.broadcast_from_main(lambda: self.enough):
                raise Pruned(f"enough was seen at step {self.time.step}")
            raise Interrupted(self.signals.received or signal.SIGTERM)  # another process may have heard it

    def _build_trainer(self) -> Any:
        from aem_exp.rollout.sampling.base import Sampling
        from aem_exp.training.callback import AEMCallback
        from aem_exp.training.trainer import build_trainer

        experiment, settings = self.experiment, self.experiment.trainer
        lam = experiment.modulation.lam
        callback = AEMCallback(
            self.time,
            config.instantiate(lam) if lam else None,
            experiment.modulation.gate,
            self._log_step,
            lambda: self._evaluate_panel(experiment.evaluation.panel).metrics("eval/"),
            experiment.evaluation.every,
            experiment.launch.save_every,
            lambda: self.enough or self.signals.received is not None,
            self._score_before_training,
        )
        sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.min_p or 0.0)
        return build_trainer(
            experiment,
            self.folder,
            self.model,
            self.tokenizer,
            callback,
            partial(_draw_episodes, experiment, self.world.tasks("train")),
            self.rollout,
            partial(self._build_sampler, sampling=sampling),
            keep=self._record_episodes if self.first else None,
            before_save=self._before_save if self.first else None,
            publish=self._build_publisher(),
        )

    def _build_publisher(self) -> Callable[[Any], None] | None:
        """What hands servers the newest weights, where there are servers."""
        if not self.servers:
            return None
        from aem_exp.rollout.sampling.weight_sync import make_publisher

        return make_publisher(self.servers, self.experiment.launch.server_weights)

    def _connect_servers(self) -> Any:
        from aem_exp.cluster import rendezvous
        from aem_exp.rollout.sampling.vllm_client import Servers

        launch = self.experiment.launch
        if launch.servers:
            folder = Path(launch.servers)
        else:
            folder = rendezvous.job_folder(self.folder)
            distributed.broadcast_from_main(
                lambda: rendezvous.wait_for_servers(folder, launch.server_nodes, launch.server_seconds)
            )
        if self.first:
            self.alone = rendezvous.lock_servers(folder)
        return Servers(folder, launch.server_seconds)

    def _build_sampler(self, trainer: Any, sampling: Any) -> Any:
        if self.servers:
            from aem_exp.rollout.sampling.vllm import ServerSampler

            known, rank = policy.vocabulary_size(self.experiment.model, self.weights), trainer.accelerator.process_index
            return ServerSampler(self.servers, self.chat.end_ids, sampling, vocabulary=known, rank=rank)
        if self.experiment.launch.sampler == "engine":
            from aem_exp.rollout.sampling.trl_engine import EngineSampler

            return EngineSampler(trainer, self.chat.end_ids, sampling)
        from aem_exp.rollout.sampling.local import LocalSampler

        return LocalSampler(self.model, self.chat.end_ids, sampling, self.watcher.token if self.watcher else None)

    def _score_before_training(self) -> None:
        """Score the policy before the first step; once, also in a run that is resumed."""
        file = self.folder / BEFORE_FILE
        if self.start.is_scored:
            self.before = disk.read_json(file)
        else:
            with self.signals.interruptible():
                score = self._evaluate_panel(self.experiment.evaluation.panel)
            self.before = asdict(score)
            self._log_step(self.time.step, score.metrics("eval/"))
            if self.episodes:
                self.episodes.write(self.time.step)
                disk.write_atomically(file, json.dumps(self.before, indent=1) + "\n")
        self.tracker.wait_until_ready()

    def _save_model(self) -> None:
        """Write the policy for those who use it, and the record of all episodes."""
        from aem_exp.training import fsdp

        trained = self.trainer.accelerator.unwrap_model(self.trainer.model)
        weights = fsdp.gather_state_dict(trained)
        if not self.episodes:
            return
        self.episodes.finish()
        if weights is not None:
            trained, _ = policy.load(self.experiment.model, self.weights, self.experiment.seed)
            missing, _ = trained.load_state_dict(weights, strict=False)  # TRL's has a second adapter, the reference's
            assert not missing, missing
        policy.save(trained, self.tokenizer, self.folder / "model")

    def _evaluate_panel(self, split: str, recorded: bool = False) -> Any:
        """Score a panel; `recorded`: its episodes stand in the record already."""
        from aem_exp.envs import panel
        from aem_exp.evaluate import evaluation
        from aem_exp.rollout.sampling.base import Sampling
        from aem_exp.rollout.types import CRASHED
        from aem_exp.rundir.episodes import build_record

        how = self.experiment.evaluation
        chosen = panel.build_panel(self.world, split, how.tasks)
        log.info("playing the %s panel: %d tasks x %d", chosen.name, len(chosen.tasks), how.repeats)
        sampler = self._build_sampler(self.trainer, Sampling(how.temperature))
        with self.rollout.override_rules(config.apply_evaluation_limits(self.experiment).env):
            played = evaluation.play_panel(chosen, partial(self.trainer.play_distributed, sampler=sampler), how.repeats)
        self.rollout.clock.read()  # not part of a step's time
        evaluation.check_results(chosen, played)
        if self.episodes and not recorded:
            self.episodes.add([build_record(self.time.step, chosen.name, t, in_full=t.draw < 8) for t in played])
        self.scores[split] = score = evaluation.score_panel(chosen, played)
        if score.crashed:
            first = next(t for t in played if t.ended == CRASHED)
            how_many = f"{score.crashed} of {score.episodes} episodes of the {chosen.name} panel crashed"
            told = f"{how_many}; task {first.task.id}: {first.error}"
            if score.crashed == score.episodes:
                raise RunError(told, "env")
            log.warning("%s (each counts as a failure)", told)
        return score

    def _log_step(self, step: int, row: dict[str, float]) -> None:
        self.tracker.log(step, row)
        if self.watch and self.watch(step, self.time.steps, row):
            self.enough = True

    def _record_episodes(self, step: int, credit: Any) -> None:
        from aem_exp.rundir.episodes import build_record

        assert self.episodes
        self.episodes.add([build_record(step, "train", t, in_full=t.draw == 0) for t in credit.played])
        for kind, crashed in groupby(sorted(_crashes(credit.played)), lambda pair: pair[0]):
            told = list(crashed)
            if kind not in self.crashes:
                log.warning("%d episodes of step %d crashed and are left out; %s", len(told), step + 1, told[0][1])
            self.crashes.add(kind)

    def _before_save(self, step: int) -> None:
        size = 3 * sum(p.numel() * p.element_size() for p in self.model.parameters())  # weights and two moments
        if shutil.disk_usage(self.folder).free < size + SPARE_BYTES:
            raise OSError(errno.ENOSPC, "no room for the next checkpoint", str(self.folder))
        self.tracker.flush()
        assert self.episodes
        self.episodes.write(step)


def _crashes(played: Sequence[Any]) -> list[tuple[str, str]]:
    """The kind of each crash, and a sentence."""
    return [(t.error.partition(":")[0], f"task {t.task.id}: {t.error}") for t in played if t.error]


def count_crashed(folder: Path) -> int:
    """How many episodes crashed in training, over all starts of a run."""
    rows = metrics.read(folder)
    return round(sum(row.get("train/ended_crashed", 0.0) * row.get("train/episodes", 0.0) for row in rows))


def _draw_episodes(experiment: Experiment, tasks: Any, step: int, number: int) -> list[Any]:
    """The episodes of a round: tasks drawn without replacement, each played by the whole group."""
    from aem_exp.rollout.sampling.base import keyed_generator
    from aem_exp.rollout.types import Episode

    settings, seed = experiment.trainer, experiment.seed
    count = settings.tasks_per_step * settings.oversample
    chosen = keyed_generator((seed, "tasks", step, number)).choice(len(tasks), count, replace=False)
    return [
        Episode(tasks[int(index)], draw, member, (seed, step, number, draw, member))
        for draw, index in enumerate(chosen, start=number * count)
        for member in range(settings.group_size)
    ]
