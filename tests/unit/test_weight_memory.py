"""Weights lie behind each other in chunks and keep their bytes."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from shared.kernels.weight_memory import CHUNK, LARGE_PAGE, WeightMemory


def bytes_of(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)


def hold(memory: WeightMemory, content: np.ndarray) -> np.ndarray:
    piece = memory.take(content.size)
    piece[:] = content
    return piece


def test_pieces_follow_each_other_on_cache_lines_and_keep_their_bytes() -> None:
    memory, sizes = WeightMemory(), [1, 64, 100, 4097, 0, 7]
    pieces = [hold(memory, bytes_of(size)) for size in sizes]
    starts = [piece.ctypes.data for piece in pieces]
    assert starts[0] % LARGE_PAGE == 0
    assert np.diff(starts).tolist() == [-(-size // 64) * 64 for size in sizes[:-1]]
    del memory
    gc.collect()
    for size, piece in zip(sizes, pieces, strict=True):
        np.testing.assert_array_equal(piece, bytes_of(size))


def test_what_does_not_fit_starts_a_chunk_and_may_be_larger_than_one() -> None:
    memory = WeightMemory()
    small, large = hold(memory, bytes_of(10)), hold(memory, np.full(CHUNK + 1, 3, dtype=np.uint8))
    after = hold(memory, bytes_of(20))
    assert large.size == CHUNK + 1
    assert (large == 3).all()
    np.testing.assert_array_equal(small, bytes_of(10))
    np.testing.assert_array_equal(after, bytes_of(20))
    assert after.ctypes.data % LARGE_PAGE == 0 or after.ctypes.data >= large.ctypes.data + CHUNK


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
    or "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="this system has no large pages",
)
def test_the_system_is_asked_for_large_pages() -> None:
    piece = hold(WeightMemory(), bytes_of(LARGE_PAGE))
    assert "hg" in flags_at(piece.ctypes.data)


def flags_at(address: int) -> list[str]:
    """VmFlags of the mapping around an address; `hg` is the advice."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif first == "VmFlags:" and inside:
            return rest
    return []
