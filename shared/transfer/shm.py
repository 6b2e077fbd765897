"""Frames that carry block numbers; the importer copies the bytes out of the exporter's mapped pool.

Used only when both workers see the same file: same kernel boot, and same device and inode behind the
path. The map is read-only, and the digest is checked over the importer's own copy, so blocks that
were reused under a late reader are refused and never decoded.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from shared.errors import TransferError
from shared.kv.cache import TORCH_DTYPES, KVCache
from shared.kv.layout import KVLayout
from shared.kv.pool_file import is_pool_path
from shared.transfer.base import REASON_MALFORMED, Part, RouteInfo
from shared.transfer.blocks import flatten

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ID_BYTES = 4


class SharedMemoryTransport:
    """Transport "shm"; needs a pool created with `shared=True` and a peer on the same host."""

    def describe(self, pool: KVCache) -> RouteInfo | None:
        if pool.shared_path is None:
            return None
        status = os.stat(pool.shared_path)
        return {
            "host": _host_id(),
            "path": pool.shared_path,
            "device": status.st_dev,
            "inode": status.st_ino,
            "num_blocks": pool.num_blocks,
        }

    def connect(self, info: RouteInfo, layout: KVLayout) -> SharedMemoryRoute | None:
        path, num_blocks = info.get("path"), info.get("num_blocks")
        if not isinstance(path, str) or not isinstance(num_blocks, int) or info.get("host") != _host_id():
            return None
        if not is_pool_path(Path(path)):
            return None
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (OSError, ValueError):  # ValueError: a NUL in the path
            return None
        try:
            if not _is_pool(os.fstat(fd), info, num_blocks * layout.bytes_per_block):
                return None
            return SharedMemoryRoute(layout, num_blocks, mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
        except OSError:
            return None
        finally:
            os.close(fd)

    def wire(self, content: memoryview, block_ids: Sequence[int]) -> memoryview:
        return memoryview(np.asarray(block_ids, dtype=">u4").tobytes())


class SharedMemoryRoute:
    """A read-only map of one peer's pool, for one pull."""

    def __init__(self, layout: KVLayout, num_blocks: int, memory: mmap.mmap) -> None:
        self._layout = layout
        self._num_blocks = num_blocks
        self._memory: mmap.mmap | None = memory
        slot_bytes = layout.bytes_per_token // (layout.num_layers * 2 * layout.num_kv_heads)
        shape = (layout.num_layers, num_blocks, 2, layout.num_kv_heads, layout.block_size, slot_bytes)
        self._pool: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = np.frombuffer(memory, np.uint8).reshape(shape)

    def wire_length(self, part: Part) -> int:
        return part.num_blocks * _ID_BYTES

    def content(self, part: Part, wire: bytearray) -> torch.Tensor:
        block_ids = np.frombuffer(wire, dtype=">u4").astype(np.int64)
        if block_ids.size != part.num_blocks or block_ids.max() >= self._num_blocks:
            raise TransferError(REASON_MALFORMED, "a frame names blocks outside the peer's pool")
        picked = self._pool[part.layer_start : part.layer_stop].take(block_ids, axis=1)
        blocks = torch.from_numpy(picked).view(TORCH_DTYPES[self._layout.dtype])
        return flatten(blocks, self._layout, part.slots)

    def close(self) -> None:
        if self._memory is not None:
            self._pool = np.empty(0, np.uint8)
            self._memory.close()
            self._memory = None


def _host_id() -> str:
    """The kernel's boot id: equal exactly for processes, in any container, of one running host."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _is_pool(status: os.stat_result, info: RouteInfo, num_bytes: int) -> bool:
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_dev == info.get("device")
        and status.st_ino == info.get("inode")
        and status.st_size == num_bytes > 0
    )
