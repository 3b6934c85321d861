"""Trains the toy policy for two steps: called by test_trainer_laws in one process, and run by it under torchrun in two.

With the argument `sharded`, the two processes share sharded weights; otherwise each has all weights.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (sets environment variables first)
import torch
from peft import LoraConfig, get_peft_model

from aem_exp import advantages
from aem_exp.cluster import distributed
from aem_exp.training import fsdp
from aem_exp.training.modulation import ModulationVariant
from aem_exp.training.token_selection import TokenRules
from support import cpu_fsdp, toy

KINDS = ("grpo", "dapo", "dr_grpo", "adapter", "zero loss", "tokens")
MATCHED = "matched"  # with weights that are not sharded
SIZES = ("grad_norm_mean", "weight_change", "step_kl", "effective_learning_rate", "positive_advantage")
ALL_RULES = TokenRules(0.6, clip_cov_ratio=0.1, clip_cov_min=0.05, clip_cov_max=5.0, kl_cov_ratio=0.1, kl_cov_coef=1.0)


def weights(kind: str, folder: Path, launch_settings: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """The weights after two steps, as `drift` the entropy drift of the first step, and as `sizes` the sizes of both steps.

    Args:
        launch_settings: additional values of `launch.trainer`.
    """
    settings = {
        "loss_type": {"tokens": "dapo", "dapo": "dapo", "dr_grpo": "dr_grpo"}.get(kind, "grpo"),
        "beta": 0.05,
        "entropy_coef": 0.01,
        "mini_batch": 7,
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    if kind == "zero loss":  # the second step has zero loss: an update would shrink the weights by weight decay
        settings |= {"beta": 0.0, "entropy_coef": 0.0, "max_grad_norm": 1.0, "weight_decay": 10.0}
    run = toy.experiment("window", learning_rate=1e-3, **settings)
    run = replace(run, launch=replace(run.launch, trainer=run.launch.trainer | (launch_settings or {})))
    more: dict[str, Any] = {"model": policy_with_adapter(folder)} if kind == "adapter" else {}
    more |= {"variant": ModulationVariant(match="update_norm")} if kind == MATCHED else {}
    more |= {"estimator": FirstStepEstimator()} if kind == "zero loss" else {}
    more |= {"token_rules": ALL_RULES} if kind == "tokens" else {}
    trainer = toy.trainer(folder, run, lam=1.0, device_rows=3, **more)
    rows: list[dict[str, float]] = []
    trainer.aem_callback.report = lambda step, row: rows.append(row)
    trainer.train()
    drift = torch.tensor([value for row in rows[:1] for name, value in row.items() if name.startswith("drift/")])
    sizes = torch.tensor([row.get(f"train/{name}", 0.0) for row in rows for name in SIZES])
    trained = trainer.accelerator.unwrap_model(trainer.model)
    return (fsdp.gather_state_dict(trained) or trained.state_dict()) | {"drift": drift, "sizes": sizes}


class FirstStepEstimator:
    """GRPO's advantages in the first step, 0 in later steps."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, batch: advantages.StepBatch) -> torch.Tensor:
        self.steps += 1
        return advantages.group_normalised(batch) * (self.steps == 1)


def policy_with_adapter(folder: Path) -> Any:
    """The toy policy with a LoRA adapter that is not zero, so that all its weights have gradients from the first step."""
    policy, _ = toy.policy(folder, "window")
    torch.manual_seed(0)
    return get_peft_model(
        policy, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )


def main(folder: Path, launch_settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    for kind in KINDS if launch_settings else (*KINDS, MATCHED):
        state = weights(kind, folder, launch_settings)
        if torch.distributed.get_rank() == 0:
            torch.save(state, folder / f"{kind}-{torch.distributed.get_world_size()}.pt")
    distributed.shut_down()


if __name__ == "__main__":
    if sys.argv[2:] == ["sharded"]:
        cpu_fsdp.allow_fsdp_on_cpus()
        main(Path(sys.argv[1]), cpu_fsdp.SETTINGS)
    else:
        main(Path(sys.argv[1]), {})
