"""Packed weights hold the very values of their source: the gguf package and plain formulas are the reference."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from shared.kernels.gguf_blocks import from_gguf
from shared.kernels.packing import (
    FORMATS,
    INPUT_PAD,
    TILE,
    Kind,
    Matrix,
    concatenate,
    dense,
    dequantise,
    pack,
    quantise_4bit,
    quantise_8bit,
)

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "F32", "F16", "BF16"]
NUM_OUT, NUM_IN = 24, 512


def raw_blocks(type_name: str, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Any bytes are quants; scales are finite float16 numbers, so that every value can be compared."""
    rng = np.random.default_rng(seed)
    kind = gguf.GGMLQuantizationType[type_name]
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    if size == 1:
        values = rng.standard_normal((NUM_OUT, NUM_IN)).astype(np.float32)
        return gguf.quants.quantize(values, kind).reshape(NUM_OUT, -1).view(np.uint8)
    blocks = rng.integers(0, 256, (NUM_OUT, NUM_IN // size, num_bytes), dtype=np.uint8)
    places = {"Q4_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(type_name, (0,))
    for place in places:
        scales = rng.standard_normal(blocks.shape[:2]).astype(np.float16)
        blocks[..., place : place + 2] = scales[..., None].view(np.uint8).reshape(*blocks.shape[:2], 2)
    return blocks.reshape(NUM_OUT, -1)


@pytest.mark.parametrize("type_name", TYPES)
def test_values_equal_the_gguf_package(type_name: str) -> None:
    raw = raw_blocks(type_name)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])
    found = dequantise(from_gguf(type_name, raw, (NUM_OUT, NUM_IN)))
    np.testing.assert_array_equal(found, wanted)


def test_the_lowest_8_bit_quant_is_kept() -> None:
    """The format allows -128, although its usual quantiser never writes it."""
    raw = raw_blocks("Q8_0").reshape(NUM_OUT, -1, 34)
    raw[..., 2] = 0x80
    wanted = gguf.quants.dequantize(raw.reshape(NUM_OUT, -1), gguf.GGMLQuantizationType.Q8_0)
    found = dequantise(from_gguf("Q8_0", raw.reshape(NUM_OUT, -1), (NUM_OUT, NUM_IN)))
    np.testing.assert_array_equal(found, wanted)
    assert (found.reshape(NUM_OUT, -1, 32)[..., 0] != 0).all()


def unpack(packed: npt.NDArray[np.uint8], kind: Kind, num_out: int, num_in: int) -> npt.NDArray[np.float64]:
    """The slow, obvious reading of packed bytes, output by output, from the words of the header alone."""
    fmt = FORMATS[kind]
    if fmt.bits == 0:
        values: npt.NDArray[np.generic] = (
            packed.view(fmt.scale).reshape(num_out // TILE, num_in, TILE).transpose(0, 2, 1).reshape(num_out, num_in)
        )
        return (
            (values.astype(np.uint32) << 16).view(np.float32).astype(float)
            if kind is Kind.BF16
            else values.astype(float)
        )
    width = np.dtype(fmt.scale).itemsize
    head = TILE * width * (2 if fmt.has_min else 1)
    block_bytes = head + TILE * fmt.inputs * fmt.bits // 8
    out = np.zeros((num_out, num_in))
    for row in range(num_out):
        tile, lane = divmod(row, TILE)
        for block in range(num_in // fmt.inputs):
            start = (tile * (num_in // fmt.inputs) + block) * block_bytes
            data = packed[start : start + block_bytes]
            scales: npt.NDArray[np.generic] = data[: TILE * width].view(fmt.scale)
            minimum = float(data[TILE * width : head].view(fmt.scale)[lane]) if fmt.has_min else 0.0
            for i in range(fmt.inputs):
                at = i % 16 if fmt.bits == 4 else i
                byte = int(data[head + 64 * (at // 4) + 4 * lane + at % 4])
                quant = (byte >> 4 if i >= 16 else byte & 15) if fmt.bits == 4 else byte - 128
                out[row, block * fmt.inputs + i] = float(scales[lane]) * quant + minimum
    return out


@pytest.mark.parametrize("type_name", [name for name in TYPES if name != "F16"])
def test_packed_bytes_hold_every_value_in_its_place(type_name: str) -> None:
    matrix = from_gguf(type_name, raw_blocks(type_name), (NUM_OUT, NUM_IN))
    packed = pack(matrix)
    assert packed.ctypes.data % 64 == 0
    found = unpack(packed, matrix.kind, 32, NUM_IN)
    np.testing.assert_allclose(found[:NUM_OUT], dequantise(matrix), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found[NUM_OUT:], 0)


@pytest.mark.parametrize("type_name", ["Q4_1", "Q8_0", "Q6_K", "F32"])
def test_rows_move_whole_and_padding_is_zero(type_name: str) -> None:
    matrix = from_gguf(type_name, raw_blocks(type_name), (NUM_OUT, NUM_IN))
    order = np.random.default_rng(1).permutation(NUM_OUT)
    np.testing.assert_array_equal(dequantise(matrix.rows(order)), dequantise(matrix)[order])
    twice = concatenate([matrix, matrix.rows(order)])
    np.testing.assert_array_equal(dequantise(twice)[NUM_OUT:], dequantise(matrix)[order])
    padded = dequantise(matrix.padded(NUM_OUT + 8, NUM_IN + INPUT_PAD))
    np.testing.assert_array_equal(padded[:NUM_OUT, :NUM_IN], dequantise(matrix))
    assert not padded[NUM_OUT:].any()
    assert not padded[:, NUM_IN:].any()


@pytest.mark.parametrize(("quantise", "levels"), [(quantise_8bit, 254.0), (quantise_4bit, 15.0)])
def test_quantisation_errs_by_at_most_half_a_level(quantise, levels: float) -> None:  # type: ignore[no-untyped-def]
    values = np.random.default_rng(2).standard_normal((16, 128)).astype(np.float32)
    values[3, 32:64] = 0.0  # a group of nothing
    values[4, :32] = 7.5  # a group of one value
    matrix: Matrix = quantise(values)
    groups = values.reshape(16, -1, 32)
    spread = 2 * np.abs(groups).max(-1) if levels > 16 else groups.max(-1) - groups.min(-1)
    error = np.abs(dequantise(matrix) - values).reshape(groups.shape).max(-1)
    assert (error <= 0.51 * spread / levels + 2e-3 * np.abs(groups).max(-1)).all()  # scales are rounded to float16
    assert not dequantise(matrix)[3, 32:64].any()


def test_dense_values_are_kept() -> None:
    values = np.random.default_rng(3).standard_normal((5, 7)).astype(np.float32)
    np.testing.assert_array_equal(dequantise(dense(values)), values)


@pytest.mark.parametrize(
    "matrix", [dense(np.eye(20, 40, dtype=np.float32)), quantise_4bit(np.eye(20, 64, dtype=np.float32))]
)
def test_packed_bytes_lie_in_the_memory_that_was_given(matrix: Matrix) -> None:
    given: list[npt.NDArray[np.uint8]] = []

    def take(num_bytes: int) -> npt.NDArray[np.uint8]:
        given.append(np.zeros(num_bytes, dtype=np.uint8))
        return given[-1]

    packed = pack(matrix, take)
    assert [packed.ctypes.data] == [memory.ctypes.data for memory in given]
    np.testing.assert_array_equal(packed, pack(matrix))
