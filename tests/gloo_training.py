"""What test_trainer_laws trains in one process, and, run by it under torchrun, in two: the toy for two steps."""

import sys
from pathlib import Path

import conftest  # noqa: F401  (environment first)
import torch
import toy

KINDS = ("grpo", "dapo", "dr_grpo")


def weights(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    settings = {
        "loss_type": kind,
        "beta": 0.05,
        "entropy_coef": 0.01,
        "mini_batch": 7,
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    run = toy.experiment("window", learning_rate=1e-3, **settings)
    trainer = toy.trainer(folder, run, lam=1.0, device_rows=3)
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model).state_dict()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for kind in KINDS:
        state = weights(kind, folder)
        if torch.distributed.get_rank() == 0:
            torch.save(state, folder / f"{kind}-{torch.distributed.get_world_size()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
