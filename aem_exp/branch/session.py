"""Opens the run of a branch command, and takes the missing branches.

A batch is recorded when all its branches are measured; a repeated command continues after the last recorded batch.
"""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from aem_exp import policy
from aem_exp.branch.probe import Probe, StateResponses
from aem_exp.branch.request import BranchSetup
from aem_exp.branch.trainer import Branches, BranchTrainer
from aem_exp.core import disk
from aem_exp.core.errors import RunError
from aem_exp.envs.workers import make_executor
from aem_exp.evaluate.panels import list_episodes
from aem_exp.evaluate.states import STATES, SampledState, pick_state, read_states, sample_at_states, state_of_turn
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.sampling.base import SamplingParams
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.rollout.types import Trajectory
from aem_exp.run.session import draw_episodes
from aem_exp.training.build import build_trainer
from aem_exp.training.callback import AEMCallback
from aem_exp.training.step_counter import StepCounter
from aem_exp.training.trainer import RolloutSource

if TYPE_CHECKING:
    from aem_exp.evaluate.display import ProgressLine

BATCHES: Final = "batches.jsonl"
RESPONSES: Final = "responses.json"  # token ids of the responses at the fixed states


def read_batches(setup: BranchSetup) -> list[dict[str, Any]]:
    """Read the recorded batches; an incomplete last line, left by a killed process, is removed."""
    rows = disk.read_json_lines(setup.folder / BATCHES, "batch", "arms")
    disk.write_atomically(setup.folder / BATCHES, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def take_branches(setup: BranchSetup, batches: Sequence[int], line: "ProgressLine") -> None:
    """Take and record the branches of these batches."""
    experiment, launch = setup.experiment, setup.experiment.launch
    if launch.threads:
        torch.set_num_threads(launch.threads)
    line.show_stage("loading the policy")
    policy.select_device(launch)
    model, tokenizer = policy.load(experiment.model, setup.weights, experiment.seed)
    chat = Chat(tokenizer, experiment.model.system, experiment.model.thinking)
    executor = make_executor(setup.world, experiment.env.make, launch)
    with closing(Rollout(executor, experiment.env, chat, launch.device_episodes)) as rollout:
        trainer = _build_trainer(setup, model, tokenizer, rollout)
        done, total = 0, len(batches) * len(setup.arms)

        def advance() -> None:
            nonlocal done
            done += 1
            line.show_count(done)

        def record(batch: int, row: dict[str, Any]) -> None:
            with (setup.folder / BATCHES).open("a") as file:
                file.write(json.dumps({"batch": batch, **row}) + "\n")

        def make_probe(trainer: BranchTrainer) -> Probe:
            line.show_stage(f"sampling {setup.samples} responses at each of {setup.states} states")
            states = _fixed_states(setup, trainer)
            line.start_count("branches", total, "updates")
            return Probe(trainer.model, states, experiment.trainer.temperature)

        trainer.branches = Branches(
            arms=setup.arms,
            batches=batches,
            make_probe=make_probe,
            make_own_probe=partial(_own_probe, setup),
            record=record,
            advance=advance,
            kl=setup.kl,
            with_optimizer_state=not setup.plain,
        )
        trainer.train(resume_from_checkpoint=str(setup.checkpoint) if setup.checkpoint else None)


def _build_trainer(setup: BranchSetup, model: Any, tokenizer: Any, rollout: Rollout) -> BranchTrainer:
    experiment, settings = setup.experiment, setup.experiment.trainer
    sampling = SamplingParams(settings.temperature, settings.top_p, settings.top_k, settings.min_p or 0.0)
    tasks, end_ids = setup.world.tasks("train"), rollout.chat.end_ids
    source = RolloutSource(
        draw=lambda batch, number: draw_episodes(experiment, tasks, f"branch {batch}", number),
        rollout=rollout,
        make_sampler=lambda trainer: LocalSampler(model, end_ids, sampling),
    )
    time = StepCounter(max(settings.steps, setup.step + 1), setup.step, experiment.parent_steps, setup.updates)
    return build_trainer(experiment, setup.folder, model, tokenizer, AEMCallback(time), source, kind=BranchTrainer)


def _policy_sampler(setup: BranchSetup, trainer: BranchTrainer) -> LocalSampler:
    """A sampler of the policy itself, without filters such as top-p."""
    params = SamplingParams(setup.experiment.trainer.temperature)
    return LocalSampler(trainer.model, trainer.rollout.chat.end_ids, params)


def _sample(setup: BranchSetup, trainer: BranchTrainer, states: list[SampledState], purpose: str) -> list[list[Any]]:
    """Token ids of the responses at each state."""
    sampler, out = _policy_sampler(setup, trainer), []
    together = max(1, 256 // setup.samples)
    for start in range(0, len(states), together):
        sampled = sample_at_states(states[start : start + together], setup.samples, sampler, purpose)
        out += [[sample.ids for sample in group] for group in sampled]
    return out


def _fixed_states(setup: BranchSetup, trainer: BranchTrainer) -> list[StateResponses]:
    """The fixed states and their responses: from disk, or played by the policy on the panel."""
    folder, env = setup.folder, setup.experiment.env
    if not (folder / RESPONSES).exists():
        repeats = -(-setup.states // len(setup.panel.tasks))
        wanted = sorted(list_episodes(setup.panel, repeats), key=lambda episode: episode.member)[: setup.states]
        played = trainer.rollout.play(wanted, _policy_sampler(setup, trainer))
        chosen = [state for t in played for state in pick_state(t, env)]
        if not chosen:
            raise RunError(f"no episode of the panel {setup.panel.name} could be played", "env")
        responses = _sample(setup, trainer, chosen, "branch")
        disk.write_atomically(folder / STATES, json.dumps([asdict(state) for state in chosen]))
        disk.write_atomically(folder / RESPONSES, json.dumps(responses))
    try:
        responses = json.loads((folder / RESPONSES).read_text())
        pairs = zip(read_states(folder), responses, strict=True)
        return [StateResponses(state.prompt, ids) for state, ids in pairs]
    except (ValueError, TypeError) as error:
        raise disk.damaged_file_error(folder / RESPONSES, error) from error


def _own_probe(setup: BranchSetup, trainer: BranchTrainer, played: list[Trajectory], batch: int) -> Probe | None:
    """The probe at the first turns of a batch, with new responses: those of the batch decided the update."""
    first = {tuple(t.responses[0].prompt): t for t in played if t.responses}
    if not first:
        return None
    states = [state_of_turn(t, 0, setup.experiment.env) for t in first.values()]
    responses = _sample(setup, trainer, states, f"branch {batch}")
    own = [StateResponses(state.prompt, ids) for state, ids in zip(states, responses, strict=True)]
    return Probe(trainer.model, own, setup.experiment.trainer.temperature)
