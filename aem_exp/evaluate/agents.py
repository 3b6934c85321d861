"""The agents of an evaluation: a model with a local or served sampler, uniformly random admissible actions, or an agent
that the env provides.
"""

import logging
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch

from aem_exp import policy
from aem_exp.cluster import rendezvous
from aem_exp.config import Experiment, Model
from aem_exp.envs import Task, Turn, World, parsing
from aem_exp.envs.executor import EnvExecutor, Reply, SerialExecutor
from aem_exp.envs.workers import make_executor
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.play import Rollout, Watcher
from aem_exp.rollout.sampling import vllm_cpu
from aem_exp.rollout.sampling.agreement import EXACT_GAP, FIRST_GAP, Agreement, next_token_logps
from aem_exp.rollout.sampling.base import IndependentSampler, Sample, SamplingParams, keyed_generator
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.rollout.sampling.vllm import ServerSampler
from aem_exp.rollout.sampling.vllm_client import Servers
from aem_exp.rollout.types import Ending, Episode, Response, Trajectory

log = logging.getLogger("aem_exp")
MEMORY_FACTOR = 3  # free memory that a comparison with servers needs, as a multiple of the weights on disk
RANDOM, SCRIPTED, ORACLE = "random", "scripted", "oracle"  # agents without a model
ModelSampler = LocalSampler | ServerSampler
TrajectoryStream = Generator[Trajectory, None, None]
PlayFunction = Callable[[Sequence[Episode]], TrajectoryStream]  # yields the trajectories in order
IDENTITY_SETTINGS = ("dtype", "attention", "system", "thinking")  # settings of a model that change its responses


@dataclass(frozen=True)
class Agent:
    """An agent of an evaluation, with or without a model."""

    name: str
    model: Model | None = None
    folder: str = ""
    """Folder of the model's weights."""
    steps: int = 0
    """Number of steps that the model was trained for."""

    def identity(self) -> dict[str, Any]:
        """Return what decides its responses, except the temperature; without neutral settings, so new ones change no hash."""
        if self.model is None:
            return {}
        settings, neutral = asdict(self.model), asdict(Model())
        chosen = {key: settings[key] for key in IDENTITY_SETTINGS if settings[key] != neutral[key]}
        return {"model": chosen, "weights": policy.fingerprint(self.folder)}


@contextmanager
def open_agent(
    agent: Agent, experiment: Experiment, world: World, temperature: float, at_once: int, watcher: Watcher
) -> Iterator[PlayFunction]:
    """Open an agent; yield a function that plays episodes, `at_once` at a time."""
    launch, rules = experiment.launch, experiment.env
    at_once = min(at_once, getattr(world, "episodes_at_once", at_once))
    if agent.name in (SCRIPTED, ORACLE) or (agent.name == RANDOM and hasattr(world, "random_action")):
        with closing(SerialExecutor(world)) as local:  # these agents read the environments' state in this process
            choose = partial(_world_response, world, agent.name, local)
            yield _play_in_chunks(
                lambda episodes: play_without_model(episodes, local, choose, rules.max_turns), at_once
            )
        return
    with closing(make_executor(world, rules.make, launch)) as executor:
        if agent.model is None:
            with closing(world.env()) as env:
                choose = partial(random_action, env.parse)
                yield _play_in_chunks(
                    lambda episodes: play_without_model(episodes, executor, choose, rules.max_turns), at_once
                )
            return
        with open_sampler(agent, experiment, temperature) as (sampler, chat):
            rollout = Rollout(executor, rules, chat, at_once, watcher)
            if isinstance(sampler, IndependentSampler):
                yield partial(rollout.stream, sampler=sampler)
            else:
                sampler.watch = watcher.token
                yield _play_in_chunks(partial(rollout.play, sampler=sampler), at_once)


@contextmanager
def open_sampler(agent: Agent, experiment: Experiment, temperature: float) -> Iterator[tuple[ModelSampler, Chat]]:
    """Open the local or served sampler of a model; yield it with its chat format."""
    assert agent.model is not None
    open_factory = _served_sampler_factory if experiment.launch.sampler == "served" else _local_sampler_factory
    with open_factory(agent, experiment) as (make, tokenizer):
        chat = Chat(tokenizer, agent.model.system, agent.model.thinking)
        yield make(chat.end_ids, SamplingParams(temperature)), chat


SamplerFactory = Callable[[Sequence[int], SamplingParams], ModelSampler]  # end tokens, sampling parameters -> sampler


@contextmanager
def _local_sampler_factory(agent: Agent, experiment: Experiment) -> Iterator[tuple[SamplerFactory, Any]]:
    """Load a model in this process; yield its sampler factory and its tokenizer."""
    assert agent.model
    launch = experiment.launch
    if launch.threads:
        torch.set_num_threads(launch.threads)
    device = policy.select_device(launch)
    model, tokenizer = policy.load(agent.model, agent.folder, experiment.seed)
    trained_in_bf16 = experiment.trainer.bf16
    with torch.autocast(device.type, torch.bfloat16, enabled=trained_in_bf16):
        yield partial(LocalSampler, model.to(device)), tokenizer


@contextmanager
def _served_sampler_factory(agent: Agent, experiment: Experiment) -> Iterator[tuple[SamplerFactory, Any]]:
    """Let the servers load the weights of a model; yield its sampler factory and its tokenizer."""
    assert agent.model and experiment.launch.servers
    tokenizer, folder = policy.load_tokenizer(agent.model, agent.folder), Path(experiment.launch.servers)
    lock = rendezvous.lock_servers(folder)
    try:
        servers = Servers(folder, experiment.launch.server_seconds)
        servers.weights.agreement = _expect_weights(agent, experiment, len(tokenizer))
        try:
            servers.require_weights(
                _weights_to_load(agent.folder, folder),
                policy.weight_names(agent.folder),
                experiment.env.context_tokens,
            )
            yield (
                partial(ServerSampler, servers, vocabulary=policy.vocabulary_size(agent.model, agent.folder)),
                tokenizer,
            )
        finally:
            servers.cancel()
            shutil.rmtree(folder / rendezvous.WEIGHTS, ignore_errors=True)
    finally:
        lock.release()


def _weights_to_load(weights: str, servers: Path) -> Path:
    """The folder that servers load: `weights`, or a copy in the servers' folder that has the head of a tied model, too."""
    if not vllm_cpu.is_tied(weights):
        return Path(weights)
    target = servers / rendezvous.WEIGHTS / Path(weights).name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    vllm_cpu.write_weights_with_head(Path(weights), target)
    return target


def _expect_weights(agent: Agent, experiment: Experiment, vocabulary: int) -> Agreement | None:
    """The log-probs that servers with these weights must report; None if the model does not fit into memory here."""
    assert agent.model
    size = sum(file.stat().st_size for file in Path(agent.folder).glob("*.safetensors"))
    if MEMORY_FACTOR * size > psutil.virtual_memory().available:
        log.warning("the servers are not compared with %s: it does not fit into the memory here", agent.folder)
        return None
    model, _ = policy.load(agent.model, agent.folder, experiment.seed)
    is_exact = agent.model.dtype == "float32" and not experiment.trainer.bf16
    agreement = Agreement(vocabulary, experiment.env.context_tokens)
    agreement.expect(next_token_logps(model, agreement.prompts, torch.device("cpu")))
    agreement.limit = EXACT_GAP if is_exact else FIRST_GAP
    return agreement


def _play_in_chunks(play: Callable[[Sequence[Episode]], list[Trajectory]], size: int) -> PlayFunction:
    """Play episodes `size` at a time; the next chunk starts when the caller asks for its first trajectory."""

    def stream(episodes: Sequence[Episode]) -> TrajectoryStream:
        for start in range(0, len(episodes), size):
            yield from play(episodes[start : start + size])

    return stream


# episode, its slot, last turn, number of that turn -> response
ResponseFunction = Callable[[Episode, int, Turn, int], str]


def play_without_model(
    episodes: Sequence[Episode], executor: EnvExecutor, choose: ResponseFunction, max_turns: int
) -> list[Trajectory]:
    """Play episodes with an agent that has no model."""
    played = [Trajectory(episode.task, episode.draw, episode.member, ended=Ending.TURNS) for episode in episodes]
    replies = executor.reset({slot: episode.task for slot, episode in enumerate(episodes)})
    for slot, reply in replies.items():
        played[slot].goal = reply.goal
    for number in range(max_turns):
        turns = {slot: turn for slot, reply in replies.items() if (turn := _record_reply(played[slot], reply))}
        responses = {slot: choose(episodes[slot], slot, turn, number) for slot, turn in turns.items()}
        for slot, turn in turns.items():
            played[slot].responses.append(Response([], Sample([], [], []), turn.observation, responses[slot]))
        replies = executor.step(responses)
    for slot, reply in replies.items():
        _record_reply(played[slot], reply)
    return played


def random_action(parse: Callable[[str], str], episode: Episode, slot: int, turn: Turn, number: int) -> str:
    """Return a random admissible action, in the format that the env's `parse` reads."""
    random = keyed_generator((*episode.key, RANDOM, number))
    return parsing.format_response(parse, turn.actions[int(random.integers(len(turn.actions)))]) if turn.actions else ""


def _world_response(
    world: Any, name: str, executor: SerialExecutor, episode: Episode, slot: int, turn: Turn, number: int
) -> str:
    """Return the response of an agent that the env provides."""
    env, random = executor.envs[slot], Random(f"{episode.key} {number}")
    if name == RANDOM:
        return world.random_action(env, random)
    return world.oracle(env) if name == ORACLE else world.expert(env, random)


def _record_reply(trajectory: Trajectory, reply: Reply) -> Turn | None:
    """Record a reply of the env; return its turn if the episode continues."""
    if reply.turn is None:
        trajectory.ended, trajectory.error = Ending.CRASHED, reply.error
        return None
    if trajectory.responses:
        response, turn = trajectory.responses[-1], reply.turn
        response.reward, response.valid, response.metrics = turn.reward, turn.valid, turn.metrics
    if reply.turn.done:
        trajectory.ended = Ending.OVER if reply.turn.terminated else Ending.STOPPED
    return None if reply.turn.done else reply.turn


def unavailable_reason(name: str, experiment: Experiment, world: World, task: Task) -> str | None:
    """Return why an agent without a model cannot play this env; None if it can."""
    if name != RANDOM:
        method = {SCRIPTED: "expert", ORACLE: "oracle"}[name]
        return None if hasattr(world, method) else f"this env has no {name} agent"
    if hasattr(world, "random_action"):
        return None
    with closing(make_executor(world, experiment.env.make, replace(experiment.launch, workers=0))) as executor:
        reply = executor.reset({0: task})[0]
    if reply.turn is None:
        return f"the env failed at its reset: {reply.error}"
    return None if reply.turn.actions else "this env does not list its admissible actions"
