"""Packs rows into the tensors of a micro-batch, in the format of TRL's loss.

Shapes: N rows of a micro-batch, P columns of the padded prompts, T columns of the padded completions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aem_exp.rollout.rows import Row

PADDING_ROW = -1  # index of a row that only fills up the share of a rank: it is scored, but has no trained token


def pack_rows(rows: Sequence[Row], chosen: Sequence[int], pad_id: int) -> dict[str, Tensor]:
    """Pack one micro-batch; prompts are padded on the left, completions on the right.

    A padding row repeats the shortest row with `tool_mask` 0. Its attention mask is that of the repeated row, because attention
    over a fully masked row could produce NaN.

    Returns:
        int64 tensors: `prompt_ids` and `prompt_mask` (N, P); `completion_ids`, `completion_mask` and `tool_mask` (N, T).
        `tool_mask` is TRL's name for the mask of the tokens that the policy generated: 1 on these tokens, else 0.
    """
    filler = min(rows, key=lambda row: len(row.prompt) + len(row.completion)) if PADDING_ROW in chosen else None
    picked = [filler if filler and i == PADDING_ROW else rows[i] for i in chosen]
    return {
        "prompt_ids": _pad([row.prompt for row in picked], pad_id, left=True),
        "prompt_mask": _pad([[1] * len(row.prompt) for row in picked], left=True),
        "completion_ids": _pad([row.completion for row in picked], pad_id),
        "completion_mask": _pad([[1] * len(row.completion) for row in picked]),
        "tool_mask": pack_masks(rows, chosen, max(len(row.completion) for row in picked)),
    }


def pack_masks(rows: Sequence[Row], chosen: Sequence[int], width: int) -> Tensor:
    """(N, width) int64: the masks of the rows of a micro-batch; 0 in padding rows."""
    return _pad([[] if i == PADDING_ROW else rows[i].mask for i in chosen], width=width)


def sampler_logps_and_entropies(rows: Sequence[Row], chosen: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """The sampler's log-probs and entropies of a micro-batch in nats, each float32 (N, width), padded with 0."""
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
