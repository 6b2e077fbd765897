"""Which parts an export is cut into, and the check that each arrives exactly once."""

from __future__ import annotations

from collections.abc import Iterator

from shared.errors import ConfigurationError, TransferError
from shared.kv.layout import KVLayout
from shared.transfer.base import REASON_COVERAGE, Part
from shared.transfer.frame import MAX_FRAME_BYTES


def plan(layout: KVLayout, block_start: int, block_stop: int, num_tokens: int, frame_bytes: int) -> Iterator[Part]:
    """Cut blocks `[block_start, block_stop)` of a request of `num_tokens` into parts, in sending order.

    A part takes all layers of as many blocks as fit into `frame_bytes`; where one block does not
    fit, layers are split too. A partly filled last block travels alone, with its valid slots only.
    """
    full_stop = min(block_stop, num_tokens // layout.block_size)
    for start, stop in _runs(block_start, full_stop, max(1, frame_bytes // layout.bytes_per_block)):
        yield from _layers(layout, start, stop, layout.block_size, frame_bytes)
    if max(full_stop, block_start) < block_stop:
        yield from _layers(layout, block_stop - 1, block_stop, num_tokens % layout.block_size, frame_bytes)


def check_frame_bytes(layout: KVLayout, frame_bytes: int) -> None:
    """Raise ConfigurationError when the largest part `plan` makes would not fit into a frame."""
    largest = max(frame_bytes, layout.bytes_per_block // layout.num_layers)
    if frame_bytes < 1 or largest > MAX_FRAME_BYTES:
        raise ConfigurationError(
            f"a KV frame would carry up to {largest} bytes, the protocol carries {MAX_FRAME_BYTES}; "
            "lower the frame size or the block size"
        )


def _layers(layout: KVLayout, block_start: int, block_stop: int, slots: int, frame_bytes: int) -> Iterator[Part]:
    layer_bytes = Part(0, 1, block_start, block_stop, slots).num_bytes(layout)
    for start, stop in _runs(0, layout.num_layers, max(1, frame_bytes // layer_bytes)):
        yield Part(start, stop, block_start, block_stop, slots)


def _runs(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, length):
        yield first, min(first + length, stop)


class Coverage:
    """Marks each (layer, block) of a request as it arrives; blocks below `skip_blocks` are already held."""

    def __init__(self, layout: KVLayout, num_tokens: int, skip_blocks: int) -> None:
        self._layout = layout
        self._num_tokens = num_tokens
        self._num_blocks = layout.num_blocks(num_tokens)
        self._skip = skip_blocks
        width = max(0, self._num_blocks - skip_blocks)
        self._seen = [bytearray(width) for _ in range(layout.num_layers)]

    def check(self, part: Part) -> None:
        """Raise TransferError("coverage") unless `part` lies in what is due and has the right valid slots."""
        if part.layer_stop > self._layout.num_layers:
            raise _error(f"layers up to {part.layer_stop} of {self._layout.num_layers}")
        if part.block_start < self._skip or part.block_stop > self._num_blocks:
            raise _error(f"blocks {part.block_start} to {part.block_stop}, due are {self._skip} to {self._num_blocks}")
        last = min(self._layout.block_size, self._num_tokens - (part.block_stop - 1) * self._layout.block_size)
        if part.slots != last or (part.slots < self._layout.block_size and part.num_blocks != 1):
            raise _error(f"{part.slots} valid slots in blocks {part.block_start} to {part.block_stop}")

    def add(self, part: Part) -> None:
        """Mark `part`; raises TransferError("coverage") when any of it came before."""
        self.check(part)
        start, stop = part.block_start - self._skip, part.block_stop - self._skip
        for layer in self._seen[part.layer_start : part.layer_stop]:
            if any(layer[start:stop]):
                raise _error(f"blocks {part.block_start} to {part.block_stop} came twice")
            layer[start:stop] = b"\1" * (stop - start)

    @property
    def num_missing(self) -> int:
        """(layer, block) cells that have not arrived."""
        return sum(layer.count(0) for layer in self._seen)

    def finish(self) -> None:
        """Raise TransferError("coverage") unless everything arrived."""
        if self.num_missing:
            raise _error(f"the hand-off ended with {self.num_missing} (layer, block) cells missing")


def _error(message: str) -> TransferError:
    return TransferError(REASON_COVERAGE, f"a frame does not fit: {message}")
