"""Weights in the order the CPU kernels read them: tiles of 16 outputs, blocks of 32 inputs (see slipstream_cpu.h).

Quantised tensors of GGUF files keep every value: their quants, scales and minima are moved, never computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Array = npt.NDArray[np.generic]

TILE = 16
INPUT_PAD = 32
_ALIGNMENT = 64


class Kind(IntEnum):
    """How a matrix is stored; `sl_kind` of the C interface."""

    F32 = 0
    BF16 = 1
    Q4_HALF = 2
    Q4_FLOAT = 3
    Q8_HALF = 4
    Q8_HALF_MIN = 5
    Q8_FLOAT16 = 6


@dataclass(frozen=True, slots=True)
class Format:
    """One kind: bits of a quant (0: dense), inputs that share a scale, type of scales, whether there are minima."""

    bits: int
    inputs: int
    scale: type
    has_min: bool


FORMATS = {
    Kind.F32: Format(0, 1, np.float32, False),
    Kind.BF16: Format(0, 1, np.uint16, False),
    Kind.Q4_HALF: Format(4, 32, np.float16, True),
    Kind.Q4_FLOAT: Format(4, 32, np.float32, True),
    Kind.Q8_HALF: Format(8, 32, np.float16, False),
    Kind.Q8_HALF_MIN: Format(8, 32, np.float16, True),
    Kind.Q8_FLOAT16: Format(8, 16, np.float32, False),
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [num_out, num_in] before it is packed; a row's order can still be changed.

    Dense: `quants` holds the values (float32, or the bits of bfloat16). 4 bits: `quants` is uint8
    [num_out, num_in / 32, 16], input i of a block in the low nibble of byte i, input i + 16 in the high one. 8 bits:
    uint8 [num_out, num_in], the signed value + 128. `scales` and `minima` are [num_out, num_in / inputs].
    """

    kind: Kind
    quants: Array
    scales: Array | None = None
    minima: Array | None = None

    @property
    def num_out(self) -> int:
        return len(self.quants)

    @property
    def num_in(self) -> int:
        return int(np.prod(self.quants.shape[1:])) * (2 if FORMATS[self.kind].bits == 4 else 1)

    def rows(self, order: npt.NDArray[np.int64]) -> Matrix:
        return self._each(lambda part: part[order])

    def padded(self, num_out: int, num_in: int) -> Matrix:
        """The same with outputs and inputs appended whose values are 0."""
        fmt = FORMATS[self.kind]
        more_out = num_out - self.num_out
        if fmt.bits == 0:
            return self._each(lambda part: np.pad(part, ((0, more_out), (0, num_in - self.num_in))))
        more = (num_in - self.num_in) // fmt.inputs
        width = {4: ((0, more), (0, 0)), 8: ((0, more * fmt.inputs),)}[fmt.bits]
        quants = np.pad(self.quants, ((0, more_out), *width), constant_values=128 if fmt.bits == 8 else 0)
        scaled = self._each(lambda part: np.pad(part, ((0, more_out), (0, more))) if part is not self.quants else part)
        return replace(scaled, quants=quants)

    def _each(self, change: Callable[[Array], Array]) -> Matrix:
        scales = None if self.scales is None else change(self.scales)
        minima = None if self.minima is None else change(self.minima)
        return Matrix(self.kind, change(self.quants), scales, minima)


def concatenate(parts: Sequence[Matrix]) -> Matrix:
    """Matrices of one kind below each other."""
    scales, minima = (
        np.concatenate(present) if (present := [array for array in arrays if array is not None]) else None
        for arrays in ([part.scales for part in parts], [part.minima for part in parts])
    )
    return Matrix(parts[0].kind, np.concatenate([part.quants for part in parts]), scales, minima)


def dense(values: F32) -> Matrix:
    return Matrix(Kind.F32, np.ascontiguousarray(values, dtype=np.float32))


def quantise_8bit(values: F32) -> Matrix:
    """Symmetric 8-bit quants in groups of 32 inputs: scale = max |x| / 127 as float16."""
    groups = values.reshape(len(values), -1, 32)
    scales = (np.abs(groups).max(-1) / 127.0).astype(np.float16)
    inverse = np.divide(1.0, scales, out=np.zeros(scales.shape, np.float32), where=scales > 0, dtype=np.float32)
    quants = np.clip(np.rint(groups * inverse[..., None]), -127, 127).astype(np.int16) + 128
    return Matrix(Kind.Q8_HALF, quants.astype(np.uint8).reshape(values.shape), scales)


def quantise_4bit(values: F32) -> Matrix:
    """4-bit quants with a minimum in groups of 32 inputs: value = scale * q + minimum."""
    groups = values.reshape(len(values), -1, 32)
    minima = groups.min(-1).astype(np.float16)
    scales = ((groups.max(-1) - minima) / 15.0).astype(np.float16)
    inverse = np.divide(1.0, scales, out=np.zeros(scales.shape, np.float32), where=scales > 0, dtype=np.float32)
    q = np.clip(np.rint((groups - minima[..., None].astype(np.float32)) * inverse[..., None]), 0, 15).astype(np.uint8)
    return Matrix(Kind.Q4_HALF, q[..., :16] | (q[..., 16:] << 4), scales, minima)


def dequantise(matrix: Matrix) -> F32:
    """Every value as float32 [num_out, num_in]: the slow, obvious reading."""
    fmt, stored = FORMATS[matrix.kind], matrix.quants
    if matrix.kind is Kind.F32:
        return stored.astype(np.float32)
    if matrix.kind is Kind.BF16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    assert matrix.scales is not None
    if fmt.bits == 4:
        nibbles = stored.astype(np.uint8)
        quants = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1).astype(np.float32)
    else:
        quants = stored.reshape(matrix.num_out, -1, fmt.inputs).astype(np.float32) - 128
    values = quants * matrix.scales.astype(np.float32)[..., None]
    if matrix.minima is not None:
        values = values + matrix.minima.astype(np.float32)[..., None]
    return values.reshape(matrix.num_out, matrix.num_in)


def aligned_memory(num_bytes: int) -> U8:
    """A 64-byte aligned array of its own."""
    memory = np.empty(num_bytes + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes]


def pack(matrix: Matrix, take: Callable[[int], U8] = aligned_memory) -> U8:
    """The bytes the kernels read, in memory that `take` gives; outputs and inputs padded to whole tiles and blocks."""
    matrix = matrix.padded(-(-matrix.num_out // TILE) * TILE, -(-matrix.num_in // INPUT_PAD) * INPUT_PAD)
    fmt, tiles = FORMATS[matrix.kind], matrix.num_out // TILE
    if fmt.bits == 0:
        by_input = matrix.quants.reshape(tiles, TILE, matrix.num_in).transpose(0, 2, 1)
        out = take(by_input.size * by_input.itemsize)
        out.view(by_input.dtype).reshape(by_input.shape)[...] = by_input
        return out
    blocks = matrix.num_in // fmt.inputs
    per_row = fmt.inputs * fmt.bits // 8
    quants = matrix.quants.reshape(tiles, TILE, blocks, per_row // 4, 4).transpose(0, 2, 3, 1, 4)
    parts = [
        _by_block(part, tiles, fmt) for part in (matrix.scales, matrix.minima)[: 1 + fmt.has_min] if part is not None
    ]
    head = sum(part.shape[-1] for part in parts)
    out = take(tiles * blocks * (head + TILE * per_row)).reshape(tiles, blocks, -1)
    for index, part in enumerate(parts):
        out[..., index * part.shape[-1] : (index + 1) * part.shape[-1]] = part
    out[..., head:].reshape(tiles, blocks, per_row // 4, TILE, 4)[...] = quants
    return out.reshape(-1)


def _by_block(values: Array, tiles: int, fmt: Format) -> U8:
    ordered: Array = values.astype(fmt.scale).reshape(tiles, TILE, -1).transpose(0, 2, 1)
    return np.ascontiguousarray(ordered).view(np.uint8)
