"""What test_trainer_laws trains in one process, and, run by it under torchrun, in two: the toy for two steps.

In two, each has the whole policy, or (`pieces`) a part of it.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (environment first)
import pieces
import torch
import toy

from aem_exp import sharded

KINDS = ("grpo", "dapo", "dr_grpo")


def weights(kind: str, folder: Path, how: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """The toy's, after two steps; `how`: the launch's own settings of TRL."""
    settings = {
        "loss_type": kind,
        "beta": 0.05,
        "entropy_coef": 0.01,
        "mini_batch": 7,
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    run = toy.experiment("window", learning_rate=1e-3, **settings)
    run = replace(run, launch=replace(run.launch, trainer=run.launch.trainer | (how or {})))
    trainer = toy.trainer(folder, run, lam=1.0, device_rows=3)
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    return sharded.gathered(trained) or trained.state_dict()


def main(folder: Path, how: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    for kind in KINDS:
        state = weights(kind, folder, how)
        if torch.distributed.get_rank() == 0:
            torch.save(state, folder / f"{kind}-{torch.distributed.get_world_size()}.pt")


if __name__ == "__main__":
    if sys.argv[2:] == ["pieces"]:
        pieces.on_cpus()
        main(Path(sys.argv[1]), pieces.SETTINGS)
    else:
        main(Path(sys.argv[1]), {})
