"""Options of the vLLM engine in the trainer's process, which TRL starts but does not configure completely."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aem_exp.config import Experiment
from aem_exp.rollout.sampling import vllm_cpu
from aem_exp.rollout.sampling.trl_engine import override_attributes


@contextmanager
def engine_options(experiment: Experiment, weights: str) -> Iterator[None]:
    """Start vLLM in the data type of the trainer, and with what a CPU needs, if TRL starts it within this context.

    TRL passes no data type, and vLLM then plays weights of float32 in bfloat16.
    """
    launch = experiment.launch
    if not launch.trainer.get("use_vllm"):
        yield
        return
    from trl.generation import vllm_generation

    start = vllm_generation.LLM
    dtype = "bfloat16" if experiment.trainer.bf16 else experiment.model.dtype
    options: dict[str, Any] = {"dtype": dtype, "use_tqdm_on_load": False}
    if not launch.gpus_per_node:
        for name, value in vllm_cpu.ENGINE_VARIABLES.items():
            os.environ.setdefault(name, value)
        vllm_cpu.check_head_size(weights)
        options |= vllm_cpu.ENGINE_OPTIONS

    def start_engine(**arguments: Any) -> Any:
        if not launch.gpus_per_node:  # without chunks, a prompt must fit into one batch
            arguments["max_num_batched_tokens"] = max(
                arguments["max_num_batched_tokens"], arguments["max_model_len"] or 0
            )
        return start(**arguments | options)

    with override_attributes(vllm_generation, {"LLM": start_engine}):
        yield
