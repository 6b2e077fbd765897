"""From a plan to int arrays: everything the forward pass needs, with no Python object left in it.

The arrays are plain data on purpose: the same bytes can be broadcast to other ranks, copied into a captured
graph's buffers or handed to one native call.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.engine.scheduler import Scheduled

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GroupInput:
    """Sequences with equally many new tokens; see `shared.model.batch.AttentionGroup`."""

    rows: Int64
    query_len: int
    block_tables: Int64
    context_lens: Int64


@dataclass(frozen=True, slots=True)
class StepInput:
    """One ragged step. `logit_rows` are the rows to turn into logits, in plan order."""

    token_ids: Int64
    positions: Int64
    slot_mapping: Int64
    groups: tuple[GroupInput, ...]
    logit_rows: Int64


def build_step_input(plan: Sequence_[Scheduled], block_size: int, row_pad: int) -> StepInput:
    """Lay the planned tokens out in rows, padded to a multiple of `row_pad` with rows of block 0."""
    counts = [item.num_tokens for item in plan]
    starts = np.concatenate(([0], np.cumsum(counts)))
    total = -(-int(starts[-1]) // row_pad) * row_pad
    token_ids, positions, slots = (np.zeros(total, dtype=np.int64) for _ in range(3))
    logit_rows: list[int] = []
    for item, start in zip(plan, starts, strict=False):
        sequence, first, count = item.sequence, item.sequence.num_computed, item.num_tokens
        rows = slice(start, start + count)
        token_ids[rows] = sequence.tokens[first : first + count]
        positions[rows] = np.arange(first, first + count)
        blocks = np.asarray(sequence.block_ids, dtype=np.int64)
        slots[rows] = blocks[positions[rows] // block_size] * block_size + positions[rows] % block_size
        logit_rows.extend(int(start) + offset for offset in rows_with_logits(item))
    groups = tuple(_group(plan, starts, length, block_size) for length in sorted(set(counts)))
    return StepInput(token_ids, positions, slots, groups, np.asarray(logit_rows, dtype=np.int64))


def rows_with_logits(item: Scheduled) -> range:
    """Offsets inside the item's rows whose logits are read: all for prompt log-probs, else the last if it samples."""
    sequence, count = item.sequence, item.num_tokens
    samples = bool(sequence.choices) and sequence.num_computed + count == len(sequence.tokens)
    if sequence.wants_prompt_logprobs:
        return range(count)
    return range(count - 1, count) if samples else range(0)


def _group(plan: Sequence_[Scheduled], starts: Int64, query_len: int, block_size: int) -> GroupInput:
    members = [
        (item.sequence, start) for item, start in zip(plan, starts, strict=False) if item.num_tokens == query_len
    ]
    context_lens = np.array([sequence.num_computed + query_len for sequence, _ in members], dtype=np.int64)
    widths = -(-context_lens // block_size)
    tables = np.zeros((len(members), int(widths.max())), dtype=np.int64)
    for row, (sequence, _) in enumerate(members):
        tables[row, : widths[row]] = sequence.block_ids[: widths[row]]
    rows = np.concatenate([np.arange(start, start + query_len) for _, start in members])
    return GroupInput(rows.astype(np.int64), query_len, tables, context_lens)
