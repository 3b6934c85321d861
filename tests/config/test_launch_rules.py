"""Contradictions within `launch`, and between it and the rest."""

import pytest
from support.configs import assert_refused

pytestmark = pytest.mark.usefixtures("clean")


TWO = "launch.gpus_per_node=2 | launch.trainer={fsdp:true"
SERVED, MODE = "launch.sampler=served | launch.servers=/s", "launch.trainer.vllm_importance_sampling_mode"
ENGINE = "launch.sampler=engine | launch.gpus_per_node=1 | launch.trainer={use_vllm:true}"
REFUSED = [  # overrides, the field of the error, and a fact that the error must state
    (
        "launch=gpu1 | launch.sampler=engine | launch.trainer={use_vllm: true, vllm_tensor_parallel_size: 2}",
        "launch.trainer.vllm_tensor_parallel_size",
        "must be 1",
    ),
    ("launch.trainer.vllm_mode=server", "launch.trainer.vllm_mode", "launch.trainer.use_vllm=true"),
    ("launch.trainer.use_vllm=true", "launch.trainer.use_vllm", "launch.sampler=engine"),
    (
        "launch.sampler=engine | launch.trainer.use_vllm=true | launch.trainer.vllm_enable_sleep_mode=true",
        "launch.trainer.vllm_enable_sleep_mode",
        "launch.gpus_per_node=0",
    ),
    (f"{SERVED} | launch.server_weights=adapter", "launch.server_weights", "model.lora"),
    ("launch.env_seconds=3", "launch.env_seconds", "launch.workers above 0"),
    ("launch.worker_prefix=srun", "launch.worker_prefix", "launch.workers above 0"),
    ("launch.sampler=served", "launch.servers", "launch.server_nodes above 0"),
    ("launch.servers=/s", "launch.servers", "launch.sampler=served"),
    ("launch.server_seconds=9", "launch.server_seconds", "launch.sampler=served"),
    (f"{SERVED} | launch.server_nodes=1", "launch.servers", "launch.server_nodes"),
    ("launch.sampler=served | launch.server_nodes=1", "launch.server_nodes", "launch.where=slurm"),
    (f"{SERVED} | launch.server_weights=nccl", "launch.server_weights", "launch.gpus_per_node=0"),
    (f"{SERVED} | launch.trainer.use_vllm=true", "launch.trainer.use_vllm", "launch.sampler=engine"),
    (f"{SERVED} | launch.trainer.vllm_mode=server", "launch.trainer.vllm_mode", "launch.trainer.use_vllm=true"),
    (f"{ENGINE} | launch.trainer.vllm_mode=server", "launch.trainer.vllm_mode", "launch.sampler=served"),
    (f"{SERVED} | launch.trainer.vllm_group_port=1", "launch.trainer.vllm_group_port", "launch.servers"),
    (f"{SERVED} | {MODE}=sequence_mask", MODE, "token_truncate"),
    ("launch.gpus_per_node=1", "launch.trainer.use_cpu", "launch.gpus_per_node=1"),
    ("launch.nodes=2", "launch.nodes", "launch.where=slurm"),
    ("launch.where=slurm", "launch.hours", "above 0"),
    ("launch.trainer.fsdp=true", "launch.trainer.fsdp", "launch.gpus_per_node above 1"),
    ("launch.trainer.deepspeed=x.json", "launch.trainer.deepspeed", "launch.trainer.fsdp"),
    ("launch.trainer={fsdp_config:{version:2}}", "launch.trainer.fsdp_config", "launch.trainer.fsdp=true"),
    ("launch.trainer={fsdp:true,fsdp_config:{cpu_ofload:1}}", "launch.trainer.fsdp_config.cpu_ofload", "cpu_offload?"),
    (f"{TWO},fsdp_config:{{version:1}}}}", "launch.trainer.fsdp_config.version", "must be 2"),
    (f"{TWO},gradient_checkpointing:true}}", "launch.trainer.gradient_checkpointing", "activation_checkpointing"),
    (f"{TWO}}} | launch.sampler=engine", "launch.sampler", "vLLM"),
    (
        f"{TWO},fsdp_config:{{state_dict_type:SHARDED_STATE_DICT}}}} | model.lora={{r: 4}}",
        "launch.trainer.fsdp_config.state_dict_type",
        "FULL_STATE_DICT",
    ),
    (
        f"{TWO},fsdp_config:{{cpu_ram_efficient_loading:true}}}} | +trainer.beta=0.01",
        "launch.trainer.fsdp_config.cpu_ram_efficient_loading",
        "trainer.beta",
    ),
]


@pytest.mark.parametrize(("overrides", "field", "fact"), REFUSED, ids=[case[0] for case in REFUSED])
def test_contradictions_of_launch_are_refused(composed, overrides, field, fact):
    assert_refused(composed, overrides, field, fact)
