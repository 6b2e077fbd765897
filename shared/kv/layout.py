"""How KV blocks lie in memory, and the fingerprint two workers must share to exchange them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one worker's paged cache: `[layer][block][k|v][kv_head][slot][row_width]`.

    A head range is contiguous inside a block, so a later planner can cut it for tensor parallelism. With `k_transposed`
    slot and row are swapped inside each head of k: `[row_width][slot]`. A row is a head's `head_dim` values; int8
    rows end with the 4 bytes of their float32 scale.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str = "float32"
    k_transposed: bool = False

    @property
    def row_width(self) -> int:
        """Values of one head of one token, a scale's bytes included."""
        return self.head_dim + (_SCALE_BYTES if self.dtype == "int8" else 0)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.row_width * _DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def fingerprint(self) -> str:
        order = ":kt" if self.k_transposed else ""
        text = f"v1:{self.num_layers}:{self.num_kv_heads}:{self.head_dim}:{self.block_size}:{self.dtype}{order}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]
