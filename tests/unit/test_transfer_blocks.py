"""Partly filled blocks travel in the order of the layout, by every way."""

from __future__ import annotations

import pytest
import torch

from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.transfer.base import Part
from shared.transfer.blocks import gather, scatter
from shared.transfer.shm import SharedMemoryTransport


def keys_of(cache: KVCache, block: int, slots: int) -> torch.Tensor:
    """The first `slots` keys of a block as [layer, kv_head, slot, row_width], whatever the order in memory."""
    layout, keys = cache.layout, cache.data[:, block, 0]
    if layout.k_transposed:
        keys = keys.reshape(*keys.shape[:2], layout.row_width, layout.block_size).transpose(2, 3)
    return keys[:, :, :slots]


@pytest.mark.parametrize("k_transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("slots", [1, 5, 16])
def test_the_valid_slots_arrive_and_no_other_is_touched(slots: int, dtype: str, k_transposed: bool) -> None:
    layout = KVLayout(2, 3, 8, 16, dtype, k_transposed=k_transposed)
    source, target = KVCache(layout, 4, shared=True), KVCache(layout, 4)
    source.data.copy_(torch.randn(source.data.shape) * 50)
    target.data.fill_(7)
    part = Part(0, 2, 0, 1, slots)
    transport = SharedMemoryTransport()
    info = transport.describe(source)
    assert info is not None
    route = transport.connect(info, layout)
    assert route is not None
    content = gather(source, part, [2])
    assert content.numel() == part.num_bytes(layout)
    assert torch.equal(route.content(part, bytearray(transport.wire(memoryview(b""), [2]))), content)
    scatter(target, part, [3], content)
    assert torch.equal(keys_of(target, 3, slots), keys_of(source, 2, slots))
    assert torch.equal(target.data[:, 3, 1, :, :slots], source.data[:, 2, 1, :, :slots])
    assert (keys_of(target, 3, 16)[:, :, slots:] == 7).all()
    assert (target.data[:, 3, 1, :, slots:] == 7).all()
    route.close()
    source.close()
