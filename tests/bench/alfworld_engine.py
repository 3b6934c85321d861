"""What the contained engine gains over TextWorld's stock class: whole episodes on full-size games, in groups on one game.

An episode is load, reset and 50 steps; both play the same commands and must hear the same words. The stock class is what
`alfworld` starts; its figures do not depend on the group, as it translates a game four times an episode.

.venv/bin/python tests/bench/alfworld_engine.py
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from random import Random

from aem_exp.envs.alfworld import games
from aem_exp.envs.alfworld.engine import Engine

STEPS, GROUP, SIZE = 50, 8, (28, 45)


def stock(folder: Path, game: dict, commands: list[str]) -> tuple[float, list]:
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos

    file = folder / "game.tw-pddl"
    file.write_text(json.dumps(game))
    start = time.process_time()
    infos = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
    env = textworld.start(str(file), infos, wrappers=[AlfredDemangler, AlfredInfos])
    states = [env.reset()]
    states += [env.step(command)[0] for command in commands]
    seconds = time.process_time() - start
    return seconds, [(s["feedback"], tuple(s["admissible_commands"]), s["won"]) for s in states]


def ours(game: dict, script: list[str] | None = None) -> tuple[float, list, list[str]]:
    """The group plays the game; without a script it makes one up, at random."""
    random, said = Random(0), list(script or [])
    start = time.process_time()
    for member in range(GROUP):
        engine = Engine()
        scenes = [engine.start(game)]
        for step in range(STEPS):
            if script is None and member == 0:
                said.append(random.choice(scenes[-1].commands))
            scenes.append(engine.step(said[step]))
        engine.close()
    return (time.process_time() - start) / GROUP, [tuple(scene) for scene in scenes], said


def main() -> None:
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALFWORLD_DATA"] = folder
        ours(games.generate_game("look_at_obj_in_light", "warm", 11, 8)[0])  # imports
        stock(Path(folder), games.generate_game("look_at_obj_in_light", "warm", 11, 8)[0], [])
        for kind in games.KINDS:
            game, _ = games.generate_game(kind, "bench", *SIZE)
            mine, heard, said = ours(game)
            theirs, told = stock(Path(folder), game, said)
            assert heard == told, kind
            ratios.append(theirs / mine)
            print(f"{kind:32} stock {theirs:6.2f} s  ours {mine:6.3f} s an episode  {ratios[-1]:5.1f} x", flush=True)
    print(f"median {statistics.median(ratios):.1f} x, {min(ratios):.1f} to {max(ratios):.1f}; every word equal")


if __name__ == "__main__":
    main()
