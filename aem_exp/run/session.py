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
from aem_exp.cluster.signals import Enough, Interrupted, Signals
from aem_exp.config import Experiment
from aem_exp.core import disk
from aem_exp.core.errors import Stop
from aem_exp.rundir import checkpoints, metrics

log = logging.getLogger("aem_exp")
Watch = Callable[
    [int, int, dict[str, float]], bool | None
]  # finished steps, all steps, the last one's metrics -> enough?
BEFORE = "before.json"
DIVERGED = "diverged.json"  # the score of a run that can have no result
SPARE = 50_000_000  # bytes for everything but weights


@dataclass(frozen=True)
class Start:
    """Where a start of a run begins, as its first process found it."""

    step: int  # steps that need not be trained again
    checkpoint: Path | None
    scored: bool  # the policy was scored before the first step
    changes: list[str] = field(default_factory=list)  # of code, libraries or machine since its first start

    @property
    def measured(self) -> int:
        """The last step whose measurements stand; -1 where not even the untrained policy was scored."""
        return self.step if self.checkpoint or self.scored else -1


def found(folder: Path) -> Start:
    """What a run dir holds to go on from."""
    checkpoint = checkpoints.newest(folder)
    return Start(checkpoints.steps(checkpoint) if checkpoint else 0, checkpoint, (folder / BEFORE).exists())


def check_record(folder: Path, start: Start) -> None:
    """Refuse to go on with a run that could not be recorded to its end.

    Raises:
        Damaged: the score before the first step, or a part of the episodes.
    """
    from aem_exp.rundir import episodes

    if start.scored:
        disk.read(folder / BEFORE, "success")
    for part in episodes.parts(folder, start.measured):
        episodes.check(part)


class Parts:
    """The parts of one run in one of its processes. All play and train; the first keeps records."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        world: Any,
        weights: str,
        start: Start,
        tracker: Any,
        watch: Watch | None,
        signals: Signals,
    ) -> None:
        import torch

        from aem_exp.envs.workers import stage_of
        from aem_exp.rollout.chat import Chat
        from aem_exp.rollout.play import Rollout, Watcher
        from aem_exp.rundir.episodes import Episodes
        from aem_exp.training import fsdp
        from aem_exp.training.callback import Time

        if experiment.launch.threads:
            torch.set_num_threads(experiment.launch.threads)
        self.experiment, self.folder, self.world, self.start = experiment, folder, world, start
        self.weights, self.before = weights, dict[str, Any]()
        self.tracker, self.watch, self.signals, self.first = tracker, watch, signals, distributed.first()
        log.info("loading %s", weights)
        fsdp.read_once(experiment.launch.trainer)
        self.model, self.tokenizer = policy.load(experiment.model, weights, experiment.seed)
        self.chat = Chat(self.tokenizer, experiment.model.system, experiment.model.thinking)
        launch = experiment.launch
        stage = stage_of(world, experiment.env.make, launch, distributed.number())
        self.watcher = watch if isinstance(watch, Watcher) else None
        self.rollout = Rollout(stage, experiment.env, self.chat, launch.device_episodes, self.watcher)
        made = checkpoints.updates(start.checkpoint) if start.checkpoint else 0
        self.time = Time(experiment.trainer["steps"], start.step, experiment.parent_steps, made)
        self.episodes = Episodes(folder, start.measured) if self.first else None
        self.scores: dict[str, Any] = {}
        self.crashes: set[str] = set()  # kinds that were told
        self.enough = False  # the watcher has seen enough
        self.servers = self._servers() if launch.sampler == "served" else None
        self.trainer = self._trainer()

    def close(self) -> None:
        """Leave environments and servers."""
        from aem_exp.cluster.rendezvous import leave

        self.rollout.close()
        if self.servers:
            self.servers.hang_up()
            if self.first:
                leave(self.servers.folder)
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
        except Stop as stop:
            if stop.kind == "nan":
                self._diverged(stop)
            raise
        after = self.scores.get(how.panel) or self._exam(how.panel, recorded=True)
        final = self._exam(how.final)
        self._report(self.time.step, final.metrics("test/"))
        self._save()
        return self._result(after, final)

    def _diverged(self, stop: Stop) -> None:
        """Score the weights as the last finite update left them: a comparison without such runs would favour their arm."""
        log.warning("%s; scoring the policy as it is", stop)
        how, file = self.experiment.evaluation, self.folder / DIVERGED
        if self.first:
            file.unlink(missing_ok=True)
        try:
            result = self._result(self._exam(how.panel), self._exam(how.final)) | {"diverged": str(stop)}
        except Exception as error:  # of many kinds, as its numbers may be anything; it is the first that counts
            log.warning("it cannot be scored: %s", error)
            return
        if self.episodes:
            self.episodes.finish()
            disk.write(file, json.dumps(result, indent=1) + "\n")

    def _result(self, after: Any, final: Any) -> dict[str, Any]:
        return {
            "experiment": self.experiment.name,
            "signature": config.signature(self.experiment),
            "steps": self.time.step,
            "updates": self.time.updates,
            "before": self.before,
            "after": asdict(after),
            "final": asdict(final),
            "checkpoint_rule": "last step",
            "crashed_in_training": crashed(self.folder),
            "fingerprint": self.world.fingerprint,
            "packages": provenance.read(self.folder)["packages"],
        }

    def _train(self) -> None:
        """All steps that are left. None may be: then the policy is loaded, and put where it plays."""
        checkpoint = str(self.start.checkpoint) if self.start.checkpoint else None
        if self.time.over:
            self.trainer.args.max_steps = 1  # updates that transformers would ask for, one by one, and not get
        with self.signals.deferred():
            self.trainer.train(resume_from_checkpoint=checkpoint)
        if not self.time.over:
            if distributed.shared(lambda: self.enough):
                raise Enough(f"enough was seen at step {self.time.step}")
            raise Interrupted(self.signals.heard or signal.SIGTERM)  # another process may have heard it

    def _trainer(self) -> Any:
        from aem_exp.rollout.sampling.base import Sampling
        from aem_exp.training.callback import AEMCallback
        from aem_exp.training.trainer import build

        experiment, settings = self.experiment, self.experiment.trainer
        lam = experiment.modulation.lam
        callback = AEMCallback(
            self.time,
            config.instantiate(lam) if lam else None,
            experiment.modulation.gate,
            self._report,
            lambda: self._exam(experiment.evaluation.panel).metrics("eval/"),
            experiment.evaluation.every,
            experiment.launch.save_every,
            lambda: self.enough or self.signals.heard is not None,
            self._begin,
        )
        sampling = Sampling(**{k: settings[k] for k in ("temperature", "top_p", "top_k", "min_p") if k in settings})
        return build(
            experiment,
            self.folder,
            self.model,
            self.tokenizer,
            callback,
            partial(_draw, experiment, self.world.tasks("train")),
            self.rollout,
            partial(self._sampler, sampling=sampling),
            keep=self._keep if self.first else None,
            before_save=self._before_save if self.first else None,
            publish=self._publisher(),
        )

    def _publisher(self) -> Callable[[Any], None] | None:
        """What hands servers the newest weights, where there are servers."""
        if not self.servers:
            return None
        from aem_exp.rollout.sampling.weight_sync import publisher

        return publisher(self.servers, self.experiment.launch.server_weights)

    def _servers(self) -> Any:
        from aem_exp.cluster import rendezvous
        from aem_exp.rollout.sampling.vllm_client import Servers

        launch = self.experiment.launch
        if launch.servers:
            folder = Path(launch.servers)
        else:
            folder = rendezvous.of_job(self.folder)
            distributed.shared(lambda: rendezvous.gather(folder, launch.server_nodes, launch.server_seconds))
        if self.first:
            self.alone = rendezvous.claim(folder)
        return Servers(folder, launch.server_seconds)

    def _sampler(self, trainer: Any, sampling: Any) -> Any:
        if self.servers:
            from aem_exp.rollout.sampling.vllm import ServedSampler

            known, rank = policy.vocabulary(self.experiment.model, self.weights), trainer.accelerator.process_index
            return ServedSampler(self.servers, self.chat.end_ids, sampling, vocabulary=known, rank=rank)
        if self.experiment.launch.sampler == "engine":
            from aem_exp.rollout.sampling.trl_engine import EngineSampler

            return EngineSampler(trainer, self.chat.end_ids, sampling)
        from aem_exp.rollout.sampling.local import LocalSampler

        return LocalSampler(self.model, self.chat.end_ids, sampling, self.watcher.token if self.watcher else None)

    def _begin(self) -> None:
        """Score the policy before the first step; once, also in a run that is resumed."""
        file = self.folder / BEFORE
        if self.start.scored:
            self.before = disk.read(file)
        else:
            with self.signals.prompt():
                score = self._exam(self.experiment.evaluation.panel)
            self.before = asdict(score)
            self._report(self.time.step, score.metrics("eval/"))
            if self.episodes:
                self.episodes.write(self.time.step)
                disk.write(file, json.dumps(self.before, indent=1) + "\n")
        self.tracker.ready()

    def _save(self) -> None:
        """Write the policy for those who use it, and the record of all episodes."""
        from aem_exp.training import fsdp

        trained = self.trainer.accelerator.unwrap_model(self.trainer.model)
        weights = fsdp.gathered(trained)
        if not self.episodes:
            return
        self.episodes.finish()
        if weights is not None:
            trained, _ = policy.load(self.experiment.model, self.weights, self.experiment.seed)
            missing, _ = trained.load_state_dict(weights, strict=False)  # TRL's has a second adapter, the reference's
            assert not missing, missing
        policy.save(trained, self.tokenizer, self.folder / "model")

    def _exam(self, split: str, recorded: bool = False) -> Any:
        """Score a panel; `recorded`: its episodes stand in the record already."""
        from aem_exp.envs import panel
        from aem_exp.evaluate import evaluation
        from aem_exp.rollout.sampling.base import Sampling
        from aem_exp.rollout.types import CRASHED
        from aem_exp.rundir.episodes import record

        how = self.experiment.evaluation
        chosen = panel.build_panel(self.world, split, how.tasks)
        log.info("playing the %s panel: %d tasks x %d", chosen.name, len(chosen.tasks), how.repeats)
        sampler = self._sampler(self.trainer, Sampling(how.temperature))
        with self.rollout.under(config.examined(self.experiment).env):
            played = evaluation.play(chosen, partial(self.trainer.share, sampler=sampler), how.repeats)
        self.rollout.clock.read()  # not part of a step's time
        evaluation.heed(chosen, played)
        if self.episodes and not recorded:
            self.episodes.add([record(self.time.step, chosen.name, t, in_full=t.draw < 8) for t in played])
        self.scores[split] = score = evaluation.score(chosen, played)
        if score.crashed:
            first = next(t for t in played if t.ended == CRASHED)
            how_many = f"{score.crashed} of {score.episodes} episodes of the {chosen.name} panel crashed"
            told = f"{how_many}; task {first.task.id}: {first.error}"
            if score.crashed == score.episodes:
                raise Stop(told, "env")
            log.warning("%s (each counts as a failure)", told)
        return score

    def _report(self, step: int, row: dict[str, float]) -> None:
        self.tracker.log(step, row)
        if self.watch and self.watch(step, self.time.steps, row):
            self.enough = True

    def _keep(self, step: int, credit: Any) -> None:
        from aem_exp.rundir.episodes import record

        assert self.episodes
        self.episodes.add([record(step, "train", t, in_full=t.draw == 0) for t in credit.played])
        for kind, crashed in groupby(sorted(_crashes(credit.played)), lambda pair: pair[0]):
            told = list(crashed)
            if kind not in self.crashes:
                log.warning("%d episodes of step %d crashed and are left out; %s", len(told), step + 1, told[0][1])
            self.crashes.add(kind)

    def _before_save(self, step: int) -> None:
        size = 3 * sum(p.numel() * p.element_size() for p in self.model.parameters())  # weights and two moments
        if shutil.disk_usage(self.folder).free < size + SPARE:
            raise OSError(errno.ENOSPC, "no room for the next checkpoint", str(self.folder))
        self.tracker.flush()
        assert self.episodes
        self.episodes.write(step)


def _crashes(played: Sequence[Any]) -> list[tuple[str, str]]:
    """The kind of each crash, and a sentence."""
    return [(t.error.partition(":")[0], f"task {t.task.id}: {t.error}") for t in played if t.error]


def crashed(folder: Path) -> int:
    """How many episodes crashed in training, over all starts of a run."""
    rows = metrics.read(folder)
    return round(sum(row.get("train/ended_crashed", 0.0) * row.get("train/episodes", 0.0) for row in rows))


def _draw(experiment: Experiment, tasks: Any, step: int, number: int) -> list[Any]:
    """The episodes of a round: tasks drawn without replacement, each played by the whole group."""
    from aem_exp.rollout.sampling.base import generator
    from aem_exp.rollout.types import Episode

    settings, seed = experiment.trainer, experiment.seed
    count = settings["tasks_per_step"] * settings["oversample"]
    chosen = generator((seed, "tasks", step, number)).choice(len(tasks), count, replace=False)
    return [
        Episode(tasks[int(index)], draw, member, (seed, step, number, draw, member))
        for draw, index in enumerate(chosen, start=number * count)
        for member in range(settings["group_size"])
    ]
