"""Who plays a panel: a model under a sampler, or nobody, which is to say uniformly random admissible actions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch

from aem_exp import policy
from aem_exp.config import ConfigError, Experiment, Model
from aem_exp.envs import Task, TextEnv, World
from aem_exp.render import Chat
from aem_exp.rollout import CRASHED, OVER, TURNS, Episode, Response, Rollout, Trajectory
from aem_exp.sample import LocalSampler, Sample, Sampling, generator
from aem_exp.workers import stage_of

Play = Callable[[Sequence[Episode]], list[Trajectory]]
LOADED = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
RENDERING = ("dtype", "attention", "system", "thinking")  # settings of a model that decide what its weights say


@dataclass(frozen=True)
class Player:
    """A row of an evaluation: a model (None: random actions), its weights in `folder`, after `steps` of training."""

    name: str
    model: Model | None = None
    folder: str = ""
    steps: int = 0

    def identity(self) -> dict[str, Any]:
        """What decides how it plays, temperature apart; neutral settings are left out, so that a new one changes nothing."""
        if self.model is None:
            return {}
        settings, neutral = asdict(self.model), asdict(Model())
        chosen = {key: settings[key] for key in RENDERING if settings[key] != neutral[key]}
        return {"model": chosen, "weights": _fingerprint(Path(self.folder))}


@contextmanager
def at(
    player: Player, experiment: Experiment, world: World, temperature: float, tell: Callable[[int], None]
) -> Iterator[Play]:
    """The player at its place: a function that plays episodes. `tell` hears after each turn how many were still live."""
    if player.model is None:
        env = world.env()
        try:
            yield lambda episodes: [wander(episode, env, experiment.env.max_turns) for episode in episodes]
        finally:
            env.close()
        return
    device = _device(experiment)
    model, tokenizer = policy.load(player.model, player.folder, experiment.seed)
    chat = Chat(tokenizer, player.model.system, player.model.thinking)
    launch = experiment.launch
    stage = stage_of(world, experiment.env.make, launch.workers, launch.env_seconds)
    rollout = Rollout(stage, experiment.env, chat)
    sampler = _Watched(LocalSampler(model.to(device), chat.end_ids, Sampling(temperature)), tell)
    trained_in_bf16 = bool(experiment.trainer.get("bf16"))
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=trained_in_bf16):
            yield partial(rollout.play, sampler=sampler)
    finally:
        rollout.close()


def _fingerprint(folder: Path) -> str:
    """Hash of what is loaded from a model's folder. The hub's cache names its files by their hash; those are not read."""
    digest = sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in LOADED):
        blob = file.resolve()
        if blob.parent.name == "blobs":
            content = blob.name
        else:
            with file.open("rb") as data:
                content = file_digest(data, "sha256").hexdigest()
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()[:12]


def _device(experiment: Experiment) -> Any:
    """The GPU that is asked for, else the CPU."""
    if experiment.launch.threads:
        torch.set_num_threads(experiment.launch.threads)
    if not experiment.launch.gpus_per_node:
        return torch.device("cpu")
    if not torch.accelerator.is_available():
        remedy = "this machine has no GPU that torch can use; choose launch=local"
        raise ConfigError("launch.gpus_per_node", experiment.launch.gpus_per_node, remedy)
    return torch.accelerator.current_accelerator()


class _Watched:
    """A sampler that tells after every turn how many episodes were still live."""

    def __init__(self, sampler: Any, tell: Callable[[int], None]) -> None:
        self.sampler, self.tell = sampler, tell

    def session(self) -> "_Watched":
        return _Watched(self.sampler.session(), self.tell)

    def generate(self, slots: Sequence[int], *rest: Any) -> Any:
        samples = self.sampler.generate(slots, *rest)
        self.tell(len(slots))
        return samples


def wander(episode: Episode, env: TextEnv, max_turns: int) -> Trajectory:
    """An episode of uniformly random admissible actions."""
    trajectory = Trajectory(episode.task, episode.draw, episode.member, ended=TURNS)
    try:
        turn = env.reset(episode.task)
        for number in range(max_turns):
            random = generator((*episode.key, "random", number))
            text = _spoken(env, turn.actions[int(random.integers(len(turn.actions)))]) if turn.actions else ""
            response = Response([], Sample([], [], []), turn.observation, text)
            trajectory.responses.append(response)
            turn = env.step(text)
            response.reward, response.valid, response.metrics = turn.reward, turn.valid, turn.metrics
            if turn.done:
                trajectory.ended = OVER
                break
    except Exception as error:  # a crash of the environment ends this episode and no other
        trajectory.ended, trajectory.error = CRASHED, f"{type(error).__name__}: {error}"
    return trajectory


def _spoken(env: TextEnv, action: str) -> str:
    """A response that this world reads as the action: in tags where it looks for those, else bare."""
    tagged = f"<think></think><action>{action}</action>"
    return tagged if env.parse(tagged).casefold() == action.casefold() else action


def why_not_random(world: World, task: Task) -> str | None:
    """Why nobody can act at random here, or None."""
    env = world.env()
    try:
        return None if env.reset(task).actions else "this world lists no actions to choose from"
    except Exception as error:
        return f"the world could not be entered: {type(error).__name__}: {error}"
    finally:
        env.close()
