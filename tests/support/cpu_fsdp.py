"""A policy in pieces where there is no GPU: torch's FSDP2 works on CPUs too, over gloo; only accelerate does not ask it to.

As a script it is `python -m aem_exp.run RUN_DIR`, with accelerate so persuaded.
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
    """From here on, the processes of a run are to accelerate what processes with a GPU each are; they have none."""

    begin = PartialState.__init__

    def device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState.__init__ = lambda self, cpu=False, **more: begin(self, **more)
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = device


if __name__ == "__main__":
    allow_fsdp_on_cpus()
    from aem_exp.run.command import main

    sys.exit(main())
