"""Sends the trainer's newest weights to the vLLM servers, before each rollout that follows an update.

The weights travel as a safetensors file (`FilePublisher`) or from GPU to GPU over NCCL (`NCCLPublisher`).
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trl.generation.vllm_generation import VLLMGeneration

from aem_exp.cluster.rendezvous import WEIGHTS, find_free_port
from aem_exp.rollout.sampling.vllm_client import Servers

FILE = "model.safetensors"


class TrainerWeights(VLLMGeneration):
    """Gives access to a trainer's weights by name. `_init_vllm` is overridden, so that TRL starts and contacts no server."""

    def __init__(self, trainer: Any):
        super().__init__(trainer.model, trainer.accelerator, trainer.processing_class, mode="server")

    def _init_vllm(self) -> None: ...


class FilePublisher:
    """Publishes weights as a file on a shared file system."""

    def __init__(self, servers: Servers):
        self.servers = servers

    def __call__(self, trainer: Any) -> None:
        is_main, weights = trainer.accelerator.is_main_process, {}
        for name, weight in TrainerWeights(trainer)._iter_named_params():
            if is_main:
                dtype = torch.bfloat16 if trainer.args.bf16 else weight.dtype  # the dtype of the forward pass
                weights[name] = weight.detach().to("cpu", dtype, copy=True).contiguous()
        # A new folder for each update: a server may have the previous file memory-mapped.
        folder = self.servers.folder / WEIGHTS / str(trainer.state.global_step)
        if is_main:
            _write_weights(weights, folder)
            self.servers.load(folder)
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other)
        trainer.accelerator.wait_for_everyone()
        if not is_main:
            self.servers.mark_updated(folder)


class NCCLPublisher:
    """Publishes weights over NCCL. It uses one TRL client per server; they are created at the first call."""

    def __init__(self, servers: Servers):
        self.servers = servers
        self._policy: TrainerWeights | None = None
        self._clients: list[Any] = []

    def __call__(self, trainer: Any) -> None:
        if self._policy is None:
            self._policy = TrainerWeights(trainer)
            if trainer.accelerator.is_main_process:
                self._clients = [self._connect(url, trainer.accelerator.device) for url in self.servers.urls]
            trainer.accelerator.wait_for_everyone()
        for number in range(len(self.servers.urls)):
            if trainer.accelerator.is_main_process:
                self._policy.vllm_client = self._clients[number]
            self._policy.sync_weights()
        trainer.accelerator.wait_for_everyone()
        self.servers.mark_updated(None)

    def _connect(self, url: str, device: Any) -> Any:
        from trl.generation.vllm_client import VLLMClient

        servers = self.servers

        class Client(VLLMClient):
            def check_server(self, *args: Any, **kwargs: Any) -> None:
                # TRL's client sends no API key, but its next request needs one.
                self.session.headers |= servers.headers
                self.session.trust_env = False
                super().check_server(*args, **kwargs)

        client = Client(base_url=url, group_port=find_free_port(""), connection_timeout=servers.seconds)
        client.init_communicator(device=device)
        return client


def make_publisher(servers: Servers, method: str) -> Callable[[Any], None]:
    """A function that sends the weights of a trainer to the servers. All processes of a run call it with their trainers."""
    return NCCLPublisher(servers) if method == "nccl" else FilePublisher(servers)


def _write_weights(weights: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    part = folder.with_name(f".{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
    part.mkdir(parents=True)
    save_file(weights, part / FILE)
    part.rename(folder)
