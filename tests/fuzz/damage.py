"""Ways to damage bytes, as strategies: what disks, networks and attackers do to a file or a message."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from hypothesis import strategies as st

E = TypeVar("E", bound=Exception)

EXTREMES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, head: int | None = None) -> bytes:
    """`whole` with up to four changes, most of them in its first `head` bytes: flips, cuts, numbers, doubled parts."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        limit = max(1, min(len(data), head or len(data)))
        at = draw(st.integers(0, limit - 1))
        change = draw(st.sampled_from(["flip", "byte", "number", "cut", "insert", "double", "drop"]))
        if change == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "byte" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif change == "number":
            code = draw(st.sampled_from(["<Q", ">Q", "<I", ">I", ">H"]))
            width = struct.calcsize(code)
            data[at : at + width] = struct.pack(code, draw(st.sampled_from(EXTREMES)) & (256**width - 1))
        elif change == "cut":
            del data[at:]
        elif change == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        elif change == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            del data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


def refusal_of(kind: type[E], call: Callable[[], object]) -> E | None:
    """The error of this one kind that `call` ends with, None if it returns; any other error is the test's failure."""
    try:
        call()
    except kind as error:
        return error
    return None


@contextmanager
def allocates_at_most(num_bytes: int) -> Iterator[None]:
    """Fails when the block's peak of Python memory, numpy's included, is higher."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= num_bytes, f"{peak} bytes were allocated, {num_bytes} are allowed"
