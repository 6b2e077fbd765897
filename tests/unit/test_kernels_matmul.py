"""Products of packed matrices: a float64 formula, and the same bits in every company, on every instruction set."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import pytest

from shared.kernels.library import CLayer, CMatrix, CModel, Isa
from shared.kernels.packing import Kind, Matrix, dense, dequantise, pack, quantise_4bit, quantise_8bit
from tests.native_models import isas, library

F32 = npt.NDArray[np.float32]
SHAPES = [(16, 32), (48, 96), (80, 544)]


class Product:
    """One matrix on one instruction set."""

    def __init__(self, matrix: Matrix, isa: Isa, threads: int = 1) -> None:
        self._library = library()
        self._packed = pack(matrix)
        self._matrix = CMatrix(int(matrix.kind), matrix.num_out, matrix.num_in, self._packed.ctypes.data, None)
        self._layers = (CLayer * 1)()
        self._model = CModel(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, hidden_size=32, vocab_size=16)
        self._model.layers = ctypes.cast(self._layers, ctypes.POINTER(CLayer))
        self._engine = self._library.create(self._model, threads, isa)

    def __call__(self, rows: F32) -> F32:
        rows = np.ascontiguousarray(rows)
        out = np.empty((len(rows), self._matrix.num_out), dtype=np.float32)
        self._library.matmul(self._engine, self._matrix, rows.ctypes.data, len(rows), out.ctypes.data)
        return out

    def close(self) -> None:
        self._library.destroy(self._engine)


def matrix_of(kind: Kind, num_out: int, num_in: int) -> Matrix:
    rng = np.random.default_rng(int(kind))
    values = rng.standard_normal((num_out, num_in)).astype(np.float32)
    if kind is Kind.F32:
        return dense(values)
    if kind is Kind.BF16:
        return Matrix(kind, (values.view(np.uint32) >> 16).astype(np.uint16))
    four, eight = quantise_4bit(values), quantise_8bit(values)
    assert four.scales is not None and four.minima is not None and eight.scales is not None  # noqa: PT018
    if kind is Kind.Q4_FLOAT:
        return Matrix(kind, four.quants, four.scales.astype(np.float32) * 1.1, four.minima.astype(np.float32) / 3)
    if kind is Kind.Q8_HALF_MIN:
        return Matrix(kind, eight.quants, eight.scales, rng.standard_normal(eight.scales.shape).astype(np.float16))
    if kind is Kind.Q8_FLOAT16:
        quants = rng.integers(0, 256, (num_out, num_in)).astype(np.uint8)
        return Matrix(kind, quants, rng.standard_normal((num_out, num_in // 16)).astype(np.float32))
    return four if kind is Kind.Q4_HALF else eight


def activations(count: int, num_in: int) -> F32:
    rows = np.random.default_rng(count).standard_normal((count, num_in)).astype(np.float32)
    rows[0, :32] = 0.0  # a group of nothing
    rows[-1] *= 1000.0
    return rows


def as_quantised(rows: F32) -> npt.NDArray[np.float64]:
    """What the integer kernels see: 32 values share the scale max |x| / 127."""
    groups = rows.reshape(len(rows), -1, 32)
    top = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    quants, scales = np.rint(groups * inverse).astype(np.float64), (top / np.float32(127)).astype(np.float64)
    seen: npt.NDArray[np.float64] = (quants * scales).reshape(rows.shape)
    return seen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", list(Kind))
def test_a_product_equals_the_formula(kind: Kind, shape: tuple[int, int]) -> None:
    matrix = matrix_of(kind, *shape)
    rows = activations(9, shape[1])
    seen = rows.astype(float) if kind in (Kind.F32, Kind.BF16) else as_quantised(rows)
    weights = dequantise(matrix).astype(float)
    wanted, size = seen @ weights.T, np.abs(seen) @ np.abs(weights).T
    for isa in isas():
        product = Product(matrix, isa)
        assert (np.abs(product(rows) - wanted) <= 2e-6 * size).all(), isa
        product.close()


@pytest.mark.parametrize("kind", list(Kind))
def test_bits_depend_on_neither_company_nor_instruction_set_nor_threads(kind: Kind) -> None:
    matrix = matrix_of(kind, 80, 544)
    rows = activations(64, 544)
    products = [Product(matrix, isa) for isa in isas()] + [Product(matrix, isas()[-1], threads=3)]
    alone = np.concatenate([products[0](row[None]) for row in rows])
    for product in products:
        for count in range(1, 65):
            np.testing.assert_array_equal(product(rows[:count]).view(np.uint32), alone[:count].view(np.uint32))
        np.testing.assert_array_equal(product(rows[5:]).view(np.uint32), alone[5:].view(np.uint32))
        product.close()


def test_many_rows_and_many_threads() -> None:
    """More rows than a block of tokens, more threads than cores."""
    matrix, rows = matrix_of(Kind.Q4_HALF, 320, 96), activations(200, 96)
    few, many = Product(matrix, isas()[-1]), Product(matrix, isas()[-1], threads=7)
    wanted = few(rows)
    for _ in range(50):
        np.testing.assert_array_equal(many(rows), wanted)
    few.close()
    many.close()


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    beyond = [isa for isa in Isa if isa not in isas()]
    for isa in beyond:
        with pytest.raises(ValueError, match=isa.name):
            Product(matrix_of(Kind.F32, 16, 32), isa)
    with pytest.raises(ValueError, match="0 threads"):
        Product(matrix_of(Kind.F32, 16, 32), isas()[0], threads=0)
