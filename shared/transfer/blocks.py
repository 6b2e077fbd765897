"""Copies between the paged pool and the flat bytes of one part; run in threads.

Flat order is `[layer, block, k|v, kv_head, slot < slots, head_dim]` in both directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.kv.cache import KVCache
from shared.transfer.base import Part


def gather(cache: KVCache, part: Part, block_ids: Sequence[int]) -> torch.Tensor:
    """Bytes of `part`, which lies in the pool's `block_ids`, as a host copy `uint8 [part.num_bytes]`."""
    layers = cache.data[part.layer_start : part.layer_stop]
    picked = layers.index_select(1, torch.tensor(block_ids, device=layers.device))
    flat = picked[..., : part.slots, :].contiguous().cpu()
    return flat.view(-1).view(torch.uint8)


def scatter(cache: KVCache, part: Part, block_ids: Sequence[int], content: torch.Tensor) -> None:
    """Write the bytes of `part` into the pool's `block_ids`; slots past `part.slots` stay as they are.

    Returns when the bytes are in the pool, on a GPU too.
    """
    layout = cache.layout
    shape = (part.num_layers, part.num_blocks, 2, layout.num_kv_heads, part.slots, layout.head_dim)
    values = content.view(cache.data.dtype).view(shape).to(cache.data.device)
    layers = cache.data[part.layer_start : part.layer_stop]
    for index, block in enumerate(block_ids):
        layers[:, block, :, :, : part.slots].copy_(values[:, index])
    if cache.data.is_cuda:
        torch.cuda.current_stream(cache.data.device).synchronize()


def as_memory(content: torch.Tensor) -> memoryview:
    """The bytes of a host tensor, not copied."""
    return content.numpy().data
