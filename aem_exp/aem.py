"""The method of the paper: token entropies -> coefficients of responses -> modulated advantages.

"AEM: Adaptive Entropy Modulation for Multi-Turn Agentic Reinforcement Learning", arXiv 2605.00425. A *response* is
what the policy generates in one turn; it is the unit of credit. A *group* G contains all responses of all trajectories of one
draw of a task. H_k is the entropy of the old policy at token k (in nats, over the full vocabulary, with logits divided by the
sampling temperature):

    Hbar_r   = mean of H_k over the tokens of response r
    Htilde_r = (Hbar_r - min_G Hbar) / (max_G Hbar - min_G Hbar)
    alpha_r  = exp(-lam * Htilde_r) / mean over G of exp(-lam * Htilde)
    A'_k     = alpha_r * A_k    for every token k of r, both signs of A, base loss unchanged

The paper leaves these points open; our choices are: alpha is a constant for the optimiser, and nothing is re-normalised
afterwards. A group with one response, or with equal entropies, has alpha = 1. Fully masked trajectories have no responses.

Shapes: N rows, T tokens of a row, K generated tokens and R responses of the batch (both row-major), G groups. The functions
know nothing of ranks: pass whole groups.
"""

import torch
from torch import Tensor


def responses(mask_NT: Tensor) -> Tensor:
    """Number the responses of a batch.

    Args:
        mask_NT: nonzero for tokens that the policy generated; 0 for observation, template and padding tokens.

    Returns:
        response_NT (int64): the id of the response of each token, 0..R-1 in row-major order over the batch; -1 elsewhere.
        A response is a maximal sequence of generated tokens, because an observation always has at least one token.
    """
    assert mask_NT.ndim == 2, mask_NT.shape
    own_NT = mask_NT.bool()
    first_NT = own_NT.clone()
    first_NT[:, 1:] &= ~own_NT[:, :-1]
    return (first_NT.flatten().cumsum(0).view_as(own_NT) - 1).masked_fill(~own_NT, -1)


def response_rows(response_NT: Tensor) -> Tensor:
    """The row of each response: row_R (int64). With the group of each row, `group_N[row_R]` is the group of each response."""
    assert response_NT.ndim == 2, response_NT.shape
    own_NT = response_NT >= 0
    row_K = own_NT.nonzero()[:, 0]
    return row_K.new_zeros(int(response_NT.max()) + 1 if len(row_K) else 0).index_copy_(0, response_NT[own_NT], row_K)


def response_entropy(entropy_NT: Tensor, response_NT: Tensor) -> Tensor:
    """Mean token entropy Hbar of each response, in nats.

    The mean removes the effect of the length of a response. Values outside of responses are never read.
    """
    assert response_NT.ndim == 2 and entropy_NT.shape == response_NT.shape, (entropy_NT.shape, response_NT.shape)
    own_NT = response_NT >= 0
    response_K, entropy_K = response_NT[own_NT], entropy_NT[own_NT].float()
    tokens_R = torch.bincount(response_K)
    return torch.zeros_like(tokens_R, dtype=torch.float32).index_add_(0, response_K, entropy_K) / tokens_R


def coefficients(entropy_R: Tensor, group_R: Tensor, lam: float = 1.0, gate: float = 0.1) -> Tensor:
    """The coefficient alpha of each response. Its mean over the responses of each group is 1.

    Args:
        entropy_R: mean token entropy of each response, in nats.
        group_R: integer id of the group of each response, in any order.
        lam: strength lambda; 0 gives exactly alpha = 1, and negative values reverse the modulation. In the paper: 1.
        gate: groups whose entropies span less than this (in nats) keep alpha = 1. In the paper (v3): 0.1; 0 means no gate.

    Returns:
        alpha_R (float32), strictly decreasing in the entropy for lam > 0. In a modulated group max / min = e^lam.
    """
    assert entropy_R.ndim == 1 and group_R.shape == entropy_R.shape, (entropy_R.shape, group_R.shape)
    group_R = torch.unique(group_R, return_inverse=True)[1]
    entropy_R = entropy_R.detach().float()
    low_G, span_G = _range(entropy_R, group_R)
    open_G = (span_G >= gate) & (span_G > 0)
    unit_R = (entropy_R - low_G[group_R]) / span_G.where(open_G, 1.0)[group_R]
    weight_R = torch.exp(-lam * unit_R)
    total_G = torch.zeros_like(low_G).index_add_(0, group_R, weight_R)
    mean_G = total_G / torch.bincount(group_R, minlength=len(low_G))
    return torch.where(open_G[group_R], weight_R / mean_G[group_R], 1.0)


def gated(entropy_R: Tensor, group_R: Tensor, gate: float = 0.1) -> Tensor:
    """Whether the gate leaves a group unmodulated: a bool per group, in increasing order of the group ids."""
    assert entropy_R.ndim == 1 and group_R.shape == entropy_R.shape, (entropy_R.shape, group_R.shape)
    span_G = _range(entropy_R.detach().float(), torch.unique(group_R, return_inverse=True)[1])[1]
    return (span_G < gate) | (span_G == 0)


def modulate(advantage: Tensor, alpha_R: Tensor, response_NT: Tensor) -> Tensor:
    """Multiply the advantages of the tokens of a response by its coefficient.

    Args:
        advantage: (N,), one per row; or (N, T), one per token.
        alpha_R: coefficients, indexed by the ids in `response_NT`.
        response_NT: see `responses`.

    Returns:
        advantage_NT. Tokens outside of responses keep their advantage; the loss masks them.
    """
    assert alpha_R.ndim == 1 and response_NT.ndim == 2, (alpha_R.shape, response_NT.shape)
    assert advantage.shape in (response_NT.shape[:1], response_NT.shape), (advantage.shape, response_NT.shape)
    advantage_NT = advantage[:, None] if advantage.dim() == 1 else advantage
    return advantage_NT * torch.cat([alpha_R, alpha_R.new_ones(1)])[response_NT]


def _range(entropy_R: Tensor, group_R: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and span (maximum - minimum) of each group, for ids 0..G-1."""
    groups = int(group_R.max()) + 1 if len(group_R) else 0
    low_G = entropy_R.new_zeros(groups).scatter_reduce(0, group_R, entropy_R, "amin", include_self=False)
    high_G = entropy_R.new_zeros(groups).scatter_reduce(0, group_R, entropy_R, "amax", include_self=False)
    return low_G, high_G - low_G
