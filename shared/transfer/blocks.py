"""Copies between the paged pool and the flat bytes of one part; run in threads.

Flat order is `[layer, block, k|v, kv_head, slot < slots, row_width]` in both directions; where the layout swaps slot
and row in k, so does the flat order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.transfer.base import Part


def gather(cache: KVCache, part: Part, block_ids: Sequence[int]) -> torch.Tensor:
    """Bytes of `part`, which lies in the pool's `block_ids`, as a host copy `uint8 [part.num_bytes]`."""
    layers = cache.data[part.layer_start : part.layer_stop]
    picked = layers.index_select(1, torch.tensor(block_ids, device=layers.device))
    return flatten(picked, cache.layout, part.slots).cpu()


def flatten(blocks: torch.Tensor, layout: KVLayout, slots: int) -> torch.Tensor:
    """`uint8` bytes in flat order of blocks [layer, block, k|v, kv_head, slot, row_width], contiguous."""
    keys, values = _sides(blocks, layout, slots)
    return torch.stack((keys.flatten(2), values.flatten(2)), dim=2).view(-1).view(torch.uint8)


def scatter(cache: KVCache, part: Part, block_ids: Sequence[int], content: torch.Tensor) -> None:
    """Write the bytes of `part` into the pool's `block_ids`; slots past `part.slots` stay as they are.

    Returns when the bytes are in the pool, on a GPU too.
    """
    layout = cache.layout
    received = content.view(cache.data.dtype).view(part.num_layers, part.num_blocks, 2, -1).to(cache.data.device)
    layers = cache.data[part.layer_start : part.layer_stop]
    for index, block in enumerate(block_ids):
        for side, place in enumerate(_sides(layers[:, block : block + 1], layout, part.slots)):
            place.copy_(received[:, index, side].view(place.shape))
    if cache.data.is_cuda:
        torch.cuda.current_stream(cache.data.device).synchronize()


def _sides(blocks: torch.Tensor, layout: KVLayout, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the first `slots` keys and values of `blocks` [layer, block, k|v, kv_head, slot, row_width]."""
    keys, values = blocks[:, :, 0], blocks[:, :, 1, :, :slots]
    if not layout.k_transposed:
        return keys[:, :, :, :slots], values
    swapped = keys.view(*keys.shape[:-2], layout.row_width, layout.block_size)
    return swapped[..., :slots], values


def as_memory(content: torch.Tensor) -> memoryview:
    """The bytes of a host tensor, not copied."""
    return content.numpy().data
