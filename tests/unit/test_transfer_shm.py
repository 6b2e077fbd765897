"""The map of a peer's pool: which files it takes, and what it hands out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import TransferError
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.transfer.base import Part
from shared.transfer.blocks import gather
from shared.transfer.shm import SharedMemoryTransport

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=4, dtype="bfloat16")
PART = Part(1, 3, 0, 2, 4)


@pytest.fixture
def pool() -> Iterator[KVCache]:
    cache = KVCache(LAYOUT, 8, shared=True)
    cache.data.copy_(torch.randn(cache.data.shape))
    yield cache
    cache.close()


def _wire(block_ids: list[int]) -> bytearray:
    return bytearray(SharedMemoryTransport().wire(memoryview(b""), block_ids))


def _content(pool: KVCache, part: Part, wire: bytearray) -> torch.Tensor:
    transport = SharedMemoryTransport()
    info = transport.describe(pool)
    assert info is not None
    route = transport.connect(info, LAYOUT)
    assert route is not None
    assert route.wire_length(part) == 4 * part.num_blocks
    try:
        return route.content(part, wire)
    finally:
        route.close()


@pytest.mark.parametrize(
    ("part", "block_ids"), [(PART, [6, 1]), (Part(0, 3, 5, 6, 1), [7]), (Part(2, 3, 0, 3, 4), [3, 3, 0])]
)
def test_content_is_what_a_copy_of_the_pool_holds(pool: KVCache, part: Part, block_ids: list[int]) -> None:
    assert torch.equal(_content(pool, part, _wire(block_ids)), gather(pool, part, block_ids))


def test_content_outlives_the_map_and_the_pool(pool: KVCache) -> None:
    content = _content(pool, PART, _wire([2, 3]))
    before = content.clone()
    pool.data.zero_()
    assert torch.equal(content, before)


@pytest.mark.parametrize("block_ids", [[8, 0], [0, 2**32 - 1], [0], [0, 1, 2]])
def test_blocks_outside_the_pool_are_refused(pool: KVCache, block_ids: list[int]) -> None:
    with pytest.raises(TransferError) as raised:
        _content(pool, PART, _wire(block_ids))
    assert raised.value.reason == "malformed"


def test_block_numbers_travel_as_four_bytes_each() -> None:
    assert bytes(_wire([1, 2**31])) == b"\0\0\0\1\x80\0\0\0"


def test_a_private_pool_cannot_be_reached() -> None:
    assert SharedMemoryTransport().describe(KVCache(LAYOUT, 2)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"host": "elsewhere"},
        {"host": 1},
        {"inode": 0},
        {"device": 0},
        {"num_blocks": 7},
        {"num_blocks": "8"},
        {"num_blocks": 0},
        {"num_blocks": -8},
        {"path": "/dev/shm/slipstream-kv-gone"},
        {"path": "/etc/passwd"},
        {"path": "/dev/shm/slipstream-kv-\0"},
        {"path": 1},
    ],
)
def test_anything_but_the_very_same_file_is_no_route(pool: KVCache, change: dict[str, str | int]) -> None:
    transport = SharedMemoryTransport()
    info = transport.describe(pool)
    assert info is not None
    assert transport.connect({**info, **change}, LAYOUT) is None
    assert transport.connect({}, LAYOUT) is None


def test_another_layout_is_no_route(pool: KVCache) -> None:
    transport = SharedMemoryTransport()
    info = transport.describe(pool)
    assert info is not None
    assert transport.connect(info, replace(LAYOUT, dtype="float32")) is None


def test_a_replaced_file_is_no_route(pool: KVCache) -> None:
    transport = SharedMemoryTransport()
    info = transport.describe(pool)
    assert info is not None
    assert pool.shared_path is not None
    path = Path(pool.shared_path)
    kept = path.with_name(path.name + "-kept")
    path.rename(kept)
    try:
        path.write_bytes(kept.read_bytes())
        assert transport.connect(info, LAYOUT) is None
        path.unlink()
        path.symlink_to(kept)
        assert transport.connect(info, LAYOUT) is None
    finally:
        path.unlink()
        kept.rename(path)


def test_the_map_cannot_be_written(pool: KVCache) -> None:
    transport = SharedMemoryTransport()
    info = transport.describe(pool)
    assert info is not None
    route = transport.connect(info, LAYOUT)
    assert route is not None
    assert not route._pool.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        np.copyto(route._pool, 0)
    route.close()


def test_no_descriptor_stays_open(pool: KVCache) -> None:
    transport = SharedMemoryTransport()
    info = transport.describe(pool)
    assert info is not None
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        route = transport.connect(info, LAYOUT)
        assert route is not None
        route.close()
    assert len(os.listdir("/proc/self/fd")) == before
