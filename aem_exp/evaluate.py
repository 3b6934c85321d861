"""A policy on a panel: a fixed, hashed list of held-out tasks, every one scored exactly `repeats` times.

Sampling depends on (panel, task, repeat) alone, so a policy has one score on a panel, on any machine and in any order.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256

from aem_exp.config import ConfigError
from aem_exp.envs import Task, World
from aem_exp.rollout import CRASHED, Episode, Rollout, Trajectory
from aem_exp.sample import Sampler


@dataclass(frozen=True)
class Panel:
    """`hash` covers ids, seeds and payloads of the tasks, in order."""

    name: str
    tasks: Sequence[Task]
    hash: str


@dataclass(frozen=True)
class Score:
    """What a policy reached on a panel. Crashed episodes count as failures, and are counted."""

    panel: str
    panel_hash: str
    episodes: int
    success: float
    returns: float
    turns: float
    tokens: float
    invalid_share: float
    response_entropy: float
    crashed: int
    by_kind: dict[str, float]

    def metrics(self, prefix: str) -> dict[str, float]:
        """Flat numbers for the log: `eval/...`."""
        numbers = {k: float(v) for k, v in asdict(self).items() if isinstance(v, int | float)}
        kinds = {f"success_{kind}": value for kind, value in self.by_kind.items() if kind}
        return {f"{prefix}{name}": value for name, value in (numbers | kinds).items()}


def panel(world: World, name: str, tasks: int = 0) -> Panel:
    """The panel of a split; `tasks` > 0 takes its first ones only, under a name that says so."""
    full = world.tasks(name)
    if tasks > len(full):
        raise ConfigError("evaluation.tasks", tasks, f"the panel {name!r} has {len(full)} tasks")
    chosen = list(full[:tasks] if tasks else full)
    text = json.dumps([asdict(task) for task in chosen], sort_keys=True)
    return Panel(f"{name}[:{tasks}]" if tasks else name, chosen, sha256(text.encode()).hexdigest()[:12])


def play(panel: Panel, rollout: Rollout, sampler: Sampler, repeats: int = 1, at_once: int = 256) -> list[Trajectory]:
    """Play every task of the panel `repeats` times, `at_once` episodes at a time (this bounds memory)."""
    episodes = [
        Episode(task, draw, repeat, ("panel", panel.name, task.id, repeat))
        for draw, task in enumerate(panel.tasks)
        for repeat in range(repeats)
    ]
    played: list[Trajectory] = []
    for start in range(0, len(episodes), at_once):
        played += rollout.play(episodes[start : start + at_once], sampler)
    return played


def score(panel: Panel, played: Sequence[Trajectory]) -> Score:
    """Summarise; a partial panel is refused, not averaged."""
    repeats, rest = divmod(len(played), len(panel.tasks))
    assert not rest, f"{len(played)} episodes are not a whole number of passes over {len(panel.tasks)} tasks"
    assert repeats, "the panel was not played"
    responses = [r for t in played for r in t.responses]
    kinds = sorted({t.task.kind for t in played})
    return Score(
        panel=panel.name,
        panel_hash=panel.hash,
        episodes=len(played),
        success=_mean([_won(t) for t in played]),
        returns=_mean([t.ret for t in played]),
        turns=_mean([len(t.responses) for t in played]),
        tokens=_mean([t.tokens for t in played]),
        invalid_share=_mean([not r.valid for r in responses]),
        response_entropy=_mean([r.entropy for r in responses]),
        crashed=sum(t.ended == CRASHED for t in played),
        by_kind={kind: _mean([_won(t) for t in played if t.task.kind == kind]) for kind in kinds},
    )


def _won(trajectory: Trajectory) -> float:
    return 0.0 if trajectory.ended == CRASHED else trajectory.won


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
