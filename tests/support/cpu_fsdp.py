"""Sharded weights without GPUs: torch's FSDP2 works on CPUs over gloo, but accelerate uses it only on GPUs.

As a script, it runs `python -m aem_exp.run RUN_DIR` with accelerate patched.
"""

import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

SETTINGS = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "activation_checkpointing": True, "state_dict_type": "SHARDED_STATE_DICT"},
}


def allow_fsdp_on_cpus() -> None:
    """Patch accelerate: it treats the processes of a run as if each had a GPU, but places tensors on the CPU."""

    original_init = PartialState.__init__

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState.__init__ = lambda self, cpu=False, **more: original_init(self, **more)
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device


if __name__ == "__main__":
    allow_fsdp_on_cpus()
    from aem_exp.run.command import main

    sys.exit(main())
