"""The agents of an evaluation: a model with a local or served sampler, uniformly random admissible actions, or an agent
that the world provides.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from aem_exp import policy
from aem_exp.cluster import rendezvous
from aem_exp.config import Experiment, Model
from aem_exp.envs import Task, Turn, World, parsing
from aem_exp.envs.executor import EnvExecutor, Reply, SerialExecutor
from aem_exp.envs.workers import make_executor
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.play import Rollout, Watcher
from aem_exp.rollout.sampling.base import IndependentSampler, Sample, Sampling, keyed_generator
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.rollout.sampling.vllm import ServerSampler
from aem_exp.rollout.sampling.vllm_client import Servers
from aem_exp.rollout.types import CRASHED, OVER, STOPPED, TURNS, Episode, Response, Trajectory

RANDOM, SCRIPTED, ORACLE = "random", "scripted", "oracle"  # those without a model
TrajectoryStream = Generator[Trajectory, None, None]
PlayFunction = Callable[[Sequence[Episode]], TrajectoryStream]  # in order, one by one
IDENTITY_SETTINGS = ("dtype", "attention", "system", "thinking")  # settings of a model that decide what its weights say


@dataclass(frozen=True)
class Agent:
    """A row of an evaluation: a model, its weights in `folder`, after `steps` of training; or one of those that have none."""

    name: str
    model: Model | None = None
    folder: str = ""
    steps: int = 0

    def identity(self) -> dict[str, Any]:
        """What decides how it plays, temperature apart; neutral settings are left out, so that a new one changes nothing."""
        if self.model is None:
            return {}
        settings, neutral = asdict(self.model), asdict(Model())
        chosen = {key: settings[key] for key in IDENTITY_SETTINGS if settings[key] != neutral[key]}
        return {"model": chosen, "weights": policy.fingerprint(self.folder)}


@contextmanager
def open_agent(
    player: Agent, experiment: Experiment, world: World, temperature: float, at_once: int, watcher: Watcher
) -> Iterator[PlayFunction]:
    """The player at its place: a function that plays episodes, `at_once` at a time."""
    launch, rules = experiment.launch, experiment.env
    if player.name in (SCRIPTED, ORACLE):
        with closing(SerialExecutor(world)) as here:  # who looks at the environments has them at hand
            choose = partial(_world_response, world, player.name, here)
            yield _play_in_chunks(lambda episodes: play_without_model(episodes, here, choose, rules.max_turns), at_once)
        return
    with closing(make_executor(world, rules.make, launch)) as stage:
        if player.model is None:
            with closing(world.env()) as env:
                choose = partial(_random_action, env.parse)
                yield _play_in_chunks(
                    lambda episodes: play_without_model(episodes, stage, choose, rules.max_turns), at_once
                )
            return
        with open_sampler(player, experiment, temperature) as (sampler, chat):
            rollout = Rollout(stage, rules, chat, at_once, watcher)
            if isinstance(sampler, IndependentSampler):
                yield partial(rollout.stream, sampler=sampler)
            else:
                sampler.watch = watcher.token
                yield _play_in_chunks(partial(rollout.play, sampler=sampler), at_once)


@contextmanager
def open_sampler(player: Agent, experiment: Experiment, temperature: float) -> Iterator[tuple[Any, Chat]]:
    """What samples for a model, which is loaded here or on servers, and how it is spoken to."""
    assert player.model is not None
    where = _served_sampler_factory if experiment.launch.sampler == "served" else _local_sampler_factory
    with where(player, experiment) as (make, tokenizer):
        chat = Chat(tokenizer, player.model.system, player.model.thinking)
        yield make(chat.end_ids, Sampling(temperature)), chat


SamplerFactory = Callable[[Sequence[int], Sampling], Any]  # a sampler, from end tokens and how it samples


@contextmanager
def _local_sampler_factory(player: Agent, experiment: Experiment) -> Iterator[tuple[SamplerFactory, Any]]:
    """What makes a sampler of a model that is loaded here, and its tokenizer."""
    assert player.model
    launch = experiment.launch
    if launch.threads:
        torch.set_num_threads(launch.threads)
    device = policy.select_device(launch)
    model, tokenizer = policy.load(player.model, player.folder, experiment.seed)
    trained_in_bf16 = experiment.trainer.bf16
    with torch.autocast(device.type, torch.bfloat16, enabled=trained_in_bf16):
        yield partial(LocalSampler, model.to(device)), tokenizer


@contextmanager
def _served_sampler_factory(player: Agent, experiment: Experiment) -> Iterator[tuple[SamplerFactory, Any]]:
    """What makes a sampler of servers that have a model's weights, and its tokenizer."""
    assert player.model and experiment.launch.servers
    tokenizer, where = policy.load_tokenizer(player.model, player.folder), Path(experiment.launch.servers)
    lock = rendezvous.lock_servers(where)
    try:
        servers = Servers(where, experiment.launch.server_seconds)
        try:
            servers.require_weights(
                Path(player.folder), policy.weight_names(player.folder), experiment.env.context_tokens
            )
            yield (
                partial(ServerSampler, servers, vocabulary=policy.vocabulary_size(player.model, player.folder)),
                tokenizer,
            )
        finally:
            servers.cancel()
    finally:
        lock.release()


def _play_in_chunks(play: Callable[[Sequence[Episode]], list[Trajectory]], size: int) -> PlayFunction:
    """Plays episodes `size` at a time, and the next ones when somebody wants them."""

    def played(episodes: Sequence[Episode]) -> TrajectoryStream:
        for start in range(0, len(episodes), size):
            yield from play(episodes[start : start + size])

    return played


ResponseFunction = Callable[
    [Episode, int, Turn, int], str
]  # episode, its slot, what it last saw, number of the turn -> response


def play_without_model(
    episodes: Sequence[Episode], stage: EnvExecutor, choose: ResponseFunction, max_turns: int
) -> list[Trajectory]:
    """Episodes of a player that is no model."""
    played = [Trajectory(episode.task, episode.draw, episode.member, ended=TURNS) for episode in episodes]
    replies = stage.reset({slot: episode.task for slot, episode in enumerate(episodes)})
    for slot, reply in replies.items():
        played[slot].goal = reply.goal
    for number in range(max_turns):
        turns = {slot: turn for slot, reply in replies.items() if (turn := _record_reply(played[slot], reply))}
        said = {slot: choose(episodes[slot], slot, turn, number) for slot, turn in turns.items()}
        for slot, turn in turns.items():
            played[slot].responses.append(Response([], Sample([], [], []), turn.observation, said[slot]))
        replies = stage.step(said)
    for slot, reply in replies.items():
        _record_reply(played[slot], reply)
    return played


def _random_action(parse: Callable[[str], str], episode: Episode, slot: int, turn: Turn, number: int) -> str:
    """A random admissible action; `parse` is the world's, and tells how it wants to be spoken to."""
    random = keyed_generator((*episode.key, RANDOM, number))
    return parsing.format_response(parse, turn.actions[int(random.integers(len(turn.actions)))]) if turn.actions else ""


def _world_response(
    world: Any, name: str, stage: SerialExecutor, episode: Episode, slot: int, turn: Turn, number: int
) -> str:
    """What the world's own player says."""
    env = stage.envs[slot]
    return world.oracle(env) if name == ORACLE else world.expert(env, Random(f"{episode.key} {number}"))


def _record_reply(trajectory: Trajectory, reply: Reply) -> Turn | None:
    """Note what the world answered; the turn, where the episode goes on."""
    if reply.turn is None:
        trajectory.ended, trajectory.error = CRASHED, reply.error
        return None
    if trajectory.responses:
        said, turn = trajectory.responses[-1], reply.turn
        said.reward, said.valid, said.metrics = turn.reward, turn.valid, turn.metrics
    if reply.turn.done:
        trajectory.ended = OVER if reply.turn.terminated else STOPPED
    return None if reply.turn.done else reply.turn


def unavailable_reason(name: str, experiment: Experiment, world: World, task: Task) -> str | None:
    """Why a player without a model cannot play here, or None."""
    if name != RANDOM:
        has = {SCRIPTED: "expert", ORACLE: "oracle"}[name]
        return None if hasattr(world, has) else f"this world brings no {name} player along"
    with closing(make_executor(world, experiment.env.make, replace(experiment.launch, workers=0))) as stage:
        reply = stage.reset({0: task})[0]
    if reply.turn is None:
        return f"the world could not be entered: {reply.error}"
    return None if reply.turn.actions else "this world lists no actions to choose from"
