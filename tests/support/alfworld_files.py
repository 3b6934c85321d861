"""Writes a small data set in ALFWorld's official layout, with generated games."""

import json
from pathlib import Path
from typing import Any

from aem_exp.envs.alfworld import games
from aem_exp.envs.alfworld.world import COUNTS

GAMES = dict(zip(COUNTS, (24, 6, 6), strict=True))


def write_official_files(folder: Path, counts: dict[str, int] = GAMES) -> Path:
    """Write the data set. Returns the folder for $ALFWORLD_DATA."""
    kinds = list(games.KINDS)
    for split, count in counts.items():
        for number in range(count):
            write_game(folder, split, kinds[number % len(kinds)], number)
    return folder


def write_game(folder: Path, split: str, kind: str, number: int, **changes: Any) -> Path:
    """Write a game and ALFRED's data about it. Returns the folder of the trial."""
    game, errand = games.generate_game(kind, f"{split}-{number}", 11, 8)
    name = f"{kind}-{errand.object}-None-{errand.target}-{number}"
    trial = folder / "json_2.1.1" / split / name / f"trial_T2019_{number:04d}"
    trial.mkdir(parents=True)
    lit = kind == "look_at_obj_in_light"
    params = {"object_target": errand.object, "parent_target": "" if lit else errand.target}
    params |= {"toggle_target": errand.target if lit else "", "mrecep_target": "", "object_sliced": False}
    about = {"task_type": kind, "pddl_params": params}
    (trial / "traj_data.json").write_text(json.dumps(about))
    (trial / "game.tw-pddl").write_text(json.dumps(game | changes))
    return trial
