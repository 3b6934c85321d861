"""One experiment, on this machine, to a result. The composition root: here the parts meet.

The run dir is the truth, and asking again is safe: what is finished is left alone, what was interrupted continues from its
newest complete checkpoint and ends as if it had never stopped.

Also a door: `python -m aem_exp.run RUN_DIR` runs, by hand, the experiment that a run dir holds.
"""

import argparse
import errno
import json
import logging
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from aem_exp import checkpoints, config, disk, door, policy, progress, provenance, stores
from aem_exp.config import ConfigError, Experiment
from aem_exp.values import Stop

log = logging.getLogger("aem_exp")
Watch = Callable[[int, int, dict[str, float]], None]  # finished steps, all steps, metrics of the last one
RESULT = "result.json"
BEFORE = "before.json"
_LOCK, _OWNER = "run.lock", "owner.json"
_SPARE = 50_000_000  # bytes for everything but weights


class Owned(Exception):
    """Somebody else is at this run; the message names them."""


def run(experiment: Experiment, watch: Watch | None = None, folder: Path | None = None) -> Path:
    """Train and evaluate one experiment; the run dir (`folder`: where else than `config.run_dir` says).

    Returns at once where the result is there. Raises ConfigError before any work, and Owned where another process runs it.
    """
    config.check_runnable(experiment)
    folder = folder or config.run_dir(experiment)
    if (folder / RESULT).exists():
        return folder
    progress.quiet()
    policy.device(experiment.launch)
    world = world_of(experiment)
    weights = policy.locate(experiment.model) if experiment.model.path else None
    stores.probe(stores.resolve_uri(experiment.tracking, folder.parent))
    disk.check_writable(folder, "outputs")
    with _owning(folder):
        if not (folder / RESULT).exists():
            _run(experiment, folder, world, weights, watch)
    return folder


def world_of(experiment: Experiment) -> Any:
    """The world of the experiment; refuses what it cannot give."""
    world = config.instantiate(experiment.env.make)
    _fits(experiment, world)
    return world


def _run(experiment: Experiment, folder: Path, world: Any, weights: str | None, watch: Watch | None) -> None:
    from aem_exp import show, tracking

    _room(folder, weights)
    if experiment.parent_dir and checkpoints.newest(folder) is None:
        checkpoints.adopt(_end_of(Path(experiment.parent_dir)), folder)
    trained = _resume_step(folder)
    resumed = provenance.begin(folder, experiment, weights, trained if (folder / BEFORE).exists() else None)
    if trained > 0:
        log.info("going on from step %d", trained)
    resolved = config.to_dict(experiment)
    with tracking.Tracker.open(
        folder,
        stores.resolve_uri(experiment.tracking, folder.parent),
        experiment=experiment.name,
        run_name=f"{experiment.baseline.name}+{experiment.modulation.name}/s{experiment.seed}/{config.signature(experiment)[:6]}",
        params=resolved,
        tags=_tags(experiment, world.fingerprint, provenance.read(folder)["commit"], resumed),
        resume_step=trained,
        wait=False,
    ) as tracker:
        disk.write(folder / "experiment.json", json.dumps(resolved, indent=1) + "\n")
        weights = weights or policy.made(experiment, world)
        parts = _Experiment(experiment, folder, world, weights, tracker, watch)
        try:
            result = parts.play() | {"resumed": resumed}
        finally:
            parts.rollout.close()
        for path in show.artifacts(folder):
            tracker.artifact(path)
        disk.write(folder / RESULT, json.dumps(result, indent=1) + "\n")
        parts.episodes.forget()
    if tracker.trouble:
        log.warning(tracker.trouble)


class _Experiment:
    """The parts of one run, put together."""

    def __init__(
        self, experiment: Experiment, folder: Path, world: Any, weights: str, tracker: Any, watch: Watch | None
    ) -> None:
        import torch

        from aem_exp.episodes import Episodes
        from aem_exp.render import Chat
        from aem_exp.rollout import Rollout
        from aem_exp.trainer import Time
        from aem_exp.workers import stage_of

        if experiment.launch.threads:
            torch.set_num_threads(experiment.launch.threads)
        self.experiment, self.folder, self.world, self.tracker, self.watch = experiment, folder, world, tracker, watch
        log.info("loading %s", weights)
        self.model, self.tokenizer = policy.load(experiment.model, weights, experiment.seed)
        self.chat = Chat(self.tokenizer, experiment.model.system, experiment.model.thinking)
        launch = experiment.launch
        stage = stage_of(world, experiment.env.make, launch.workers, launch.env_seconds)
        self.rollout = Rollout(stage, experiment.env, self.chat, launch.device_episodes)
        done = _resume_step(folder)
        self.time = Time(experiment.trainer["steps"], max(0, done))
        self.episodes = Episodes(folder, done)
        self.scores: dict[str, Any] = {}
        self.crashes = 0
        self.trainer = self._trainer()

    def play(self) -> dict[str, Any]:
        """Score the panel, train, score again; what `result.json` says."""
        how, trainer = self.experiment.evaluation, self.trainer
        checkpoint = checkpoints.newest(self.folder)
        before = self._before(checkpoint)
        self.tracker.ready()
        if self.time.step < self.time.steps:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        elif checkpoint:  # stopped between the last step and the result
            trainer._load_from_checkpoint(str(checkpoint))
        last = checkpoints.newest(self.folder)
        after = self.scores.get(how.panel) or self._exam(how.panel, recorded=True)
        final = self._exam(how.final)
        self._report(self.time.step, final.metrics("test/"))
        self.episodes.finish()
        policy.save(trainer.accelerator.unwrap_model(trainer.model), self.tokenizer, self.folder / "model")
        return {
            "experiment": self.experiment.name,
            "signature": config.signature(self.experiment),
            "steps": self.time.step,
            "updates": checkpoints.updates(last) if last else 0,
            "before": before,
            "after": asdict(after),
            "final": asdict(final),
            "checkpoint_rule": "last step",
            "fingerprint": self.world.fingerprint,
            "packages": provenance.read(self.folder)["packages"],
        }

    def _trainer(self) -> Any:
        from aem_exp.sample import Sampling
        from aem_exp.trainer import AEMCallback, build

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
            keep=self._keep,
            before_save=self._before_save,
        )

    def _sampler(self, trainer: Any, sampling: Any) -> Any:
        if self.experiment.launch.sampler == "engine":
            from aem_exp.engine import EngineSampler

            return EngineSampler(trainer, self.chat.end_ids, sampling)
        from aem_exp.sample import LocalSampler

        return LocalSampler(self.model, self.chat.end_ids, sampling)

    def _before(self, parents: Path | None) -> dict[str, Any]:
        """The score before the first step; measured once, also by a run that is resumed. `parents`: where it begins."""
        file = self.folder / BEFORE
        if not file.exists():
            if parents:
                self.trainer._load_from_checkpoint(str(parents))
            score = self._exam(self.experiment.evaluation.panel)
            self._report(self.time.step, score.metrics("eval/"))
            self.episodes.write(self.time.step)
            disk.write(file, json.dumps(asdict(score), indent=1) + "\n")
        return json.loads(file.read_text())

    def _exam(self, split: str, recorded: bool = False) -> Any:
        """Score a panel; `recorded`: its episodes stand in the record already."""
        from aem_exp import exam
        from aem_exp.episodes import record
        from aem_exp.rollout import CRASHED
        from aem_exp.sample import Sampling

        how = self.experiment.evaluation
        panel = exam.panel(self.world, split, how.tasks)
        log.info("playing the %s panel: %d tasks x %d", panel.name, len(panel.tasks), how.repeats)
        sampler = self._sampler(self.trainer, Sampling(how.temperature))
        played = exam.play(panel, self.rollout, sampler, how.repeats)
        self.rollout.clock.read()  # not part of a step's time
        if not recorded:
            self.episodes.add([record(self.time.step, panel.name, t, in_full=t.draw < 8) for t in played])
        self.scores[split] = score = exam.score(panel, played)
        if score.crashed:
            first = next(t for t in played if t.ended == CRASHED)
            how_many = f"{score.crashed} of {score.episodes} episodes of the {panel.name} panel crashed"
            told = f"{how_many}; task {first.task.id}: {first.error}"
            if score.crashed == score.episodes:
                raise Stop(told)
            log.warning("%s (each counts as a failure)", told)
        return score

    def _report(self, step: int, metrics: dict[str, float]) -> None:
        self.tracker.log(step, metrics)
        if self.watch:
            self.watch(step, self.time.steps, metrics)

    def _keep(self, step: int, credit: Any) -> None:
        from aem_exp.episodes import record

        self.episodes.add([record(step, "train", t, in_full=t.draw == 0) for t in credit.played])
        errors = [f"task {t.task.id}: {t.error}" for t in credit.played if t.error]
        if errors and not self.crashes:
            log.warning("%d episodes of step %d crashed and are left out; %s", len(errors), step + 1, errors[0])
        self.crashes += len(errors)

    def _before_save(self, step: int) -> None:
        size = 3 * sum(p.numel() * p.element_size() for p in self.model.parameters())  # weights and two moments
        if shutil.disk_usage(self.folder).free < size + _SPARE:
            raise OSError(errno.ENOSPC, "no room for the next checkpoint", str(self.folder))
        self.tracker.flush()
        self.episodes.write(step)


def _draw(experiment: Experiment, tasks: Any, step: int, number: int) -> list[Any]:
    """The episodes of a round: tasks drawn without replacement, each played by the whole group."""
    from aem_exp.rollout import Episode
    from aem_exp.sample import generator

    settings, seed = experiment.trainer, experiment.seed
    count = settings["tasks_per_step"] * settings["oversample"]
    chosen = generator((seed, "tasks", step, number)).choice(len(tasks), count, replace=False)
    return [
        Episode(tasks[int(index)], draw, member, (seed, step, number, draw, member))
        for draw, index in enumerate(chosen, start=number * count)
        for member in range(settings["group_size"])
    ]


def _resume_step(folder: Path) -> int:
    """Steps that need not be trained again; -1 where not even the untrained policy was scored."""
    checkpoint = checkpoints.newest(folder)
    if checkpoint:
        return checkpoints.steps(checkpoint)
    return 0 if (folder / BEFORE).exists() else -1


def _fits(experiment: Experiment, world: Any) -> None:
    """Refuse more tasks than the world has."""
    from aem_exp import exam

    settings, there = experiment.trainer, len(world.tasks("train"))
    if settings["tasks_per_step"] * settings["oversample"] > there:
        remedy = f"env {experiment.env.name} has {there} training tasks"
        raise ConfigError("trainer.tasks_per_step", settings["tasks_per_step"], remedy)
    for split in (experiment.evaluation.panel, experiment.evaluation.final):
        exam.panel(world, split, experiment.evaluation.tasks)


def _end_of(parent: Path) -> Path:
    """The last checkpoint of a finished run."""
    checkpoint, steps = checkpoints.newest(parent), config.read(parent, trust=True).trainer["steps"]
    if checkpoint is None or checkpoints.steps(checkpoint) != steps:
        raise ConfigError("from", str(parent), f"has no checkpoint of its last step, {steps}; it may have been removed")
    return checkpoint


def _tags(experiment: Experiment, fingerprint: str, commit: str | None, resumed: list[str]) -> dict[str, str]:
    return {
        "aem.group": f"{experiment.baseline.name}+{experiment.modulation.name}",
        "aem.seed": str(experiment.seed),
        "aem.signature": config.signature(experiment),
        "aem.arm": config.arm(experiment),
        "aem.env_fingerprint": fingerprint,
        **({"aem.parent": experiment.parent} if experiment.parent else {}),
        **({"aem.resumed": "inexact"} if resumed else {}),
        **({"git.commit": commit} if commit else {}),
    }


@contextmanager
def _owning(folder: Path) -> Iterator[None]:
    """One process at a time; the lock is the kernel's, so it ends with its holder, however that ends."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / _LOCK, timeout=0):
            disk.write(folder / _OWNER, json.dumps({"host": platform.node(), "pid": os.getpid()}))
            yield
    except Timeout as error:
        raise Owned(f"{folder} is being run by {_named(folder)}") from error


def owner(folder: Path) -> str | None:
    """Who is at this run now, if anybody is."""
    from filelock import FileLock, Timeout

    if not (folder / _LOCK).exists():
        return None
    try:
        with FileLock(folder / _LOCK, timeout=0):
            return None
    except Timeout:
        return _named(folder)


def _named(folder: Path) -> str:
    who = json.loads((folder / _OWNER).read_text()) if (folder / _OWNER).exists() else {"host": "?", "pid": "?"}
    return f"process {who['pid']} on {who['host']}"


def _room(folder: Path, weights: str | None) -> None:
    """Refuse a disk that cannot hold two checkpoints (weights and two moments each) and the final model."""
    size = sum(file.stat().st_size for file in Path(weights).glob("*.safetensors")) if weights else 0
    need, free = 7 * size + _SPARE, shutil.disk_usage(folder).free
    if free < need:
        raise ConfigError(
            "outputs", str(folder), f"has {free / 1e9:.1f} GB free and needs {need / 1e9:.1f} GB; choose another folder"
        )


# The door.


def at_terminal(experiment: Experiment, folder: Path) -> int:
    """Run with a live line, and show what there is at the end; the exit code."""
    progress.quiet()
    again = shlex.join([sys.executable, "-m", "aem_exp.run", str(folder)])  # from any folder, whatever the environment
    return door.answer(
        lambda: _shown(experiment, folder), lambda: f"to go on from step {max(0, _resume_step(folder))}: {again}"
    )


def _shown(experiment: Experiment, folder: Path) -> int:
    from aem_exp import show

    if (folder / RESULT).exists():
        for change in _since(experiment, folder):
            print(f"note      since this run, {change}; to run again, move its folder away")
    else:
        try:
            with progress.Progress() as line:
                run(experiment, line, folder)
        except Owned as owned:
            print(owned)
            return 0
        except Stop as stop:
            raise Stop(f"{stop}. The run dir has all up to step {max(0, _resume_step(folder))}: {folder}") from stop
    show.summary(folder)
    return 0


def _since(experiment: Experiment, folder: Path) -> list[str]:
    """What has changed since a finished run ran: its result stands for what it was."""
    try:
        weights = policy.locate(experiment.model) if experiment.model.path else None
    except ConfigError:  # moved away since
        weights = None
    return provenance.changes(folder, experiment, weights)


def main() -> int:
    return door.answer(lambda: _act(_read()))


def _read() -> argparse.Namespace:
    what = "Run, or go on with, what a run dir holds."
    parser = door.Parser("python -m aem_exp.run", description=what, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--inexact", action="store_true", help="go on though code, libraries or machine changed")
    parser.add_argument("--trust", action="store_true", help="run somebody else's config, which can call any function")
    return parser.parse_args()


def _act(asked: argparse.Namespace) -> int:
    door.reach(asked.run_dir / provenance.CODE)
    experiment, folder = config.read(asked.run_dir, asked.trust), asked.run_dir.expanduser().absolute()
    if asked.inexact:
        experiment = replace(experiment, resume="inexact")
    print(f"run       {folder}", flush=True)
    return at_terminal(experiment, folder)


if __name__ == "__main__":
    sys.exit(main())
