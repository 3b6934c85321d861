"""Credits from plain lists, and their modulation, for tests."""

from functools import cache
from itertools import accumulate, pairwise

import torch

from aem_exp.config import load
from aem_exp.envs import Task
from aem_exp.rollout.rows import build_rows
from aem_exp.rollout.sampling.base import Sample, keyed_generator
from aem_exp.rollout.types import Ending, Response, Trajectory
from aem_exp.training.build import build_variant
from aem_exp.training.credit import MeasuredCredit
from aem_exp.training.modulation import modulate_credit


def number_ranges(sizes):
    return [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]


def measured_credit(
    turns,
    advantage,
    entropy,
    *,
    group=None,
    tokens=None,
    observations=None,
    kinds=None,
    surprisal=None,
    unit="response",
    history="window",
):
    """A credit of responses in the order of trajectories.

    Args:
        turns: number of responses of each trajectory.
        advantage, entropy, surprisal: one value per response; `entropy` may be one list of token entropies per response.
        group: group of each trajectory; all in one group by default.
        tokens: number of tokens of each response.
        observations: observation of each response; all different by default.
        kinds: type of the task of each trajectory.
    """
    responses = sum(turns)
    if isinstance(entropy[0], list):
        tokens = [len(values) for values in entropy]
        token_signal = torch.tensor([value for values in entropy for value in values])
        entropy = [sum(values) / len(values) for values in entropy]
    else:
        tokens = tokens or [1] * responses
        token_signal = torch.tensor(entropy).repeat_interleave(torch.tensor(tokens))
    observations = observations or [f"observation {r}" for r in range(responses)]
    group, kinds = group or [0] * len(turns), kinds or [""] * len(turns)
    kept, r = [], 0
    for m, count in enumerate(turns):
        samples = [Sample([1] * tokens[r + k], [], []) for k in range(count)]
        own = [Response([9], sample, observations[r + k], "") for k, sample in enumerate(samples)]
        kept.append(Trajectory(Task(str(m), kind=kinds[m]), group[m], m, own, ended=Ending.OVER))
        r += count
    rows = build_rows(kept, history)
    ids, tokens_R = torch.arange(responses), torch.tensor(tokens)
    per_token = unit == "token"
    ranges = number_ranges([len(row.turns) for row in rows])
    token_ranges = number_ranges([sum(row.mask) for row in rows])
    return MeasuredCredit(
        played=kept,
        dropped=[],
        filtered=[],
        kept=kept,
        rows=rows,
        response_ids_N=ranges,
        unit_ids_N=token_ranges if per_token else ranges,
        group_M=torch.tensor(group),
        trajectory_R=torch.tensor([m for m, count in enumerate(turns) for _ in range(count)]),
        advantage_R=torch.tensor(advantage),
        response_U=ids.repeat_interleave(tokens_R) if per_token else ids,
        entropy_R=torch.tensor(entropy),
        surprisal_R=torch.tensor(surprisal or entropy),
        token_signal_K=token_signal,
    )


@cache
def modulation_config(name):
    return load([f"modulation={name}"]).modulation


def modulated_credit(name, seed, credit, weight_R=None):
    """The credit after the modulation of a config in `conf/modulation`."""
    block = modulation_config(name)
    lam = torch.tensor(block.lam["value"]).item()
    return modulate_credit(credit, build_variant(block), lam, block.gate, keyed_generator((seed,)), weight_R)
