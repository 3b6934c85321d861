"""Sends the trainer's newest weights to the engines that generate: before each rollout that follows an update.

The weights travel as a safetensors file (`FilePublisher`), as a file of the LoRA adapter only (`AdapterPublisher`), from GPU to
GPU over NCCL (`NCCLPublisher`), or within this process (`EnginePublisher`).
"""

import secrets
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from trl.generation.vllm_generation import VLLMGeneration

from aem_exp.cluster.rendezvous import WEIGHTS, find_free_port
from aem_exp.rollout.sampling.agreement import TOP_TOKENS, Agreement
from aem_exp.rollout.sampling.vllm_client import Servers

FILE = "model.safetensors"


class Publisher(Protocol):
    """Sends the weights of a trainer to engines, and compares the engines with the trainer.

    All processes of a run call it with their trainers.
    """

    def __call__(self, trainer: Any, agreement: Agreement) -> None:
        """Send the weights, then record the gap of each engine in `agreement`."""


class TrainerWeights(VLLMGeneration):
    """Gives access to a trainer's weights by name. `_init_vllm` is overridden, so that TRL starts and contacts no server."""

    def __init__(self, trainer: Any):
        super().__init__(trainer.model, trainer.accelerator, trainer.processing_class, mode="server")

    def _init_vllm(self) -> None: ...


class FilePublisher:
    """Publishes weights as a file on a shared file system."""

    def __init__(self, servers: Servers):
        self.servers = servers
        self._folder = servers.folder / WEIGHTS
        self._pushes = 0

    def __call__(self, trainer: Any, agreement: Agreement) -> None:
        is_main, self.servers.weights.agreement = trainer.accelerator.is_main_process, agreement
        self._pushes += 1
        # A new folder for each push: a server may have the previous file memory-mapped.
        folder = self._folder / f"{trainer.state.global_step}-{self._pushes}"
        self._write(trainer, folder)
        if is_main:
            self._load(folder)
            for other in self._folder.iterdir():
                if other != folder:
                    shutil.rmtree(other)
        trainer.accelerator.wait_for_everyone()
        if not is_main:
            self.servers.mark_updated(folder)

    def _load(self, folder: Path) -> None:
        self.servers.load(folder)

    def _write(self, trainer: Any, folder: Path) -> None:
        is_main, weights = trainer.accelerator.is_main_process, {}
        for name, weight in TrainerWeights(trainer)._iter_named_params():
            if is_main:
                weights[name] = _copy_to_cpu(weight, trainer)
        if is_main:
            write_weights(weights | copy_tied_weights(trainer, weights), folder)


class AdapterPublisher(FilePublisher):
    """Publishes the LoRA adapter alone. The servers were started with the weights that it belongs to."""

    def __init__(self, servers: Servers):
        super().__init__(servers)
        self._name = ""

    def _load(self, folder: Path) -> None:
        self.servers.load(folder, adapter=self._name)

    def __call__(self, trainer: Any, agreement: Agreement) -> None:
        from accelerate.utils import broadcast_object_list

        # A name that no earlier run has used: a server keeps the prefix cache of an adapter by its name.
        names = [f"adapter-{secrets.token_hex(4)}"]
        if trainer.accelerator.num_processes > 1:
            broadcast_object_list(names)
        self._name = names[0]
        super().__call__(trainer, agreement)
        if not trainer.accelerator.is_main_process:
            self.servers.mark_updated(self.servers.weights.folder, self._name)

    def _write(self, trainer: Any, folder: Path) -> None:
        if not trainer.accelerator.is_main_process:
            return
        part = _new_part(folder)
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(part)
        part.rename(folder)


class NCCLPublisher:
    """Publishes weights over NCCL. It uses one TRL client per server; they are created at the first call."""

    def __init__(self, servers: Servers):
        self.servers = servers
        self._policy: TrainerWeights | None = None
        self._clients: list[Any] = []

    def __call__(self, trainer: Any, agreement: Agreement) -> None:
        is_main, self.servers.weights.agreement = trainer.accelerator.is_main_process, agreement
        if self._policy is None:
            self._policy = TrainerWeights(trainer)
            if is_main:
                self._clients = [self._connect(url, trainer.accelerator.device) for url in self.servers.urls]
            trainer.accelerator.wait_for_everyone()
        for number in range(len(self.servers.urls)):
            if is_main:
                self._policy.vllm_client = self._clients[number]
            self._policy.sync_weights()
        trainer.accelerator.wait_for_everyone()
        self.servers.mark_updated(None)
        if is_main:
            self.servers.check_all()

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


class EnginePublisher:
    """Updates the vLLM engine in this process.

    On a CPU, vLLM keeps weights in a packed form into which TRL cannot copy; there the engine reads them from a file.

    Args:
        folder: where that file is written, or None on a GPU.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder

    def __call__(self, trainer: Any, agreement: Agreement) -> None:
        generation = trainer.vllm_generation
        if self._folder is None:
            generation.sync_weights()
        else:
            weights = {name: _copy_to_cpu(weight, trainer) for name, weight in generation._iter_named_params()}
            folder = self._folder / f"rank-{trainer.accelerator.process_index}"
            write_weights(weights | copy_tied_weights(trainer, weights), folder)
            generation.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            generation.llm.reset_prefix_cache()
            shutil.rmtree(folder)
        trainer._last_loaded_step = trainer.state.global_step  # TRL sends the weights itself if this is another step
        self._compare(generation, agreement)

    def _compare(self, generation: Any, agreement: Agreement) -> None:
        from vllm import SamplingParams

        sleeps = generation.enable_sleep_mode
        if sleeps:
            generation.llm.wake_up(tags=["kv_cache"])
        outputs = generation.llm.generate(
            [{"prompt_token_ids": ids} for ids in agreement.prompts],
            sampling_params=SamplingParams(temperature=1.0, max_tokens=1, logprobs=TOP_TOKENS),
            use_tqdm=False,
        )
        if sleeps:  # TRL then sends the weights again when it generates
            generation.llm.sleep(level=2)
            generation._llm_weights_sleeping = True
        tops = [output.outputs[0].logprobs[0] for output in outputs]
        agreement.compare(
            "vLLM in this process", [{token: value.logprob for token, value in top.items()} for top in tops]
        )


def make_publisher(servers: Servers, method: str) -> Publisher:
    """The publisher of `launch.server_weights`."""
    if method == "nccl":
        return NCCLPublisher(servers)
    return AdapterPublisher(servers) if method == "adapter" else FilePublisher(servers)


def copy_tied_weights(trainer: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Copies of the tensors that are tied to others, such as `lm_head.weight`: see `vllm_cpu`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    tied = (model.get_base_model() if hasattr(model, "get_base_model") else model).all_tied_weights_keys
    return {name: weights[source].clone() for name, source in tied.items() if source in weights}


def _copy_to_cpu(weight: Any, trainer: Any) -> Any:
    dtype = torch.bfloat16 if trainer.args.bf16 else weight.dtype  # the dtype of the forward pass
    return weight.detach().to("cpu", dtype, copy=True).contiguous()


def _new_part(folder: Path) -> Path:
    """An empty folder beside `folder`, to be renamed when it is complete."""
    part = folder.with_name(f".{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
    part.mkdir(parents=True)
    return part


def write_weights(weights: dict[str, Any], folder: Path) -> None:
    """Write tensors as a safetensors file in a new folder."""
    from safetensors.torch import save_file

    part = _new_part(folder)
    save_file(weights, part / FILE)
    part.rename(folder)
