"""What one step computes: plain arrays, no sequence objects, no prefill flag.

The engine lays a plan out as a `RaggedStep`; the torch runner makes a `ForwardBatch` of it, `Decoder.forward` makes
hidden states of that, and `Decoder.logits` logits of chosen rows of those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


def padded_rows(num_rows: int, row_pad: int) -> int:
    """Rows of a GEMM rounded up, so that every row goes through the same inner loop (engine-rules.md)."""
    return -(-num_rows // row_pad) * row_pad


@dataclass(frozen=True, slots=True)
class RaggedStep:
    """One step as plain int arrays: the tokens of a sequence are neighbours, sequences follow one another.

    The same bytes can be broadcast to other ranks, copied into a captured graph's buffers or handed to one native call.
    """

    token_ids: Int32  # [num_tokens]
    positions: Int32  # [num_tokens]
    slots: Int64  # [num_tokens], block_id * block_size + slot
    starts: Int32  # [num_seqs + 1], first row of each sequence, then num_tokens
    block_tables: Int32  # [num_seqs, width], padded with block 0
    context_lens: Int32  # [num_seqs], tokens in the cache once this step's are written
    logit_rows: Int32  # rows to turn into logits, in ascending order


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Sequences that bring the same number of new tokens: all decode rows, or one prefill chunk.

    `context_lens` counts the tokens each sequence has in the cache once this step's are written. The positions of
    the query tokens are `ForwardBatch.positions[rows]`; they decide what each token may see.
    """

    rows: Tensor  # int64 [num_seqs * query_len], indices into the batch's tokens, sequence-major
    num_seqs: int
    query_len: int
    block_tables: Tensor  # int64 [num_seqs, num_blocks], padded with block 0
    context_lens: Tensor  # int64 [num_seqs]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of one step, already padded to a multiple of `Decoder.row_pad` (see `padded_rows`).

    Padding rows have token 0, position 0, slot 0 (block 0 belongs to nobody) and are in no group. All tensors are on
    the decoder's device.
    """

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    slot_mapping: Tensor  # int64 [num_tokens], block_id * block_size + slot
    groups: tuple[AttentionGroup, ...]
