"""Chooses the sampler that generates responses: the policy in this process, TRL's vLLM engine, or the servers of `launch`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from aem_exp import config, policy
from aem_exp.cluster import distributed, rendezvous
from aem_exp.config import Launch
from aem_exp.rollout.sampling.agreement import Agreement
from aem_exp.rollout.sampling.base import Sampler, SamplingParams
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.rollout.sampling.trl_engine import EngineSampler
from aem_exp.rollout.sampling.vllm import ServerSampler
from aem_exp.rollout.sampling.vllm_client import Servers
from aem_exp.run.context import LoadedPolicy, RunContext

if TYPE_CHECKING:
    from aem_exp.training.trainer import AEMTrainer

SamplerFactory = Callable[["AEMTrainer", SamplingParams], Sampler]  # builds a sampler of the trainer's policy


@contextmanager
def connect_servers(launch: Launch, run_dir: Path) -> Iterator[Servers | None]:
    """Connect to the vLLM servers; None if the run uses none. The first process holds their lock and releases it at the end.

    Raises:
        ConfigError: another run uses the servers, or the folder has no server URLs.
        RunError: the servers of this job did not start.
    """
    if launch.sampler != "served":
        yield None
        return
    folder = _find_servers(launch, run_dir)
    lock = rendezvous.lock_servers(folder) if distributed.is_main_process() else None
    servers = Servers(folder, launch.server_seconds)
    try:
        yield servers
    finally:
        servers.cancel()
        if lock:
            rendezvous.release_servers(folder)
            lock.release()


def _find_servers(launch: Launch, run_dir: Path) -> Path:
    """Return the folder with the server URLs: `launch.servers`, or the job's own folder once its servers have started."""
    if launch.servers:
        return Path(launch.servers)
    folder = rendezvous.job_folder(run_dir)
    distributed.broadcast_from_main(
        lambda: rendezvous.wait_for_servers(folder, launch.server_nodes, launch.server_seconds)
    )
    return folder


def build_publisher(
    context: RunContext, loaded: LoadedPolicy, servers: Servers | None
) -> Callable[["AEMTrainer"], dict[str, float]] | None:
    """Return a function that sends the newest weights to the engines and checks that they use them; None without engines."""
    experiment, launch = context.experiment, context.experiment.launch
    if not servers and not launch.trainer.get("use_vllm"):
        return None
    from aem_exp.rollout.sampling import weight_sync  # imports TRL's vLLM client
    from aem_exp.training.weight_agreement import CheckedPublisher

    if servers:
        servers.weights.context = config.max_context(experiment)
        publisher = weight_sync.make_publisher(servers, launch.server_weights)
    else:
        publisher = weight_sync.EnginePublisher(None if launch.gpus_per_node else context.folder / rendezvous.WEIGHTS)
    agreement = Agreement(len(loaded.tokenizer), experiment.env.context_tokens)
    exact = experiment.model.dtype == "float32" and not experiment.trainer.bf16
    return CheckedPublisher(publisher, agreement, exact=exact)


def choose_sampler(
    context: RunContext, loaded: LoadedPolicy, servers: Servers | None, on_token: Callable[[int], None] | None
) -> SamplerFactory:
    """Return the sampler factory for `launch.sampler`. The local sampler calls `on_token` with the length of the current turn."""
    experiment, end_ids = context.experiment, loaded.chat.end_ids

    def build(trainer: "AEMTrainer", sampling: SamplingParams) -> Sampler:
        if servers:
            vocabulary = policy.vocabulary_size(experiment.model, context.weights)
            rank = trainer.accelerator.process_index
            return ServerSampler(servers, end_ids, sampling, vocabulary=vocabulary, rank=rank)
        if experiment.launch.sampler == "engine":
            return EngineSampler(trainer, end_ids, sampling)
        return LocalSampler(loaded.model, end_ids, sampling, on_token)

    return build
