"""From a plan to int arrays: everything the forward pass needs, with no Python object left in it."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_

import numpy as np

from shared.engine.scheduler import Scheduled
from shared.model.batch import RaggedStep


def build_step(plan: Sequence_[Scheduled], block_size: int) -> RaggedStep:
    """Lay the planned tokens out in rows, sequence after sequence."""
    counts = np.array([item.num_tokens for item in plan])
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    first = np.array([item.sequence.num_computed for item in plan])
    context_lens = (first + counts).astype(np.int32)
    widths = -(-context_lens // block_size)
    tables = np.zeros((len(plan), int(widths.max())), dtype=np.int32)
    token_ids: list[int] = []
    logit_rows: list[int] = []
    for index, item in enumerate(plan):
        sequence, begin = item.sequence, item.sequence.num_computed
        token_ids += sequence.tokens[begin : begin + item.num_tokens]
        tables[index, : widths[index]] = sequence.block_ids[: widths[index]]
        logit_rows += [int(starts[index]) + offset for offset in rows_with_logits(item)]
    owners = np.repeat(np.arange(len(plan)), counts)
    positions = np.arange(starts[-1]) - (starts[:-1] - first)[owners]
    slots = tables[owners, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return RaggedStep(
        np.array(token_ids, dtype=np.int32),
        positions.astype(np.int32),
        slots,
        starts,
        tables,
        context_lens,
        np.array(logit_rows, dtype=np.int32),
    )


def rows_with_logits(item: Scheduled) -> range:
    """Offsets inside the item's rows whose logits are read: all for prompt log-probs, else the last if it samples."""
    sequence, count = item.sequence, item.num_tokens
    samples = bool(sequence.choices) and sequence.num_computed + count == len(sequence.tokens)
    if sequence.wants_prompt_logprobs:
        return range(count)
    return range(count - 1, count) if samples else range(0)
