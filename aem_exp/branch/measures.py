"""Estimators of what an update changes, and of what the theory predicts. All functions are pure.

Notation: pi_0 is the policy before the update, pi_1 the policy after it. Responses are sampled once from pi_0, without a filter
such as top-p. Both policies are evaluated on these responses, over the full vocabulary.

Shapes: K responses of one state, T tokens (the longest response), V vocabulary; R responses of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aem_exp.rollout.types import Trajectory
from aem_exp.training import diagnostics
from aem_exp.training.credit import MeasuredCredit, ModulatedCredit


@dataclass(frozen=True)
class StateChange:
    """What an update changes at one state."""

    kl: float
    """KL(pi_0 || pi_1) of the response, in nats"""
    entropy: float
    """change of the response entropy H(s), in nats"""
    token_entropies: float
    """change of the token entropies, summed over all tokens of the K responses, in nats"""
    tokens: int
    """number of tokens of the K responses"""
    effective_share: float
    """effective sample size of the importance weights pi_1 / pi_0 of whole responses, divided by K; 1 if all weights are equal"""


def compare_policies(before_KTV: Tensor, after_KTV: Tensor, ids_KT: Tensor, mask_KT: Tensor) -> StateChange:
    """Compare two policies on K >= 2 responses of one state.

    Args:
        before_KTV: log-probs of all tokens at each position under pi_0.
        after_KTV: the same under pi_1.
        ids_KT: the sampled tokens.
        mask_KT: whether the response has a token at this position.
    """
    assert before_KTV.ndim == 3 and before_KTV.shape == after_KTV.shape, (before_KTV.shape, after_KTV.shape)
    assert ids_KT.shape == mask_KT.shape == before_KTV.shape[:2], (ids_KT.shape, mask_KT.shape, before_KTV.shape)
    before_KTV, after_KTV, mask_KT = before_KTV.double(), after_KTV.double(), mask_KT.bool()
    kl_KT = (before_KTV.exp() * (before_KTV - after_KTV)).sum(-1) * mask_KT
    entropy_before_KT, entropy_after_KT = (
        -(logp_KTV.exp() * logp_KTV).sum(-1) * mask_KT for logp_KTV in (before_KTV, after_KTV)
    )
    ratio_KT = (after_KTV - before_KTV).gather(-1, ids_KT[..., None]).squeeze(-1) * mask_KT
    weight_K = ratio_KT.sum(1).exp()
    return StateChange(
        kl=kl_KT.sum(1).mean().item(),
        entropy=entropy_change(entropy_before_KT, entropy_after_KT, ratio_KT, mask_KT).item(),
        token_entropies=(entropy_after_KT - entropy_before_KT).sum().item(),
        tokens=int(mask_KT.sum()),
        effective_share=(weight_K.sum() ** 2 / (weight_K**2).sum() / len(weight_K)).item(),
    )


def entropy_change(before_KT: Tensor, after_KT: Tensor, ratio_KT: Tensor, mask_KT: Tensor) -> Tensor:
    """Estimate the change of the response entropy H(s) without bias.

    H_1(s) is the mean of the token entropies h_1 under pi_1, summed over a response. With w_t = pi_1 / pi_0 of the first t
    tokens,

        H_1 - H_0 = E_0[ sum_t (h_1,t - h_0,t) + sum_t (w_t - w_{t-1}) (G_t - b_t) ],

    where G_t is the sum of h_1 after token t, and b_t is any number that does not depend on the response. The first term is the
    change at given tokens, the second one the change of the tokens. Here b_t is the mean of G_t over the other responses that
    have a token t. Both terms are of the order of the update, and so is their standard deviation: no other noise remains,
    unlike in a difference of two samples.

    Args:
        before_KT: token entropies h_0 in nats, 0 after the end of a response.
        after_KT: token entropies h_1 in nats, 0 after the end of a response.
        ratio_KT: log(pi_1 / pi_0) of each sampled token, 0 after the end of a response.
        mask_KT: whether the response has a token at this position.
    """
    shapes = {value_KT.shape for value_KT in (before_KT, after_KT, ratio_KT, mask_KT)}
    assert before_KT.ndim == 2 and len(shapes) == 1, shapes
    assert len(before_KT) > 1, "a response is compared with the others"
    to_go_KT = after_KT.flip(1).cumsum(1).flip(1) - after_KT
    alive_KT = mask_KT.to(to_go_KT)
    count_KT = (alive_KT.sum(0) - alive_KT).clamp(min=1)  # if there are no others, the sum below is 0, too
    others_KT = (to_go_KT.sum(0) - to_go_KT) / count_KT
    weight_KT = ratio_KT.cumsum(1).exp()
    increment_KT = torch.diff(weight_KT, dim=1, prepend=torch.ones_like(weight_KT[:, :1]))
    return ((after_KT - before_KT).sum(1) + (increment_KT * (to_go_KT - others_KT)).sum(1)).mean()


def predict_change(credit: MeasuredCredit, history: str) -> dict[str, float]:
    """What the theory predicts for the entropy of the states of a batch, up to the size of the step.

    Returns:
        `predicted`: mean of A' (S - H(s)) in nats over the responses whose state has several responses (at least the first turns
        of a group), where A' is the advantage in the loss. `compared`: the number of these responses. Empty if there are none.
    """
    tokens_R = torch.tensor([float(len(r.sample.ids)) for *_, r in credit.list_responses()])
    final_R = credit.final_advantage_R if isinstance(credit, ModulatedCredit) else credit.advantage_R
    relative_R = diagnostics.relative_surprisal(
        credit.surprisal_R * tokens_R, credit.entropy_R * tokens_R, state_ids(credit.kept, history)
    )
    compared_R = ~relative_R.isnan()
    if not compared_R.any():
        return {}
    predicted = (final_R * relative_R)[compared_R].mean().item()
    return {"predicted": predicted, "compared": int(compared_R.sum())}


def state_ids(trajectories: Sequence[Trajectory], history: str) -> Tensor:
    """(R,) ids of the states of all responses. Two responses share a state if all tokens in front of them are equal."""
    ids, out = dict[tuple[int, ...], int](), list[int]()
    for trajectory in trajectories:
        before: tuple[int, ...] = ()
        for response in trajectory.responses:
            before = (*before, *response.prompt) if history == "full" else tuple(response.prompt)
            out.append(ids.setdefault(before, len(ids)))
            before = (*before, *response.sample.ids)
    return torch.tensor(out, dtype=torch.long)
