"""Memory in large pages for weights, one matrix behind the other in the order of use.

A step reads every weight once. With pages of 4 KB that is tens of thousands of address translations a step; numpy asks
for larger ones only where a single array has 4 MB or more.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]

LARGE_PAGE = 2 << 20
CHUNK = 32 << 20
"""Pages of a chunk that nothing was written to take no memory."""

_LINE = 64


class WeightMemory:
    """Gives out pieces of large chunks. A piece keeps its chunk alive; none is ever taken back."""

    def __init__(self) -> None:
        self._free: U8 = np.empty(0, dtype=np.uint8)

    def take(self, num_bytes: int) -> U8:
        """Memory for `num_bytes`, 64-byte aligned, right behind the last piece."""
        room = -(-num_bytes // _LINE) * _LINE
        if room > self._free.size:
            self._free = _chunk(max(CHUNK, room))
        piece, self._free = self._free[:num_bytes], self._free[room:]
        return piece


def _chunk(num_bytes: int) -> U8:
    """Zeros from a large page's border on, in large pages where the system has them."""
    memory = mmap.mmap(
        -1, num_bytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # shared memory has none
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: small pages do too
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, dtype=np.uint8)
    start = -whole.ctypes.data % LARGE_PAGE
    return whole[start : start + num_bytes]
