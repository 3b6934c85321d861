"""Fully sharded weights (FSDP2): the full weights are gathered before a rollout, because episodes need unequal numbers of
forward passes, and are sharded again after it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule


def enable_ram_efficient_loading(settings: Mapping[str, Any]) -> None:
    """Where `fsdp_config` asks for it, have one process of a node read weights, and the others take them from the first when
    they are cut up. It is transformers that reads, and it goes by the environment; TRL would set that too late for us."""
    if (settings.get("fsdp_config") or {}).get("cpu_ram_efficient_loading"):
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


@contextmanager
def full_weights(policy: Any, reshard: bool = True) -> Iterator[None]:
    """Hold all weights in each process: a pass of one then waits for no other. Entered by all of them.

    `reshard`: in training, a layer is in pieces again after its forward pass (`reshard_after_forward`).
    """
    if not isinstance(policy, FSDPModule):
        yield
        return
    sharded = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    policy.set_reshard_after_forward(False)
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
        policy.set_reshard_after_forward(reshard)


def gather_state_dict(policy: Any) -> dict[str, Tensor] | None:
    """All weights on the CPU of the first process, and none on the others; None where the policy is not in pieces."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if not isinstance(policy, FSDPModule):
        return None
    return get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
