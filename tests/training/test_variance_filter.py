"""RAGEN-2's filter of groups: numbers calculated by hand, its relation to DAPO's filter, and the factor of the loss."""

from dataclasses import replace
from statistics import stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import toy

from aem_exp.envs import Task
from aem_exp.envs.executor import SerialExecutor
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.sampling.base import Sample
from aem_exp.rollout.types import Ending, Response, Trajectory
from aem_exp.training.dynamic_sampling import (
    VARIANCE_MARGIN,
    DynamicSampling,
    drop_uninformative_groups,
    keep_varied_groups,
    play_rounds,
)


def played(*groups):
    """One trajectory of one response per return."""
    sample = Sample([1], [-1.0], [0.5])
    return [
        Trajectory(Task("t"), draw, member, [Response([9], sample, "look", "a", reward=ret)], ended=Ending.OVER)
        for draw, returns in enumerate(groups)
        for member, ret in enumerate(returns)
    ]


def kept_groups(trajectories, share):
    kept, dropped = keep_varied_groups(trajectories, share)
    assert {t.draw for t in kept}.isdisjoint(t.draw for t in dropped)
    assert len(kept) + len(dropped) == len(trajectories)
    return {t.draw for t in kept}


FIVE = played([1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1])


def test_by_hand():
    """Standard deviations .5, .5774, 0, 0, .5: their sum is 1.5774, and 0.9 of it minus 0.01 is 1.4096."""
    assert kept_groups(FIVE, 0.9) == {0, 1, 4}
    assert kept_groups(FIVE, 0.6) == {0, 1}, "1.0774 reaches 0.9364; of equal groups, the first is kept"
    assert kept_groups(FIVE, 0.3) == {1}


def test_nothing_is_kept_if_the_summed_spread_is_small():
    """The sum of the standard deviations must be above 0.01 / 0.9 = 0.0111."""
    assert kept_groups(played([1, 1], [0, 0]), 0.9) == set()
    assert kept_groups(played([0, 0.0155], [1, 1]), 0.9) == set()
    assert kept_groups(played([0, 0.0159], [1, 1]), 0.9) == {0}


def test_crashed_trajectories_do_not_count():
    group = played([1, 0], [1, 0])
    group[0].ended = Ending.CRASHED
    assert kept_groups(group, 0.9) == {1}, "one return is left in group 0"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=8), min_size=1, max_size=24),
    st.sampled_from([0.5, 0.8, 0.9, 0.95, 1.0]),
)
def test_relation_to_the_filter_of_dapo(groups, share):
    """The two keep the same groups if and only if the smallest spread exceeds (1 - share) x sum + 0.01."""
    trajectories = played(*groups)
    kept = kept_groups(trajectories, share)
    informative = {t.draw for t in drop_uninformative_groups(trajectories)[0]}
    spreads = [stdev(groups[draw]) for draw in informative]
    assert kept <= informative
    assert bool(kept) == bool(informative), "binary returns have a spread above the margin"
    if spreads and abs(min(spreads) - (limit := (1 - share) * sum(spreads) + VARIANCE_MARGIN)) > 1e-9:
        assert (kept == informative) == (min(spreads) > limit)


def test_one_success_of_eight_in_16_groups_is_not_the_filter_of_dapo():
    trajectories = played(*[[1, 0, 0, 0, 0, 0, 0, 0]] * 16)
    assert len(kept_groups(trajectories, 0.9)) == 15
    assert len(kept_groups(trajectories[: 8 * 9], 0.9)) == 9, "in a small step it is"


def test_one_round_is_played_even_if_nothing_is_kept():
    rounds = []
    step = play_rounds(
        lambda number: rounds.append(number) or played([1, 1]), DynamicSampling(4, keep_variance=0.9), False
    )
    assert rounds == [0] and step.rounds == 1
    assert not step.kept and len(step.dropped) == 2


@pytest.mark.slow
@pytest.mark.parametrize("history", ["full", "window"])
@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo"])
def test_loss_is_multiplied_by_the_share_of_kept_groups(tmp_path, history, kind):
    """All terms of the loss are: the gradient of the kept groups alone times 2/4."""
    run = toy.experiment(history, loss_type=kind, beta=0.05, entropy_coef=0.01, learning_rate=1.0, optim="sgd")
    steps = []
    for share in (0.5, None):
        trainer = toy.trainer(tmp_path, run, keep_variance=share, device_rows=3)
        step = trainer.play(0)
        if share:
            kept = {t.draw for t in step.kept}
            assert len(kept) == 2
        chosen = [t for t in step.kept if t.draw in kept]
        _, (update,) = trainer.build_updates(trainer.assign_credit(chosen, step.dropped), 0)
        trainer.current_gradient_accumulation_steps = 1
        trainer.aem_callback.metrics["time/update"] = 0.0
        loss = trainer.training_step(trainer.model, update)
        steps.append((loss, [p.grad.clone() for p in trainer.model.parameters()]))
    (scaled, scaled_grads), (loss, grads) = steps
    torch.testing.assert_close(scaled, loss * 0.5)
    for ours, theirs in zip(scaled_grads, grads, strict=True):
        torch.testing.assert_close(ours, theirs * 0.5, atol=1e-7, rtol=1e-4)


@pytest.mark.slow
def test_step_without_kept_groups_has_no_update(tmp_path):
    class EqualReturns(toy.Chatter):
        def _turn(self, text, reward=0.0, *rest):
            return super()._turn(text, 0.1, *rest)

    class World(toy.ChatterWorld):
        def env(self):
            return EqualReturns()

    run = toy.experiment("full", steps=1)
    run = replace(run, trainer=replace(run.trainer, beta=0.05))
    rollout = Rollout(SerialExecutor(World()), run.env, toy.Chat(toy.policy(tmp_path)[1]))
    trainer, seen = toy.trainer(tmp_path, run, rollout=rollout, keep_variance=0.9), []
    trainer.aem_callback.report = lambda step, metrics: seen.append(metrics)
    trainer.train()
    assert seen[0]["train/updates"] == 0
    assert seen[0]["train/tokens_filtered"] == seen[0]["train/tokens_generated"] > 0
