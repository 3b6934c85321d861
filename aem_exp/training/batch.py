"""From the rows of a step to the micro-batches of its updates.

Every rank holds all rows and computes the same plan, so the gradient of an update depends on neither the number of ranks
nor the micro-batch size: which rows share an update follows from the seed alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aem_exp.rollout.rows import Row

PADDING_ROW = -1  # a row that fills a rank's share: read like any other, trained on nothing


def plan_updates(
    lengths: Sequence[int], mini_batch: int, rng: np.random.Generator, rank: int = 0, ranks: int = 1
) -> list[list[int]]:
    """The rows that this rank trains in each update of a step.

    Args:
        lengths: tokens of each row of the step.
        mini_batch: rows per update, over all ranks; 0 means all rows in one. The number of updates floats with the number
            of rows, and their sizes differ by at most one.
        rng: decides who shares an update; the same on every rank.

    Returns:
        Row indices per update, longest first, `PADDING_ROW` where the rows do not divide by the ranks.
    """
    updates = max(1, round(len(lengths) / mini_batch)) if mini_batch else 1
    shares = []
    for chosen in np.array_split(rng.permutation(len(lengths)), updates):
        ordered = sorted(chosen.tolist(), key=lambda i: (-lengths[i], i))
        share = ordered[rank::ranks]
        shares.append(share + [PADDING_ROW] * (-(-len(ordered) // ranks) - len(share)))
    return shares


def split_micro_batches(
    share: list[int], lengths: Sequence[int], device_rows: int, device_tokens: int = 0
) -> list[list[int]]:
    """Micro-batches of at most so many rows, and so many tokens with padding (0: no limit; one row always fits).

    A share comes longest first, so memory fails early or never, and rows that share a micro-batch are of similar length.
    """
    micros: list[list[int]] = []
    widest = 0
    for i in share:
        length = lengths[i] if i != PADDING_ROW else 0
        full = micros and device_rows and len(micros[-1]) >= device_rows
        wide = micros and device_tokens and (len(micros[-1]) + 1) * max(widest, length) > device_tokens
        if not micros or full or wide:
            micros.append([])
            widest = length
        micros[-1].append(i)
    return micros


def pack_rows(rows: Sequence[Row], chosen: Sequence[int], pad_id: int) -> dict[str, Tensor]:
    """One micro-batch in the form TRL's loss reads: prompts padded left, completions right.

    `tool_mask` is 1 on the tokens that the policy sampled. A dead row repeats the shortest one with an empty mask: an
    all-masked attention row could produce NaN.
    """
    filler = min(rows, key=lambda row: len(row.prompt) + len(row.completion)) if PADDING_ROW in chosen else None
    picked = [filler if filler and i == PADDING_ROW else rows[i] for i in chosen]
    mask = _pad([[0] * len(row.mask) if i == PADDING_ROW else row.mask for i, row in zip(chosen, picked, strict=True)])
    return {
        "prompt_ids": _pad([row.prompt for row in picked], pad_id, left=True),
        "prompt_mask": _pad([[1] * len(row.prompt) for row in picked], left=True),
        "completion_ids": _pad([row.completion for row in picked], pad_id),
        "completion_mask": _pad([[1] * len(row.completion) for row in picked]),
        "tool_mask": mask,
    }


def sampler_logps_and_entropies(rows: Sequence[Row], chosen: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """The sampler's own log-probs and entropies of a micro-batch, each (N, width)."""
    picked = [rows[i] if i != PADDING_ROW else None for i in chosen]
    logps = _pad([row.logps if row else [] for row in picked], 0.0, width=width)
    entropies = _pad([row.entropies if row else [] for row in picked], 0.0, width=width)
    return logps, entropies


def _pad(values: Sequence[Sequence[float]], fill: float = 0, left: bool = False, width: int = 0) -> Tensor:
    width = width or max(map(len, values))
    out = np.full((len(values), width), fill, dtype=np.float32 if isinstance(fill, float) else np.int64)
    for i, row in enumerate(values):
        start = width - len(row) if left else 0
        out[i, start : start + len(row)] = row
    return torch.from_numpy(out)
