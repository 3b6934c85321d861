"""Scores the policy of a run on held-out tasks, and builds the result of the run."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from aem_exp import config, provenance, warm_start
from aem_exp.cluster import distributed
from aem_exp.core import disk
from aem_exp.core.errors import RunError
from aem_exp.envs import panel
from aem_exp.envs.panel import Panel
from aem_exp.evaluate import panels
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.types import Ending, Episode, Trajectory
from aem_exp.run.context import RunContext
from aem_exp.run.recorder import count_crashed
from aem_exp.rundir import FINAL_SCORES
from aem_exp.stats.scores import Score, average_scores

if TYPE_CHECKING:
    from aem_exp.training.step_counter import StepCounter

log = logging.getLogger("aem_exp")


def play_run_panel(
    context: RunContext, split: str, rollout: Rollout, play: Callable[[Sequence[Episode]], list[Trajectory]]
) -> tuple[Panel, list[Trajectory]]:
    """Play the panel of a split with the evaluation settings; return the panel and its trajectories.

    Raises:
        RunError: the env never reports success.
    """
    settings = context.experiment.evaluation
    chosen = panel.build_panel(context.world, split, settings.tasks)
    each = "1 episode each" if settings.repeats == 1 else f"{settings.repeats} episodes each"
    log.info("evaluating on the %s panel: %d tasks, %s", chosen.name, len(chosen.tasks), each)
    with rollout.override_rules(config.apply_evaluation_limits(context.experiment).env):
        played = panels.play_panel(chosen, play, settings.repeats)
    rollout.clock.read()  # discards the time of this evaluation, which is not part of a step
    panels.check_results(chosen, played)
    return chosen, played


def score_run_panel(chosen: Panel, played: Sequence[Trajectory]) -> Score:
    """Compute the score of a panel, and log a warning if episodes crashed.

    Raises:
        RunError: all episodes crashed.
    """
    score = panels.score_panel(chosen, played)
    if score.crashed:
        first = next(t for t in played if t.ended == Ending.CRASHED)
        share = f"{score.crashed} of {score.episodes} episodes of the {chosen.name} panel crashed"
        sentence = f"{share}; for example, task {first.task.id}: {first.error}"
        if score.crashed == score.episodes:
            raise RunError(sentence, "env")
        log.warning("%s (a crashed episode counts as a failure)", sentence)
    return score


class FinalScores:
    """The scores on the final panel after the last steps. They are on disk, so that a resumed run has them."""

    def __init__(self, context: RunContext) -> None:
        self.file, self.steps = context.folder / FINAL_SCORES, config.final_steps(context.experiment)
        self._scores: dict[int, Score] = {}
        if self.file.exists():
            self._scores = {int(step): Score(**score) for step, score in disk.read_json(self.file).items()}

    def add(self, step: int, score: Score) -> None:
        self._scores[step] = score
        if len(self.steps) > 1 and distributed.is_main_process():
            disk.write_atomically(self.file, json.dumps({step: asdict(s) for step, s in self._scores.items()}) + "\n")

    def read(self) -> dict[int, Score]:
        """The score after each of the last steps."""
        return {step: self._scores[step] for step in self.steps}


def build_result(
    context: RunContext, time: "StepCounter", before: Mapping[str, Any], after: Score, finals: Mapping[int, Score]
) -> dict[str, Any]:
    """Build the content of `result.json`, or of `diverged.json` if the run diverged.

    Args:
        finals: the score on the final panel after each step whose mean is the result.
    """
    return {
        "experiment": context.experiment.name,
        "signature": config.signature(context.experiment),
        "steps": time.step,
        "updates": time.updates,
        "before": before,
        "after": asdict(after),
        "final": asdict(average_scores(list(finals.values()))),
        **_checkpoint_rule(list(finals)),
        "crashed_in_training": count_crashed(context.folder),
        "fingerprint": context.world.fingerprint,
        "packages": provenance.read(context.folder)["packages"],
        **_warm_start_facts(context),
    }


def _checkpoint_rule(steps: list[int]) -> dict[str, Any]:
    if len(steps) == 1:
        return {"checkpoint_rule": "last step"}
    distance = steps[-1] - steps[-2]
    return {
        "checkpoint_rule": f"mean over the last {len(steps)} evaluations, {distance} steps apart",
        "final_steps": steps,
    }


def _warm_start_facts(context: RunContext) -> dict[str, Any]:
    """What the warm start changed, with the share of groups below the gate of the modulation; empty without a warm start."""
    if context.warm_start is None:
        return {}
    gate, facts = context.experiment.modulation.gate, dict(context.warm_start)
    for when in ("before", "after"):
        facts[when] = {**facts[when], "gated_share": warm_start.gated_share(facts[when], gate)}
    return {"warm_start": facts}
