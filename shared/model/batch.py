"""What one step computes: plain tensors, no sequence objects, no prefill flag.

The runner (`shared.engine`) fills a `ForwardBatch`; `Decoder.forward(batch, kv)` turns it into hidden states and
`Decoder.logits(rows)` turns chosen rows of those into logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def padded_rows(num_rows: int, row_pad: int) -> int:
    """Rows of a GEMM rounded up, so that every row goes through the same inner loop (engine-rules.md)."""
    return -(-num_rows // row_pad) * row_pad


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
