"""Paged attention in plain torch whose every row has the same bits whatever is computed beside it.

Plain torch does not promise that: its kernels choose another summation order for few rows, odd rows or another
context length. So rows are padded to a multiple of `row_pad`, keys are read in splits of SPLIT tokens at fixed absolute
positions, and the splits' partial sums are added one after the other; a split nobody sees adds exact zeros.
Measured in engine-rules.md; `shared.model.invariance` checks it at start-up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.model.batch import AttentionGroup, ForwardBatch, padded_rows

SPLIT = 128
"""Tokens whose weighted values are summed in one product; a multiple of every block size."""

_WIDTH_PAD = 4
"""Values are padded to a multiple of this width: products 5 to 7 or 9 to 11 columns wide depend on the row's place."""

_TILE_TOKENS = 64
"""Query tokens of a sequence scored at once: bounds the score matrix, rows being independent."""

_GATHER_VALUES = 1 << 19
"""K and V values gathered at once (2 MiB of float32, so that they are still in cache when read), unless one sequence
alone has more. With 32 sequences of 250 tokens a step is a fifth faster than with one gather for all."""


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Heads of one rank; `row_pad` as in `ForwardBatch`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None
    row_pad: int

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def heads_per_token(self) -> int:
        """Rows of [*, head_dim] that the fused projection yields for a token: q heads, k heads, v heads."""
        return self.num_heads + 2 * self.num_kv_heads


@dataclass(frozen=True, slots=True)
class _Tile:
    """Query rows scored together: [num_seqs * num_kv_heads, rows, head_dim], rows packed query-major, then head."""

    query_rows: Tensor  # int64, rows of the fused projection seen as [num_tokens * heads_per_token, head_dim]
    mask: Tensor  # [num_seqs, 1, rows, num_keys], 0 where visible, -inf elsewhere
    num_keys: int


@dataclass(frozen=True, slots=True)
class _Part:
    """Sequences whose K and V are gathered together."""

    kv_rows: Tensor  # int64, rows of a layer's cache seen as [num_blocks * 2 * num_kv_heads, block_size, head_dim]
    num_seqs: int
    tiles: tuple[_Tile, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Every index of one step, computed once and used by all layers."""

    blocks: Tensor  # int64 [num_tokens], where each token's K and V go
    slots: Tensor
    parts: tuple[_Part, ...]
    output_rows: Tensor  # int64 [num_tokens * num_heads], rows of the tiles' concatenated results


def plan_attention(batch: ForwardBatch, heads: HeadLayout, block_size: int) -> AttentionPlan:
    """Lay out one step. Raises ValueError when `block_size` does not divide SPLIT."""
    if SPLIT % block_size:
        raise ValueError(f"block size {block_size} does not divide {SPLIT}")
    return _Planner(batch, heads, block_size).plan()


class _Planner:
    """Builds the plan; `_num_results` counts the result rows of the tiles made so far."""

    def __init__(self, batch: ForwardBatch, heads: HeadLayout, block_size: int) -> None:
        self._batch = batch
        self._heads = heads
        self._block_size = block_size
        self._num_results = 1  # row 0 is all zeros, for padding tokens
        num_tokens = len(batch.token_ids)
        self._output_rows = batch.token_ids.new_zeros((num_tokens, heads.num_heads))

    def plan(self) -> AttentionPlan:
        slots = self._batch.slot_mapping
        parts = tuple(part for group in self._batch.groups for part in self._group(group))
        return AttentionPlan(slots // self._block_size, slots % self._block_size, parts, self._output_rows.flatten())

    def _group(self, group: AttentionGroup) -> list[_Part]:
        blocks_per_split = SPLIT // self._block_size
        num_blocks = group.block_tables.shape[1]
        tables = F.pad(group.block_tables, (0, -num_blocks % blocks_per_split))
        per_seq = 2 * self._heads.num_kv_heads * self._heads.head_dim * tables.shape[1] * self._block_size
        step = max(1, _GATHER_VALUES // per_seq)
        rows = group.rows.view(group.num_seqs, group.query_len)
        max_context = num_blocks * self._block_size
        return [
            self._part(rows[first : first + step], tables[first : first + step], max_context)
            for first in range(0, group.num_seqs, step)
        ]

    def _part(self, rows: Tensor, tables: Tensor, max_context: int) -> _Part:
        kv_heads = torch.arange(self._heads.num_kv_heads, device=tables.device)
        sides = torch.arange(2, device=tables.device)[:, None, None, None]
        kv_rows = (tables[:, None, :] * 2 + sides) * self._heads.num_kv_heads + kv_heads[:, None]
        query_len = rows.shape[1]
        tiles = []
        for first in range(0, query_len, _TILE_TOKENS):
            end = min(first + _TILE_TOKENS, query_len)
            # A group's tokens end at the last token in the cache, so earlier tiles cannot see the last keys.
            num_keys = padded_rows(max_context - query_len + end, SPLIT)
            tiles.append(self._tile(rows[:, first:end], num_keys))
        return _Part(kv_rows.flatten(), len(rows), tuple(tiles))

    def _tile(self, rows: Tensor, num_keys: int) -> _Tile:
        heads, group_size = self._heads, self._heads.group_size
        query_len = rows.shape[1]
        num_rows = padded_rows(query_len * group_size, heads.row_pad)
        packed = torch.arange(num_rows, device=rows.device)
        tokens = rows[:, (packed // group_size).clamp(max=query_len - 1)]  # [num_seqs, num_rows]
        kv_heads = torch.arange(heads.num_kv_heads, device=rows.device)
        query_heads = kv_heads[:, None] * group_size + packed % group_size  # [num_kv_heads, num_rows]
        query_rows = tokens[:, None] * heads.heads_per_token + query_heads
        self._place_results(rows, num_rows)
        return _Tile(query_rows.flatten(), self._mask(self._batch.positions[tokens], num_keys), num_keys)

    def _place_results(self, rows: Tensor, num_rows: int) -> None:
        """Note where each (token, head) of a tile will lie among the results."""
        heads, group_size = self._heads, self._heads.group_size
        num_seqs, query_len = rows.shape
        shape = (num_seqs, query_len, heads.num_kv_heads, group_size)
        seq, query, kv_head, member = (
            torch.arange(size, device=rows.device).view([-1 if axis == at else 1 for at in range(4)])
            for axis, size in enumerate(shape)
        )
        places = (seq * heads.num_kv_heads + kv_head) * num_rows + query * group_size + member
        self._output_rows[rows.flatten()] = (self._num_results + places).view(-1, heads.num_heads)
        self._num_results += num_seqs * heads.num_kv_heads * num_rows

    def _mask(self, positions: Tensor, num_keys: int) -> Tensor:
        keys = torch.arange(num_keys, device=positions.device)
        age = positions[:, None, :, None] - keys
        hidden = age < 0
        if self._heads.sliding_window is not None:
            hidden |= age >= self._heads.sliding_window
        return torch.zeros(hidden.shape, device=positions.device).masked_fill_(hidden, float("-inf"))


def paged_attention(fused: Tensor, cache: Tensor, plan: AttentionPlan, heads: HeadLayout) -> Tensor:
    """Write the step's K and V to the cache, then attend to what the cache holds.

    fused [num_tokens, heads_per_token * head_dim], q and k rotated; cache [block, 2, kv_head, slot, head_dim] is
    written. K and V are always read back, so a lossy cache is seen rounded by the chunk that wrote it too.
    Returns [num_tokens, num_heads * head_dim]; rows of padding tokens are zero.
    """
    num_tokens = len(fused)
    by_head = fused.view(num_tokens, heads.heads_per_token, heads.head_dim)
    new = by_head[:, heads.num_heads :].view(num_tokens, 2, heads.num_kv_heads, heads.head_dim)
    cache[plan.blocks, :, :, plan.slots] = new.to(cache.dtype)
    query_rows = by_head.view(-1, heads.head_dim)
    cache_rows = cache.view(-1, cache.shape[3], heads.head_dim)
    results = [fused.new_zeros((1, heads.head_dim))]
    for part in plan.parts:
        shape = (2, part.num_seqs * heads.num_kv_heads, -1, heads.head_dim)
        keys, values = cache_rows.index_select(0, part.kv_rows).view(shape).to(fused.dtype)
        if heads.head_dim % _WIDTH_PAD:
            values = F.pad(values, (0, -heads.head_dim % _WIDTH_PAD))
        for tile in part.tiles:
            queries = query_rows.index_select(0, tile.query_rows).view(len(keys), -1, heads.head_dim)
            attended = _attend(queries, keys[:, : tile.num_keys], values[:, : tile.num_keys], tile.mask, heads)
            results.append(attended[..., : heads.head_dim].reshape(-1, heads.head_dim).to(fused.dtype))
    return torch.cat(results).index_select(0, plan.output_rows).view(num_tokens, -1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: HeadLayout) -> Tensor:
    """Softmax attention of [batch, rows, head_dim] over [batch, keys, head_dim], summed split by split; float32."""
    scores = torch.bmm(queries, keys.transpose(1, 2)).float()
    by_seq = scores.view(len(mask), heads.num_kv_heads, *mask.shape[2:])
    weights = torch.add(mask, by_seq, alpha=heads.scale).view_as(scores)
    weights.sub_(weights.amax(-1, keepdim=True)).exp_()
    totals = weights.view(*weights.shape[:-1], -1, SPLIT).sum(-1)  # [batch, rows, splits]
    weights = weights.to(values.dtype)
    total = totals[..., :1]
    result = torch.bmm(weights[..., :SPLIT], values[:, :SPLIT]).float()
    for split in range(1, totals.shape[-1]):
        inside = slice(split * SPLIT, (split + 1) * SPLIT)
        total = total + totals[..., split : split + 1]
        result += torch.bmm(weights[..., inside], values[:, inside])
    return result.div_(total)
