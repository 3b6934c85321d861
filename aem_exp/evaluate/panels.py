"""Play a panel, every task the same number of times, and score it; refuse results that have no score."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from aem_exp.core.errors import RunError
from aem_exp.envs.panel import Panel
from aem_exp.stats import scores
from aem_exp.stats.scores import Outcome, Score

if TYPE_CHECKING:
    from aem_exp.rollout.types import Episode, Trajectory

log = logging.getLogger("aem_exp")


def play_panel(
    panel: Panel, play: Callable[[Sequence["Episode"]], list["Trajectory"]], repeats: int = 1, at_once: int = 256
) -> list["Trajectory"]:
    """Play every task of the panel `repeats` times, `at_once` episodes at a time (this bounds memory)."""
    wanted = list_episodes(panel, repeats)
    return [t for start in range(0, len(wanted), at_once) for t in play(wanted[start : start + at_once])]


def list_episodes(panel: Panel, repeats: int) -> list["Episode"]:
    """The episodes to play, in the order of the panel."""
    from aem_exp.rollout.types import Episode

    return [
        Episode(task, draw, repeat, ("panel", panel.name, task.id, repeat))
        for draw, task in enumerate(panel.tasks)
        for repeat in range(repeats)
    ]


def score_panel(panel: Panel, played: Sequence["Trajectory"]) -> Score:
    """Summarise; a partial panel is refused, not averaged."""
    from aem_exp.rundir.episodes import build_record

    assert not len(played) % len(panel.tasks), f"{len(played)} episodes do not cover {len(panel.tasks)} tasks alike"
    outcomes = [build_outcome(build_record(0, panel.name, t, True)) for t in played]
    return scores.summarize_outcomes(panel.name, panel.hash, outcomes)


def check_results(panel: Panel, played: Sequence["Trajectory"]) -> None:
    """Refuse what has no score, and warn of what makes a score say little.

    Raises:
        RunError: the world never says who won.
    """
    from aem_exp.rollout.types import Ending

    begun = [t for t in played if t.responses and t.ended != Ending.CRASHED]
    if begun and not any("won" in t.responses[-1].metrics for t in begun):
        reason = f"no turn on the panel {panel.name} says metrics['won'], which evaluation reports as success"
        raise RunError(f"{reason}: a world sets it, to 0.0 or 1.0, in every Turn of a step", "env")
    if _is_one_game(begun):
        log.warning(
            "all games of the panel %s begin alike and answer alike; where a task's seed changes nothing, none is held out",
            panel.name,
        )
    if 2 * (cut := sum(t.ended == Ending.CONTEXT for t in played)) >= len(played):
        remedy = "raise env.context_tokens, or show less of the past: env.history=window env.window=2"
        log.warning("%d of %d episodes of the panel %s ran out of context; %s", cut, len(played), panel.name, remedy)


def _is_one_game(begun: Sequence["Trajectory"]) -> bool:
    """Whether games of different tasks begin alike, and answer alike to the same responses.

    In a game of guessing they begin alike, and then answer differently. Where no two episodes have the same responses, nothing
    is known.
    """
    if len({(t.goal, t.responses[0].observation) for t in begun}) != 1:
        return False
    answers: dict[tuple[str, ...], tuple[Any, ...]] = {}  # responses so far -> the answer to the last, and the task
    tasks_differ = False  # the same responses were given in two tasks
    for t in begun:
        responses: tuple[str, ...] = ()
        observations = [*(r.observation for r in t.responses[1:]), t.ended]
        for response, observation in zip(t.responses, observations, strict=True):
            responses = (*responses, response.text)
            answer = observation, response.reward, response.valid, response.metrics
            before, draw = answers.setdefault(responses, (answer, t.draw))
            if before != answer:
                return False
            tasks_differ = tasks_differ or draw != t.draw
    return tasks_differ


def build_outcome(row: dict[str, Any]) -> Outcome:
    """What a score needs of an episode, from its record."""
    from aem_exp.rollout.types import Ending

    responses = row["responses"]
    return Outcome(
        task=row["draw"],
        kind=row["kind"],
        won=row["won"],
        ret=row["return"],
        ended=row["ended"],
        crashed=row["ended"] == Ending.CRASHED,
        valid=[response["valid"] for response in responses],
        entropies=[response["entropy"] for response in responses if response["entropy"] is not None],
        tokens=row["tokens"],
        score=row["score"],
        habits=dict(row["habits"]),
    )
