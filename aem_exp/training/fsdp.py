"""Sharded weights (FSDP2): gathers the full weights for a rollout and shards them again after it.

In a rollout, the ranks need different numbers of forward passes, but a sharded forward pass needs all ranks at once.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule


def enable_ram_efficient_loading(settings: Mapping[str, Any]) -> None:
    """Apply `cpu_ram_efficient_loading` of `fsdp_config`: one process per node reads the weights and shares them at sharding.

    transformers reads environment variables when it loads a model, and TRL sets them only after our model is loaded.
    """
    if (settings.get("fsdp_config") or {}).get("cpu_ram_efficient_loading"):
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


@contextmanager
def full_weights(policy: Any, reshard: bool = True) -> Iterator[None]:
    """Gather all weights in each process, so that each can run forward passes alone. All processes must enter the context.

    Args:
        reshard: the setting `reshard_after_forward` of training, restored at the end.
    """
    if not isinstance(policy, FSDPModule):
        yield
        return
    policy.set_reshard_after_forward(False)
    for module in _sharded_modules(policy):
        module.unshard()
    try:
        yield
    finally:
        free_full_weights(policy)
        policy.set_reshard_after_forward(reshard)


def free_full_weights(policy: Any) -> None:
    """Free gathered weights, if there are any, so that `policy.parameters()` are the shards.

    A forward pass leaves the weights of the outermost module gathered.
    """
    for module in _sharded_modules(policy):
        module.reshard()


def _sharded_modules(policy: Any) -> list[FSDPModule]:
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def gather_state_dict(policy: Any) -> dict[str, Tensor] | None:
    """All weights on the CPU of the first process, an empty dict on the others; None if the policy is not sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if not isinstance(policy, FSDPModule):
        return None
    return get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
