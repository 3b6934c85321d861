"""The plan of updates and micro-batches, and the packing of rows."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from aem_exp.rollout.rows import Row
from aem_exp.rollout.sampling.base import keyed_generator
from aem_exp.training.packing import PADDING_ROW, pack_rows
from aem_exp.training.updates import plan_updates, split_micro_batches

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def shares(lengths, mini_batch, ranks):
    return [plan_updates(lengths, mini_batch, keyed_generator(("test",)), rank, ranks) for rank in range(ranks)]


@given(LENGTHS, st.integers(0, 12), st.integers(1, 5))
def test_each_row_is_trained_once_on_any_number_of_ranks(lengths, mini_batch, ranks):
    alone, together = shares(lengths, mini_batch, 1)[0], shares(lengths, mini_batch, ranks)
    assert sorted(i for update in alone for i in update) == list(range(len(lengths)))
    for u, update in enumerate(alone):
        parts = [share[u] for share in together]
        assert sorted(i for part in parts for i in part if i != PADDING_ROW) == sorted(update)
        assert len({len(part) for part in parts}) == 1  # collectives need the same number of rows on all ranks


@given(LENGTHS, st.integers(1, 12))
def test_sizes_of_updates_differ_by_at_most_one_row(lengths, mini_batch):
    sizes = [len(update) for update in shares(lengths, mini_batch, 1)[0]]
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == max(1, round(len(lengths) / mini_batch))


def test_split_micro_batches_by_rows():
    lengths = [10, 30, 90, 20, 100, 5, 5, 40]
    assert split_micro_batches([4, 2, 7, 1, 3], lengths, 2) == [[4, 2], [7, 1], [3]]
    assert split_micro_batches([4, 2, 7], lengths, 0) == [[4, 2, 7]]
    assert split_micro_batches([], lengths, 2) == []


@given(LENGTHS, st.integers(1, 400), st.integers(0, 5))
def test_micro_batches_keep_their_limits(lengths, tokens, rows):
    """Padding counts; a single row may exceed the limit of tokens. Each row is in one micro-batch, in order."""
    share = [*sorted(range(len(lengths)), key=lambda i: -lengths[i]), PADDING_ROW]
    micros = split_micro_batches(share, lengths, rows, tokens)
    assert [i for micro in micros for i in micro] == share
    for micro in micros:
        assert len(micro) == 1 or len(micro) * max(lengths[i] if i != PADDING_ROW else 0 for i in micro) <= tokens
        assert not rows or len(micro) <= rows


def test_pack_rows():
    rows = [
        Row([5, 6, 7], [8, 9], [1, 0], [-1.0, 0.0], [0.5, 0.0], 0, [0]),
        Row([5], [8, 9, 3, 4], [1, 0, 1, 1], [-1.0, 0.0, -2.0, -3.0], [0.5, 0.0, 0.1, 0.2], 1, [0, 1]),
    ]
    batch = pack_rows(rows, [1, 0, PADDING_ROW], pad_id=0)
    assert batch["prompt_ids"].tolist() == [[0, 0, 5], [5, 6, 7], [5, 6, 7]]
    assert batch["prompt_mask"].tolist() == [[0, 0, 1], [1, 1, 1], [1, 1, 1]]
    assert batch["completion_ids"].tolist() == [[8, 9, 3, 4], [8, 9, 0, 0], [8, 9, 0, 0]]
    assert batch["completion_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch["tool_mask"].tolist() == [[1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert all(value.dtype == torch.long for value in batch.values())
