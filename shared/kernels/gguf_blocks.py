"""Tensors of GGUF files as matrices for the kernels: bytes are moved, no value is computed again.

Block layouts are those of ggml (ggml-org/ggml, src/ggml-common.h); the tests compare with `gguf.quants.dequantize`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shared.kernels.packing import U8, Kind, Matrix, dense


def from_gguf(type_name: str, raw: U8, shape: tuple[int, ...]) -> Matrix:
    """The blocks of a GGUF tensor [num_out, num_in]; `raw` are its bytes. KeyError for a type that is not covered."""
    return _READERS[type_name](raw.reshape(shape[0], -1), shape[1])


def _blocks(raw: U8, num_in: int, inputs: int) -> U8:
    return raw.reshape(len(raw), num_in // inputs, -1)


def _half(part: U8) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(part).view("<f2")[..., 0]


def _q4_0(raw: U8, num_in: int) -> Matrix:
    blocks = _blocks(raw, num_in, 32)
    scales = _half(blocks[..., :2])
    return Matrix(Kind.Q4_HALF, blocks[..., 2:], scales, scales * np.float16(-8))


def _q4_1(raw: U8, num_in: int) -> Matrix:
    blocks = _blocks(raw, num_in, 32)
    return Matrix(Kind.Q4_HALF, blocks[..., 4:], _half(blocks[..., :2]), _half(blocks[..., 2:4]))


def _five_bits(high: U8, nibbles: U8) -> U8:
    """Quants 0 to 31 of 32 inputs from 4 bytes of fifth bits and 16 bytes of nibbles."""
    bits = np.unpackbits(high, axis=-1, bitorder="little")
    low = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1)
    quants: U8 = low | (bits << 4)
    return quants


def _q5_0(raw: U8, num_in: int) -> Matrix:
    blocks = _blocks(raw, num_in, 32)
    quants = _five_bits(blocks[..., 2:6], blocks[..., 6:]) + np.uint8(112)  # - 16 + 128
    return Matrix(Kind.Q8_HALF, quants.reshape(len(raw), num_in), _half(blocks[..., :2]))


def _q5_1(raw: U8, num_in: int) -> Matrix:
    blocks = _blocks(raw, num_in, 32)
    quants = _five_bits(blocks[..., 4:8], blocks[..., 8:]) + np.uint8(128)
    return Matrix(Kind.Q8_HALF_MIN, quants.reshape(len(raw), num_in), _half(blocks[..., :2]), _half(blocks[..., 2:4]))


def _q8_0(raw: U8, num_in: int) -> Matrix:
    blocks = _blocks(raw, num_in, 32)
    return Matrix(Kind.Q8_HALF, (blocks[..., 2:] ^ np.uint8(128)).reshape(len(raw), num_in), _half(blocks[..., :2]))


def _q4_k(raw: U8, num_in: int) -> Matrix:
    """256 inputs a super-block: half d, half dmin, 8 six-bit scales and minima in 12 bytes, 4 x 32 bytes of nibbles."""
    blocks = _blocks(raw, num_in, 256)
    d, dmin, packed = _half(blocks[..., :2]), _half(blocks[..., 2:4]), blocks[..., 4:16]
    low, high, mixed = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    sc = np.concatenate((low & 63, (mixed & 15) | ((low >> 6) << 4)), axis=-1)
    mins = np.concatenate((high & 63, (mixed >> 4) | ((high >> 6) << 4)), axis=-1)
    scales = d.astype(np.float32)[..., None] * sc
    minima = -(dmin.astype(np.float32)[..., None] * mins)
    pairs = blocks[..., 16:].reshape(len(raw), -1, 4, 32)  # low nibbles: one group of 32, high nibbles: the next
    groups = np.stack((pairs & 15, pairs >> 4), axis=3).reshape(len(raw), -1, 32)
    quants = groups[..., :16] | (groups[..., 16:] << 4)
    return Matrix(Kind.Q4_FLOAT, quants, scales.reshape(len(raw), -1), minima.reshape(len(raw), -1))


def _q6_k(raw: U8, num_in: int) -> Matrix:
    """256 inputs: 128 bytes of low nibbles, 64 of two high bits, 16 signed scales of 16 inputs each, half d."""
    blocks = _blocks(raw, num_in, 256)
    low = blocks[..., :128].reshape(*blocks.shape[:2], 2, 1, 64) >> np.array([[0], [4]], dtype=np.uint8)
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32) >> np.array([[0], [2], [4], [6]], dtype=np.uint8)
    quants = (low & 15).reshape(*blocks.shape[:2], 2, 4, 32) | ((high & 3) << 4)
    scales = _half(blocks[..., 208:210]).astype(np.float32)[..., None] * blocks[..., 192:208].view(np.int8)
    offset = quants.reshape(len(raw), num_in) + np.uint8(96)  # - 32 + 128
    return Matrix(Kind.Q8_FLOAT16, offset, scales.reshape(len(raw), -1))


def _f16(raw: U8, num_in: int) -> Matrix:
    return dense(np.ascontiguousarray(raw).view("<f2").astype(np.float32))


def _f32(raw: U8, num_in: int) -> Matrix:
    return dense(np.ascontiguousarray(raw).view("<f4").astype(np.float32))


def _bf16(raw: U8, num_in: int) -> Matrix:
    return Matrix(Kind.BF16, np.ascontiguousarray(raw).view("<u2"))


_READERS = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
    "F16": _f16,
    "F32": _f32,
    "BF16": _bf16,
}
