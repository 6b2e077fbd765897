"""Exponential and logarithm with the same bits on every machine.

Those of numpy and of C libraries differ in their last bits between versions and processors. These are sequences of
float64 operations that IEEE 754 rounds correctly, none of them fused; `shared/kernels/cpu/exact.h` has the same.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10  # the first has 33 bits: small multiples are exact
_SQRT_HALF = 0.7071067811865476
_EXP_COEFFICIENTS = [1.0 / math.factorial(n) for n in range(11, -1, -1)]
_LOG_COEFFICIENTS = [2.0 / n for n in range(19, 0, -2)]


def exponential(x: F64) -> F64:
    """e^x for |x| < 700, with a relative error below 1e-14.

    e^x = 2^k · e^r with k the integer nearest to x / ln 2, and e^r from its Taylor polynomial of degree 11.
    """
    k = np.rint(x * _LOG2_E)
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    scale = (k.astype(np.int64) + 1023) << 52  # the bits of 2^k
    return _polynomial(_EXP_COEFFICIENTS, r) * scale.view(np.float64)


def logarithm(x: F64) -> F64:
    """Natural logarithm of positive normal numbers, with a relative error below 1e-15.

    x = 2^k · m with m between √½ and √2, and log m = 2 artanh s with s = (m − 1) / (m + 1), ten terms of its series.
    """
    m, k = np.frexp(x)
    is_low = m < _SQRT_HALF
    m, k = np.where(is_low, m + m, m), (k - is_low).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    return k * _LN2_HIGH + (k * _LN2_LOW + s * _polynomial(_LOG_COEFFICIENTS, s * s))


def _polynomial(coefficients: list[float], x: F64) -> F64:
    """Horner's rule; the coefficient of the highest power comes first."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value *= x
        value += coefficient
    return value
