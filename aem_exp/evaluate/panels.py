"""Plays a panel (each task the same number of times), scores it, and checks that the results have a score."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from aem_exp.core.errors import RunError
from aem_exp.envs.panel import Panel
from aem_exp.stats import scores
from aem_exp.stats.scores import Outcome, Score

if TYPE_CHECKING:
    from aem_exp.rollout.types import Episode, Trajectory

log = logging.getLogger("aem_exp")
MAX_PANEL_EPISODES: Final = 256  # episodes of a panel that are played at the same time; this limits memory


def play_panel(
    panel: Panel,
    play: Callable[[Sequence["Episode"]], list["Trajectory"]],
    repeats: int = 1,
    at_once: int = MAX_PANEL_EPISODES,
) -> list["Trajectory"]:
    """Play each task of the panel `repeats` times, at most `at_once` episodes in parallel."""
    wanted = list_episodes(panel, repeats)
    return [t for start in range(0, len(wanted), at_once) for t in play(wanted[start : start + at_once])]


def list_episodes(panel: Panel, repeats: int) -> list["Episode"]:
    """Return the episodes to play, in the order of the panel."""
    from aem_exp.rollout.types import Episode

    return [
        Episode(task, draw, repeat, ("panel", panel.name, task.id, repeat))
        for draw, task in enumerate(panel.tasks)
        for repeat in range(repeats)
    ]


def score_panel(panel: Panel, played: Sequence["Trajectory"]) -> Score:
    """Compute the score of a panel, of which every task must be played equally often."""
    from aem_exp.rundir.episodes import build_record

    assert not len(played) % len(panel.tasks), f"{len(played)} episodes do not cover {len(panel.tasks)} tasks equally"
    outcomes = [build_outcome(build_record(0, panel.name, t, True)) for t in played]
    return scores.summarize_outcomes(panel.name, panel.hash, outcomes)


def check_results(panel: Panel, played: Sequence["Trajectory"]) -> None:
    """Check that episodes report success, and log a warning if their scores have little meaning.

    Raises:
        RunError: the env never reports success.
    """
    from aem_exp.rollout.types import Ending

    begun = [t for t in played if t.responses and t.ended != Ending.CRASHED]
    if begun and not any("won" in t.responses[-1].metrics for t in begun):
        reason = f"no turn on the panel {panel.name} has metrics['won'], which evaluation reports as success"
        raise RunError(f"{reason}; the env must set it to 0.0 or 1.0 in the Turn of every step", "env")
    if _is_one_game(begun):
        log.warning(
            "all tasks of the panel %s begin with the same observation and give the same replies; if the seed of a task changes "
            "nothing, no task is held out",
            panel.name,
        )
    if all(t.ended == Ending.CONTEXT and not t.responses for t in played):
        problem = f"no first prompt of the panel {panel.name} fits into the context together with a response"
        raise RunError(f"{problem}; raise env.context_tokens", "config")
    if 2 * (cut := sum(t.ended == Ending.CONTEXT for t in played)) >= len(played):
        remedy = "raise env.context_tokens, or shorten the history with env.history=window env.window=2"
        log.warning("%d of %d episodes of the panel %s ran out of context; %s", cut, len(played), panel.name, remedy)


def _is_one_game(begun: Sequence["Trajectory"]) -> bool:
    """Return whether different tasks begin alike and give the same replies to the same responses.

    In a guessing game, tasks begin alike but give different replies. If no two tasks received the same responses, this
    returns False.
    """
    if len({(t.goal, t.responses[0].observation) for t in begun}) != 1:
        return False
    replies: dict[tuple[str, ...], tuple[Any, ...]] = {}  # responses so far -> reply to the last one, and the task
    tasks_differ = False  # whether two tasks received the same responses
    for t in begun:
        responses: tuple[str, ...] = ()
        observations = [*(r.observation for r in t.responses[1:]), t.ended]
        for response, observation in zip(t.responses, observations, strict=True):
            responses = (*responses, response.text)
            reply = observation, response.reward, response.valid, response.metrics
            before, draw = replies.setdefault(responses, (reply, t.draw))
            if before != reply:
                return False
            tasks_differ = tasks_differ or draw != t.draw
    return tasks_differ


def build_outcome(row: dict[str, Any]) -> Outcome:
    """Return the part of an episode's record that a score needs."""
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
