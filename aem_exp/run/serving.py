"""What generates the episodes of a run: the policy in this process, TRL's engine, or the servers of `launch`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from aem_exp import policy
from aem_exp.cluster import distributed, rendezvous
from aem_exp.config import Launch
from aem_exp.rollout.sampling.base import Sampler, SamplingParams
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.rollout.sampling.trl_engine import EngineSampler
from aem_exp.rollout.sampling.vllm import ServerSampler
from aem_exp.rollout.sampling.vllm_client import Servers
from aem_exp.run.context import LoadedPolicy, RunContext

if TYPE_CHECKING:
    from aem_exp.training.trainer import AEMTrainer

SamplerFactory = Callable[["AEMTrainer", SamplingParams], Sampler]  # a sampler of the policy that this trainer trains


@contextmanager
def connect_servers(launch: Launch, run_dir: Path) -> Iterator[Servers | None]:
    """The servers that generate, None where none do. The first process holds their lock, and releases them at the end.

    Raises:
        ConfigError: another run uses them, or the folder does not say where they are.
        RunError: the servers of this job do not start.
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
    """The folder that says where the servers are: a given one, or that of the job once its servers have started."""
    if launch.servers:
        return Path(launch.servers)
    folder = rendezvous.job_folder(run_dir)
    distributed.broadcast_from_main(
        lambda: rendezvous.wait_for_servers(folder, launch.server_nodes, launch.server_seconds)
    )
    return folder


def build_publisher(servers: Servers, method: str) -> Callable[["AEMTrainer"], None]:
    """What sends the newest weights to the servers; see `launch.server_weights` for the methods."""
    from aem_exp.rollout.sampling.weight_sync import make_publisher  # it imports TRL's client of vLLM

    return make_publisher(servers, method)


def choose_sampler(
    context: RunContext, loaded: LoadedPolicy, servers: Servers | None, on_token: Callable[[int], None] | None
) -> SamplerFactory:
    """What makes samplers, as `launch.sampler` says; `on_token` receives the length of the turn that is sampled here."""
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
