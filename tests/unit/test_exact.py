"""Our exponential and logarithm against decimal arithmetic, and against Python's floats for their very bits."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

from shared.engine.exact import exponential, logarithm


def slow_exponential(x: float) -> float:
    """The definition in Python's floats, which are IEEE's and never fused."""
    k = round(x * 1.4426950408889634)
    r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10
    power = 1 / math.factorial(11)
    for n in range(10, -1, -1):
        power = power * r + 1 / math.factorial(n)
    return math.ldexp(power, k)


def slow_logarithm(x: float) -> float:
    m, k = math.frexp(x)
    if m < 0.7071067811865476:
        m, k = 2 * m, k - 1
    s = (m - 1) / (m + 1)
    series = 2 / 19
    for n in range(17, 0, -2):
        series = series * (s * s) + 2 / n
    return k * 0.6931471803691238 + (k * 1.9082149292705877e-10 + s * series)


def arguments_of_exponential() -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.concatenate((rng.uniform(-40, 40, 4000), rng.standard_normal(1000) * 1e-6, [0.0, -0.0, 690.0, -690.0]))


def arguments_of_logarithm() -> np.ndarray:
    """All magnitudes, and the neighbourhood of 1, where a careless logarithm loses its digits."""
    rng = np.random.default_rng(2)
    near = 1.0 + rng.standard_normal(1000) * np.geomspace(1e-15, 0.3, 1000)
    return np.concatenate((np.exp(rng.uniform(-600, 600, 4000)), near, [1.0, 0.5, 2.0, 2.0**-33, 1 - 2.0**-33]))


def test_exponential_is_accurate() -> None:
    with localcontext() as context:
        context.prec = 40
        xs = arguments_of_exponential()
        for x, value in zip(xs.tolist(), exponential(xs).tolist(), strict=True):
            assert abs(Decimal(value) / Decimal(x).exp() - 1) < Decimal("1e-14")


def test_logarithm_is_accurate() -> None:
    with localcontext() as context:
        context.prec = 40
        xs = arguments_of_logarithm()
        for x, value in zip(xs.tolist(), logarithm(xs).tolist(), strict=True):
            assert abs(Decimal(value) - Decimal(x).ln()) <= abs(Decimal(x).ln()) * Decimal("1e-15")


@pytest.mark.parametrize("size", [1, 7, 8, 1000])
def test_bits_are_those_of_unfused_operations_at_any_length(size: int) -> None:
    for fast, slow, xs in (
        (exponential, slow_exponential, arguments_of_exponential()),
        (logarithm, slow_logarithm, arguments_of_logarithm()),
    ):
        for part in (xs[:size], xs[-size:]):
            assert fast(part).tolist() == [slow(x) for x in part.tolist()]
