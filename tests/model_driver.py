"""Runs a decoder against a paged cache in the most obvious way: the reference for what the engine does.

Blocks are handed out in shuffled order and filled with numbers far from zero before use, so that a wrong block table or
a missing mask shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.kv.layout import KVLayout
from shared.model.batch import AttentionGroup, ForwardBatch, padded_rows
from shared.model.language_model import LanguageModel

_UNWRITTEN = 50.0


@dataclass(eq=False)
class DrivenSequence:
    """Tokens computed so far and the blocks that hold their K and V."""

    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0


class ModelDriver:
    """Owns a cache; `step` computes any mix of chunks and single tokens, `logits` of every new token come back."""

    def __init__(
        self, decoder: LanguageModel, num_blocks: int = 256, block_size: int = 16, kv_dtype: torch.dtype = torch.float32
    ) -> None:
        config = decoder.config
        self._decoder = decoder
        self._block_size = block_size
        self._free = list(range(1, num_blocks))
        random.Random(5).shuffle(self._free)
        name = str(kv_dtype).removeprefix("torch.")
        layout = KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_size, name)
        shape = (config.num_layers, num_blocks, 2, config.num_kv_heads, block_size, layout.row_width)
        self.cache = torch.full(shape, _UNWRITTEN, dtype=kv_dtype, device=decoder.device)

    def step(self, items: Sequence[tuple[DrivenSequence, Sequence[int]]], extra_blocks: int = 0) -> list[Tensor]:
        """Hidden rows of each item's tokens. `extra_blocks` widens the block tables beyond what is needed."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        groups: dict[int, list[tuple[int, DrivenSequence]]] = {}
        for sequence, new in items:
            self._grow(sequence, len(new))
            groups.setdefault(len(new), []).append((len(tokens), sequence))
            for token in new:
                at = sequence.num_tokens
                tokens.append(token)
                positions.append(at)
                slots.append(sequence.blocks[at // self._block_size] * self._block_size + at % self._block_size)
                sequence.num_tokens += 1
        padding = [0] * (padded_rows(len(tokens), self._decoder.row_pad) - len(tokens))
        batch = ForwardBatch(
            token_ids=self._ids(tokens + padding),
            positions=self._ids(positions + padding),
            slot_mapping=self._ids(slots + padding),
            groups=tuple(self._group(length, members, extra_blocks) for length, members in groups.items()),
        )
        hidden = self._decoder.forward(batch, self.cache)
        return list(torch.split(hidden[: len(tokens)], [len(new) for _, new in items]))

    def logits(self, items: Sequence[tuple[DrivenSequence, Sequence[int]]], extra_blocks: int = 0) -> list[Tensor]:
        """float32 [num_new_tokens, vocab_size] for each item."""
        hidden = self.step(items, extra_blocks)
        return list(torch.split(self._decoder.logits(torch.cat(hidden)), [len(rows) for rows in hidden]))

    def chunked(self, tokens: Sequence[int], size: int) -> Tensor:
        """Logits of a new sequence computed in chunks of `size` tokens."""
        sequence = DrivenSequence()
        starts = range(0, len(tokens), size)
        return torch.cat([self.logits([(sequence, tokens[start : start + size])])[0] for start in starts])

    def release(self, sequence: DrivenSequence) -> None:
        """Take a sequence's blocks back."""
        self._free.extend(sequence.blocks)
        sequence.blocks.clear()

    def _grow(self, sequence: DrivenSequence, count: int) -> None:
        while len(sequence.blocks) * self._block_size < sequence.num_tokens + count:
            block = self._free.pop()
            self.cache[:, block] = _UNWRITTEN
            sequence.blocks.append(block)

    def _group(self, length: int, members: list[tuple[int, DrivenSequence]], extra_blocks: int) -> AttentionGroup:
        width = max(len(sequence.blocks) for _, sequence in members) + extra_blocks
        return AttentionGroup(
            rows=self._ids([start + offset for start, _ in members for offset in range(length)]),
            num_seqs=len(members),
            query_len=length,
            block_tables=self._ids([[*seq.blocks, *[0] * (width - len(seq.blocks))] for _, seq in members]),
            context_lens=self._ids([sequence.num_tokens for _, sequence in members]),
        )

    def _ids(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._decoder.device)
