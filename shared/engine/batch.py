"""From a plan to int arrays: everything the forward pass needs, with no Python object left in it."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_

import numpy as np

from shared.engine.scheduler import Scheduled
from shared.model.batch import RaggedStep


def build_step(plan: Sequence_[Scheduled], block_size: int) -> RaggedStep:
    """Lay the planned tokens out in rows, sequence after sequence.

    Lists until the end: most steps have few rows, and an operation on a small array costs as much as ten on a list.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, context_lens = [0], []
    tables: list[list[int]] = []
    logit_rows: list[int] = []
    for item in plan:
        sequence, begin = item.sequence, item.sequence.num_computed
        end = begin + item.num_rows
        blocks = sequence.block_ids[: -(-end // block_size)]
        tables.append(blocks)
        token_ids += sequence.tokens[begin : begin + item.num_tokens]
        token_ids += item.draft
        positions += range(begin, end)
        slots += [blocks[at // block_size] * block_size + at % block_size for at in range(begin, end)]
        logit_rows += [starts[-1] + offset for offset in rows_with_logits(item)]
        starts.append(starts[-1] + item.num_rows)
        context_lens.append(end)
    width = max(map(len, tables))
    return RaggedStep(
        np.array(token_ids, dtype=np.int32),
        np.array(positions, dtype=np.int32),
        np.array(slots, dtype=np.int64),
        np.array(starts, dtype=np.int32),
        np.array([blocks + [0] * (width - len(blocks)) for blocks in tables], dtype=np.int32),
        np.array(context_lens, dtype=np.int32),
        np.array(logit_rows, dtype=np.int32),
    )


def rows_with_logits(item: Scheduled) -> range:
    """Offsets inside the item's rows whose logits are read: all for prompt log-probs, else the last if it samples.

    With a draft there is one more for each of its tokens.
    """
    sequence, count = item.sequence, item.num_tokens
    samples = bool(sequence.choices) and sequence.num_computed + count == len(sequence.tokens)
    if sequence.wants_prompt_logprobs:
        return range(count)
    return range(count - 1, item.num_rows) if samples else range(0)
