"""Under torchrun, two processes with a policy in pieces (`pieces`): each phase of a step weighed, and what `jobs.memory` says.

Prints a line of JSON per phase: what was held, and what was said.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (environment first)
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param
from transformers import training_args

from aem_exp.jobs import memory
from aem_exp.jobs.memory_trace import Meter
from aem_exp.training.trainer import TrainerHooks
from support import cpu_fsdp, peak_memory

SETTINGS = (
    peak_memory.Setting(
        "bf16, checkpointing", layers=6, hidden=256, tied=False, rows=2, autocast=True, checkpointing=True
    ),
    peak_memory.Setting("bf16", layers=6, hidden=512, tied=False, rows=2, autocast=True),
    peak_memory.Setting("fp32, checkpointing", layers=6, hidden=512, tied=False, rows=2, checkpointing=True),
)


class PiecesMeter(Meter):
    """Also sees the storages that FSDP2 fills and empties in place."""

    def count(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        super().count(getattr(tensor, "_local_tensor", tensor), kind)

    def follow(self, name: str) -> None:
        resize = getattr(_fsdp_param, name)

        def resized(tensor: torch.Tensor, *size: Any) -> None:
            resize(tensor, *size)
            storage = tensor.untyped_storage()
            kind, _ = self._known.get(id(storage), (self.kind, 0))
            if id(storage) in self._known:
                self._gone(id(storage))
                self._change(id(storage), kind, storage.nbytes())
            else:
                self.count(tensor)

        setattr(_fsdp_param, name, resized)


def measure_phases(setting: peak_memory.Setting, folder: Path) -> None:
    how = {"activation_checkpointing": setting.checkpointing, "state_dict_type": "SHARDED_STATE_DICT", "version": 2}
    trainer = peak_memory.make_trainer(setting, folder, {"fsdp": True, "fsdp_config": how})
    meter, held, played = PiecesMeter(), dict[str, int](), list[Any]()
    trainer.hooks = TrainerHooks(lambda step, credit: played.extend(credit.played))

    def watched(phase: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any, **kwargs: Any) -> Any:
            meter.start_section()
            out = act(*args, **kwargs)
            held[phase] = max(held.get(phase, 0), meter._peak)
            return out

        return watch

    trainer.play = watched("play", trainer.play)
    trainer.build_updates = watched("scoring", trainer.build_updates)
    trainer.training_step = watched("update", trainer.training_step)
    for name in ("alloc_storage", "free_storage"):
        meter.follow(name)
    with meter:
        for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
            meter.count(tensor)
        trainer.train()
    process = peak_memory.process_spec(setting, *peak_memory.lengths(played), ranks=2, episodes=peak_memory.ROWS)
    need = memory.estimate_memory(replace(process, passes=replace(process.passes, processes=2)))
    for phase, most in held.items() if torch.distributed.get_rank() == 0 else ():
        before = 0.0 if phase == "update" else need.phases[phase]["optimizer"]  # there are no moments yet
        said = sum(need.phases[phase].values()) - before
        print(json.dumps({"setting": setting.name, "phase": phase, "held": most, "said": said}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    cpu_fsdp.allow_fsdp_on_cpus()
    training_args.is_torch_bf16_gpu_available = lambda: True  # what would refuse bf16 without `use_cpu`
    with tempfile.TemporaryDirectory(suffix=os.environ["RANK"]) as place:
        measure_phases(SETTINGS[int(sys.argv[1])], Path(place))
