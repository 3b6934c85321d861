"""Each baseline with each modulation resolves or is refused; the pairs that differ in code train two steps."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from support import toy

from aem_exp.config import ConfigError, config_roots, list_choices, load, rules
from aem_exp.config.targets import instantiate
from aem_exp.envs.executor import SerialExecutor
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.sampling.base import SamplingParams
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.training.build import build_trainer
from aem_exp.training.callback import AEMCallback
from aem_exp.training.step_counter import StepCounter
from aem_exp.training.trainer import RolloutSource

GROUPS = list_choices(config_roots())
STEPS = 2
SIZES = [f"trainer.steps={STEPS}", "trainer.tasks_per_step=4", "trainer.group_size=4", "trainer.mini_batch=8"]
GSPO_FIELD = "trainer.importance_sampling_level"
WITH_SEQUENCE_RATIO = ("gspo", "sampo")
# Their sequence ratio averages over tokens and so cancels their coefficients. Masks need a loss that is no mean over rows.
REFUSED = {(baseline, "token"): GSPO_FIELD for baseline in WITH_SEQUENCE_RATIO} | {
    (baseline, f"{keep}_{mask}"): "modulation.keep_by"
    for keep in ("raising", "lowering")
    for baseline, masks in {
        **dict.fromkeys(WITH_SEQUENCE_RATIO, ("mask", "mask_scaled")),
        **dict.fromkeys(("dr_grpo", "deepswe"), ("mask",)),
    }.items()
    for mask in masks
}


@cache
def experiment(baseline):
    return load([f"baseline={baseline}", "modulation=none", *SIZES])


@cache
def modulation(name):
    return load([f"modulation={name}"]).modulation


def list_codes():
    """One modulation for each code path. Those that differ only in numbers, the schedule or the side of `keep` share one."""
    names = {}
    for name in GROUPS["modulation"]:
        block = vars(modulation(name)) | {"name": "", "keep": modulation(name).keep != "all"}
        code = tuple(value if isinstance(value, str) else bool(value) for value in block.values())
        names.setdefault(code, name)
    return sorted(names.values())


# Modulations act on advantages and baselines make them, so other pairs run no other code. GiGPO differs within a trajectory.
TRAINED = sorted(
    {(baseline, name) for baseline in GROUPS["baseline"] for name in ("none", "aem")}
    | {(baseline, name) for baseline in ("grpo", "gigpo") for name in list_codes()}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


def pair(baseline, name, history):
    """The experiment of a baseline with a modulation on the toy world."""
    run = experiment(baseline)
    return replace(run, modulation=modulation(name), env=replace(toy.env(history), name="toy", invalid_penalty=0.1))


def history_of(baseline):
    return "window" if baseline in WITH_SEQUENCE_RATIO else "full"


def train(run, folder):
    """The metrics of the steps, and the trained model."""
    model, tokenizer = toy.policy(folder, run.env.history)
    rows, chat = [], Chat(tokenizer)
    schedule = instantiate(run.modulation.lam) if run.modulation.lam else None
    callback = AEMCallback(StepCounter(STEPS), schedule, run.modulation.gate, lambda step, row: rows.append(row))
    rollout = Rollout(SerialExecutor(toy.ChatterWorld()), run.env, chat)
    sampler = lambda trainer: LocalSampler(trainer.model, chat.end_ids, SamplingParams())  # noqa: E731
    source = RolloutSource(toy.draw, rollout, sampler)
    build_trainer(run, folder / "out", model, tokenizer, callback, source).train()
    return rows, model


@pytest.mark.parametrize("name", GROUPS["modulation"])
@pytest.mark.parametrize("baseline", GROUPS["baseline"])
def test_pair_resolves_or_is_refused(baseline, name):
    run = pair(baseline, name, history_of(baseline))
    if (baseline, name) not in REFUSED:
        rules.check(run)
        return
    with pytest.raises(ConfigError) as refused:
        rules.check(run)
    assert refused.value.field == REFUSED[baseline, name]


@pytest.mark.slow
@pytest.mark.parametrize(("baseline", "name"), TRAINED)
def test_pair_trains(baseline, name, folder):
    history = history_of(baseline)
    rows, model = train(pair(baseline, name, history), folder)
    assert len(rows) == STEPS
    for row in rows:
        assert torch.tensor([row["train/loss"], row["train/grad_norm"]]).isfinite().all()
        parts = ("trained", "filtered", "crashed")
        assert row["train/tokens_generated"] == sum(row[f"train/tokens_{part}"] for part in parts)
        assert ("aem/alpha_q50" in row) == (name != "none" and not modulation(name).match)
        assert ("aem/match_factor" in row) == bool(modulation(name).match)
    start = toy.policy(folder, history)[0].state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("baseline", WITH_SEQUENCE_RATIO)
@pytest.mark.parametrize("name", [name for name in GROUPS["modulation"] if name != "none"])
def test_sequence_ratio_on_full_history_is_refused_with_each_modulation(name, baseline):
    with pytest.raises(ConfigError) as refused:
        rules.check(pair(baseline, name, "full"))
    assert refused.value.field == REFUSED.get((baseline, name), GSPO_FIELD)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", GROUPS["baseline"])
def test_lambda_zero_gives_bitwise_the_weights_of_the_baseline(baseline, folder):
    """The weights are compared after the last step."""
    history = history_of(baseline)
    plain = pair(baseline, "none", history)
    zero = pair(baseline, "aem", history)
    zero = replace(zero, modulation=replace(zero.modulation, lam={**zero.modulation.lam, "value": 0.0}))
    states = [train(run, folder)[1].state_dict() for run in (plain, zero)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.slow
def test_dynamic_sampling_plays_more_rounds_and_counts_all_episodes(folder):
    """DAPO trains no groups with equal returns."""
    rows, _ = train(pair("dapo", "aem", "full"), folder)
    assert max(row["train/rounds"] for row in rows) > 1 or all(row["train/tokens_filtered"] == 0 for row in rows)
    for row in rows:
        assert row["train/episodes"] == 16 * row["train/rounds"]


def test_truncated_trajectory_counts_with_return_zero_and_is_not_trained():
    """Compact filtering by hand: one of three trajectories reached the maximum number of turns."""
    from aem_exp.advantages import leave_one_out
    from aem_exp.envs import Task
    from aem_exp.rollout.sampling.base import Sample
    from aem_exp.rollout.types import Ending, Response, Trajectory
    from aem_exp.training.credit import CreditRules, assign_credit

    def trajectory(member, ended, reward):
        sample = Sample([1, 2], [-1.0, -1.0], [0.5, 0.5])
        response = Response([9], sample, "look", "a", reward=reward)
        return Trajectory(Task("t"), 0, member, [response], ended=ended)

    played = [trajectory(0, Ending.OVER, 1.0), trajectory(1, Ending.OVER, 0.0), trajectory(2, Ending.TURNS, 1.0)]
    credit = assign_credit(played, "full", CreditRules(leave_one_out, mask_truncated=True))
    assert [t.member for t in credit.kept] == [0, 1]
    assert [t.member for t in credit.filtered] == [2]
    torch.testing.assert_close(credit.advantage_R, torch.tensor([1.0, -0.5]))  # against (0 + 0) / 2 and (1 + 0) / 2
    assert len(credit.rows) == len(credit.trajectory_R) == 2


@pytest.mark.slow
def test_training_continues_after_a_step_in_which_all_episodes_are_truncated(folder):
    run = pair("deepswe", "aem", "full")
    run = replace(run, env=replace(run.env, max_turns=1))
    rows, _ = train(run, folder)
    assert len(rows) == STEPS
    assert all(row["train/tokens_filtered"] > 0 for row in rows)
