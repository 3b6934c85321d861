"""Fixed states of a run, and the KL divergence of the policy on them: how far a step moves the policy.

The states are chosen from the first round of the first step. Runs that share seed, tasks and initial weights play the same
episodes there, so their values can be compared. A state is the context of one generated token.

Shapes: N states of a batch, L tokens of the longest one; K positions of one state; V tokens of the vocabulary.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from aem_exp.core import disk
from aem_exp.rollout.rows import build_rows
from aem_exp.rollout.sampling.local import eval_mode
from aem_exp.rollout.types import Ending, Trajectory

CONTEXTS: Final = 8  # number of responses that states are chosen from
POSITIONS: Final = 512  # maximum number of states over all contexts
MAX_BYTES: Final = 100_000_000  # maximum size of the log-probs of all states, and of the logits of one forward pass


@dataclass(frozen=True)
class FixedContext:
    """A response with its context, and the states in it."""

    ids: list[int]
    """token ids, from the start of the row to the last state"""
    positions: list[int]
    """indices in `ids` of the generated tokens whose distributions are compared; at least 1"""


def choose_contexts(
    played: Sequence[Trajectory], history: str, groups: int, vocabulary: int, contexts: int = CONTEXTS
) -> list[FixedContext]:
    """Choose states at equal distances over the responses of the first groups of a step, and over the tokens of each response.

    Groups that dynamic sampling draws later or removes make no difference.

    Args:
        played: all trajectories of the step, dropped ones included.
        history: "full" or "window"; see `rollout.rows.build_rows`.
        groups: number of groups in the first round; 0: all groups that were played.
        vocabulary: number of tokens of the vocabulary; with a large one, fewer states are chosen (see `MAX_BYTES`).
    """
    first = [t for t in played if t.draw < groups or not groups]
    usable = [t for t in first if t.ended != Ending.CRASHED and t.responses]
    rows = build_rows(sorted(usable, key=lambda t: (t.draw, t.member)), history)
    responses = [(row, span) for row in rows for span in _response_spans(row.mask)]
    per_context = max(1, min(POSITIONS, MAX_BYTES // (4 * vocabulary)) // contexts)
    out = []
    for row, span in _spaced(responses, contexts):
        positions = [len(row.prompt) + k for k in _spaced(span, per_context)]
        out.append(FixedContext([*row.prompt, *row.completion][: positions[-1] + 1], positions))
    return out


def _response_spans(mask: Sequence[int]) -> Iterator[range]:
    """The indices of each run of ones."""
    start = None
    for i, own in enumerate([*mask, 0]):
        if own and start is None:
            start = i
        elif not own and start is not None:
            yield range(start, i)
            start = None


def _spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items at equal distances, the first one included."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def save_contexts(file: Path, contexts: Sequence[FixedContext]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    disk.write_atomically(file, json.dumps({"contexts": [asdict(context) for context in contexts]}) + "\n")


def load_contexts(file: Path) -> list[FixedContext]:
    """Read the states of a run.

    Raises:
        DamagedFileError: the file is not one that a run writes.
    """
    try:
        return [FixedContext(**context) for context in disk.read_json(file, "contexts")["contexts"]]
    except TypeError as error:
        raise disk.damaged_file_error(file, error) from error


def vocabulary_size(model: Any) -> int:
    """Number of logits of a causal LM."""
    return int(model.config.get_text_config().vocab_size)


class FixedStates:
    """Computes the distributions of the policy on the fixed states.

    Each rank has a share of the contexts. All ranks run the same number of forward passes, because sharded weights need it.

    Args:
        trainer: has the policy.
        contexts: those of all ranks; at least one.
        device_rows: maximum number of rows of a forward pass; 0: no limit.
    """

    def __init__(self, trainer: GRPOTrainer, contexts: Sequence[FixedContext], device_rows: int = 0):
        ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        padded = [*contexts, *[contexts[0]] * (-len(contexts) % ranks)]
        self.trainer, self.contexts = trainer, padded[rank::ranks]
        self.counted = [i < len(contexts) for i in range(rank, len(padded), ranks)]  # the others only fill up shares
        self.total = sum(len(context.positions) for context in contexts)
        # The columns of all rows of a batch are computed for each row.
        columns = max(len(context.positions) for context in contexts)
        rows = max(1, math.isqrt(MAX_BYTES // (4 * vocabulary_size(trainer.model) * columns)))
        self.batch_rows = min(rows, device_rows or rows)

    @torch.no_grad()
    def log_probs(self) -> list[Tensor]:
        """Log-probs of the current policy in nats over the vocabulary, with logits divided by the training temperature.

        Returns:
            For each context of this rank, a float32 tensor (K, V) on the CPU.
        """
        trainer, out = self.trainer, list[Tensor]()
        with (
            disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
            eval_mode(trainer.model),
        ):
            for start in range(0, len(self.contexts), self.batch_rows):
                out += self._score(self.contexts[start : start + self.batch_rows])
        return out

    def _score(self, batch: Sequence[FixedContext]) -> list[Tensor]:
        ids_NL, mask_NL = _right_pad([context.ids for context in batch])
        columns = sorted({k - 1 for context in batch for k in context.positions})
        place = {column: i for i, column in enumerate(columns)}
        device = self.trainer.accelerator.device
        with self.trainer.accelerator.autocast():
            logits = self.trainer.model(
                input_ids=ids_NL.to(device),
                attention_mask=mask_NL.to(device),
                use_cache=False,
                logits_to_keep=torch.tensor(columns, device=device),
            ).logits
        chosen = [logits[n, [place[k - 1] for k in context.positions]] for n, context in enumerate(batch)]
        return [torch.log_softmax(each.float() / self.trainer.temperature, dim=-1).cpu() for each in chosen]

    def mean_kl(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
        """Mean of KL(before || after) over the states of all ranks, in nats. All ranks must call it.

        Args:
            before: log-probs (K, V) of each context of this rank, from `log_probs`.
            after: the same of the policy to compare with.
        """
        device = self.trainer.accelerator.device
        total = torch.zeros((), dtype=torch.float64)
        for one_KV, other_KV, is_counted in zip(before, after, self.counted, strict=True):
            if is_counted:
                total += kl_divergence(one_KV.to(device), other_KV.to(device)).sum().cpu()
        return self.trainer.accelerator.reduce(total.float().to(device), "sum").item() / max(1, self.total)


def kl_divergence(before_KV: Tensor, after_KV: Tensor) -> Tensor:
    """(K,) KL(before || after) = sum_v p (log p - log q) in nats, from log-probs; summed in float64."""
    assert before_KV.ndim == 2 and before_KV.shape == after_KV.shape, (before_KV.shape, after_KV.shape)
    ratio_KV = (before_KV.double() - after_KV.double()).nan_to_num()  # -inf - -inf: a token that both exclude
    return (before_KV.double().exp() * ratio_KV).sum(-1)


def _right_pad(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows on the right, so that positions start at 0. Returns token ids and their mask, each (N, L)."""
    width = max(map(len, rows))
    ids_NL, mask_NL = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for n, row in enumerate(rows):
        ids_NL[n, : len(row)] = torch.tensor(row)
        mask_NL[n, : len(row)] = 1
    return ids_NL, mask_NL
