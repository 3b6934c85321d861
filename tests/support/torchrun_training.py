"""What test_trainer_laws trains in one process, and, run by it under torchrun, in two: the toy for two steps.

In two, each has the whole policy, or (`pieces`) a part of it.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (environment first)
import torch
from peft import LoraConfig, get_peft_model

from aem_exp import advantages
from aem_exp.cluster import distributed
from aem_exp.training import fsdp
from support import cpu_fsdp, toy

KINDS = ("grpo", "dapo", "dr_grpo", "adapter", "still")


def weights(kind: str, folder: Path, how: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """The toy's, after two steps, and the drift of entropy in the first; `how`: the launch's own settings of TRL."""
    settings = {
        "loss_type": "grpo" if kind in ("adapter", "still") else kind,
        "beta": 0.05,
        "entropy_coef": 0.01,
        "mini_batch": 7,
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    if kind == "still":  # the second step has no loss: weights would decay if it had an update
        settings |= {"beta": 0.0, "entropy_coef": 0.0, "max_grad_norm": 1.0, "weight_decay": 10.0}
    run = toy.experiment("window", learning_rate=1e-3, **settings)
    run = replace(run, launch=replace(run.launch, trainer=run.launch.trainer | (how or {})))
    more: dict[str, Any] = {"model": adapted(folder)} if kind == "adapter" else {}
    more |= {"estimator": Once()} if kind == "still" else {}
    trainer = toy.trainer(folder, run, lam=1.0, device_rows=3, **more)
    rows: list[dict[str, float]] = []
    trainer.aem_callback.report = lambda step, row: rows.append(row)
    trainer.train()
    drift = torch.tensor([value for row in rows[:1] for name, value in row.items() if name.startswith("drift/")])
    trained = trainer.accelerator.unwrap_model(trainer.model)
    return (fsdp.gather_state_dict(trained) or trained.state_dict()) | {"drift": drift}


class Once:
    """GRPO's advantages in the first step, and none after it."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, played: advantages.StepBatch) -> torch.Tensor:
        self.steps += 1
        return advantages.group_normalised(played) * (self.steps == 1)


def adapted(folder: Path) -> Any:
    """The toy's policy under an adapter that is no longer zero, so that it learns from the first step."""
    policy, _ = toy.policy(folder, "window")
    torch.manual_seed(0)
    return get_peft_model(
        policy, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )


def main(folder: Path, how: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    for kind in KINDS:
        state = weights(kind, folder, how)
        if torch.distributed.get_rank() == 0:
            torch.save(state, folder / f"{kind}-{torch.distributed.get_world_size()}.pt")
    distributed.shut_down()


if __name__ == "__main__":
    if sys.argv[2:] == ["pieces"]:
        cpu_fsdp.allow_fsdp_on_cpus()
        main(Path(sys.argv[1]), cpu_fsdp.SETTINGS)
    else:
        main(Path(sys.argv[1]), {})
