"""Does a row's result depend on the rows beside it? Asked of the model's own shapes at start-up, not assumed.

The same tokens whatever runs beside them rests on it (engine-rules.md). Kernel libraries choose other inner loops for
few rows, odd rows or another thread count, and no list of versions and processors says where, so the probe compares
bits. Where it fails, the worker must not promise equality.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.kv.layout import KVLayout
from shared.model.batch import AttentionGroup, ForwardBatch, padded_rows
from shared.model.language_model import LanguageModel
from shared.model.source import ModelSource
from shared.protocol.sampling import DRAWS_VERSION

_ROW_COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 17, 20)
_CHUNK_SIZES = (1, 2, 3, 5, 7, 11, 33)
_CHUNKED_TOKENS = 44
_FIRST_LENGTH, _LENGTH_STEP = 44, 5  # the longest sequence passes the first split of 128 keys
_NUM_LAYERS = 2  # the second layer's keys depend on the first one's attention


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """`detail` says what was compared, or the first comparison that failed."""

    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class _Sequence:
    token_ids: Tensor  # int64 [num_tokens]
    blocks: Tensor  # int64 [num_blocks]


def probe(decoder: LanguageModel, layout: KVLayout) -> ProbeResult:
    """Compare bits of a few short made-up sequences: alone, side by side and in chunks. Keeps no state."""
    runner = _Probe(decoder, layout)
    for what, same in runner.comparisons():
        if not same:
            return ProbeResult(False, f"bits differ {what}")
    return ProbeResult(True, f"bits equal for row counts {_ROW_COUNTS} and chunks of {_CHUNK_SIZES} tokens")


def numerics_fingerprint(decoder: LanguageModel, source: ModelSource, kv_dtype: str) -> str:
    """16 hex digits that are equal on workers whose results agree in every bit.

    Beside names and versions it covers the bits of a small computation on the model's own weights: which inner loops
    a library picks on this processor shows nowhere else.
    """
    config = decoder.config
    layout = KVLayout(decoder.num_layers, config.num_kv_heads, config.head_dim, 16, kv_dtype)
    parts = [
        decoder.kernel_set,
        f"draws-{DRAWS_VERSION}",
        str(decoder.dtype),
        kv_dtype,
        str(decoder.row_pad),
        source.revision,
        _Probe(decoder, layout).evidence(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


class _Probe:
    """Made-up sequences in a small cache of their own, on the model's first layers and its head."""

    def __init__(self, decoder: LanguageModel, layout: KVLayout) -> None:
        self._decoder = decoder.truncated(_NUM_LAYERS)
        self._block_size = layout.block_size
        longest = decoder.config.max_position
        lengths = [min(_FIRST_LENGTH + _LENGTH_STEP * index, longest) for index in range(max(_ROW_COUNTS))]
        self._sequences = self._made_up(lengths)
        num_blocks = 1 + sum(len(sequence.blocks) for sequence in self._sequences)
        shape = (num_blocks, 2, layout.num_kv_heads, layout.block_size, layout.row_width)
        dtype = getattr(torch, layout.dtype)
        self._cache = torch.zeros((self._decoder.num_layers, *shape), dtype=dtype, device=decoder.device)

    def comparisons(self) -> Iterator[tuple[str, bool]]:
        """What was compared, and whether every bit was the same."""
        everything = [(sequence, 0, len(sequence.token_ids)) for sequence in self._sequences]
        together = self._run(everything)
        yield from self._decode_comparisons(torch.stack([rows[-1] for rows in together]))
        first = self._sequences[0]
        reference = together[0][:_CHUNKED_TOKENS]
        for size in _CHUNK_SIZES:
            starts = range(0, len(reference), size)
            chunks = [self._run([(first, start, min(start + size, len(reference)))])[0] for start in starts]
            yield f"when a prompt is computed in chunks of {size} tokens", torch.equal(torch.cat(chunks), reference)

    def _decode_comparisons(self, last: Tensor) -> Iterator[tuple[str, bool]]:
        """One row a sequence: `last` holds what each sequence's last token gave inside a whole prompt."""
        logits = self._decoder.logits(last)
        for count in _ROW_COUNTS:
            ends = [(item, len(item.token_ids) - 1, len(item.token_ids)) for item in self._sequences[:count]]
            yield f"when {count} sequences decode together", torch.equal(torch.cat(self._run(ends)), last[:count])
            rows = self._decoder.logits(last[-count:])
            yield f"in logits of {count} rows at once", torch.equal(rows, logits[-count:])

    def evidence(self) -> str:
        """Digest of the bits of one sequence's logits."""
        sequence = self._sequences[0]
        hidden = self._run([(sequence, 0, len(sequence.token_ids))])[0]
        return hashlib.sha256(self._decoder.logits(hidden[-4:]).cpu().numpy().tobytes()).hexdigest()

    def _made_up(self, lengths: Sequence[int]) -> list[_Sequence]:
        device, sequences, next_block = self._decoder.device, [], 1
        for index, length in enumerate(lengths):
            num_blocks = -(-length // self._block_size)
            token_ids = (torch.arange(length) * 7919 + index * 104729) % self._decoder.config.vocab_size
            blocks = torch.arange(next_block, next_block + num_blocks)
            sequences.append(_Sequence(token_ids.to(device), blocks.to(device)))
            next_block += num_blocks
        return sequences

    def _run(self, pieces: Sequence[tuple[_Sequence, int, int]]) -> list[Tensor]:
        """Hidden rows of tokens start … end of each sequence, all in one step; equal lengths form one group."""
        spans = [(sequence, torch.arange(start, end, device=self._cache.device)) for sequence, start, end in pieces]
        num_tokens = sum(len(positions) for _, positions in spans)
        padding = torch.zeros(
            padded_rows(num_tokens, self._decoder.row_pad) - num_tokens, dtype=torch.int64, device=self._cache.device
        )
        slots = [
            sequence.blocks[positions // self._block_size] * self._block_size + positions % self._block_size
            for sequence, positions in spans
        ]
        batch = ForwardBatch(
            token_ids=torch.cat([*(sequence.token_ids[positions] for sequence, positions in spans), padding]),
            positions=torch.cat([*(positions for _, positions in spans), padding]),
            slot_mapping=torch.cat([*slots, padding]),
            groups=self._groups(spans),
        )
        hidden = self._decoder.forward(batch, self._cache)
        return list(torch.split(hidden[:num_tokens], [len(positions) for _, positions in spans]))

    def _groups(self, spans: Sequence[tuple[_Sequence, Tensor]]) -> tuple[AttentionGroup, ...]:
        starts = [0]
        for _, positions in spans:
            starts.append(starts[-1] + len(positions))
        groups = []
        for length in sorted({len(positions) for _, positions in spans}):
            members = [index for index, (_, positions) in enumerate(spans) if len(positions) == length]
            rows = torch.cat([torch.arange(starts[index], starts[index] + length) for index in members])
            tables = [spans[index][0].blocks for index in members]
            ends = torch.stack([spans[index][1][-1] for index in members]) + 1
            table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
            groups.append(AttentionGroup(rows.to(ends.device), len(members), length, table, ends))
        return tuple(groups)
