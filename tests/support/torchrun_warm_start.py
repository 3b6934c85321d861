"""Makes the warm start of an experiment in each of two processes under torchrun; each writes the folder that it got."""

import json
import logging
import sys
from pathlib import Path

import conftest  # noqa: F401  (sets environment variables first)

from aem_exp import config, policy
from aem_exp.cluster import distributed
from aem_exp.config import load
from aem_exp.envs import opening
from aem_exp.run.resume import ResumePoint
from aem_exp.run.warm_start import prepare_weights


def main(outputs: Path, words: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    experiment = load([*words, f"outputs={outputs}"])
    distributed.initialize(cpu=True)
    world, folder = opening.open_world(experiment), config.run_dir(experiment)
    weights = distributed.broadcast_from_main(lambda: policy.make_cached(experiment, world))
    if distributed.is_main_process():
        folder.mkdir(parents=True)
        (folder / "experiment.json").write_text(json.dumps(config.to_dict(experiment)))
    started = prepare_weights(experiment, folder, world, weights, ResumePoint(0, None, False))
    (outputs / f"rank-{distributed.rank()}").write_text(started.weights)
    distributed.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
