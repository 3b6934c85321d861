"""Run by tests/rollout/test_vllm.py under torchrun: two processes train the toy policy with FSDP and sample from a server."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import conftest  # noqa: F401  (sets environment variables first)
import torch

from aem_exp.cluster import distributed
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.sampling.base import SamplingParams
from aem_exp.rollout.sampling.vllm import ServerSampler
from aem_exp.rollout.sampling.vllm_client import Servers
from support import cpu_fsdp, toy


def main(folder: Path, server_folder: Path) -> None:
    torch.set_num_threads(1)
    cpu_fsdp.allow_fsdp_on_cpus()
    servers, chat = Servers(server_folder, 60.0), Chat(toy.policy(folder)[1])
    run = toy.experiment("full", steps=2, mini_batch=8)
    run = replace(run, launch=replace(run.launch, trainer=run.launch.trainer | cpu_fsdp.SETTINGS))
    rows: list[dict[str, float]] = []
    trainer = toy.trainer(
        folder,
        run,
        lam=1.0,
        make_sampler=lambda t: ServerSampler(
            servers, chat.end_ids, SamplingParams(), vocabulary=len(chat.tokenizer), rank=t.accelerator.process_index
        ),
        trust_sampler=False,
        publish=toy.checked_publisher(servers, chat.tokenizer),
    )
    trainer.aem_callback.report = lambda step, row: rows.append(row)
    trainer.train()
    if trainer.accelerator.is_main_process:
        (server_folder / "rows.json").write_text(json.dumps(rows))
    distributed.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
