"""Counter-based Gumbel noise: the same (seed, choice, ordinal, token id) always gives the same value.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the
64-bit seed, the counter is (token id >> 2, output ordinal, choice, domain) and the lane is id & 3, so any
subset of the vocabulary can be drawn on its own, in any order, on any worker.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shared.engine.exact import logarithm

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

DOMAIN_TARGET = 0
"""Domain of the target model's own samples; drafts reuse it so that they guess the same noise."""

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_LN2 = 0.6931471805599453


def philox4x32(counters: tuple[U64, U64, U64, U64], seed: int) -> tuple[U64, U64, U64, U64]:
    """Ten rounds over broadcastable counter words; each word holds a 32-bit value in 64 bits."""
    c0, c1, c2, c3 = counters
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = _MULTIPLIER_0 * c0, _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_bits(vocab_size: int, seed: int, choice: int, ordinal: int, domain: int = DOMAIN_TARGET) -> U32:
    """The 32 random bits of every token id. Shape [vocab_size]."""
    groups = np.arange(-(-vocab_size // 4), dtype=np.uint64)
    lanes = philox4x32((groups, *_tail(ordinal, choice, domain)), seed)
    return np.stack(lanes, axis=1).astype(np.uint32).reshape(-1)[:vocab_size]


def random_bits_of(ids: Ids, seed: int, choice: int, ordinal: int, domain: int = DOMAIN_TARGET) -> U32:
    """The 32 random bits of some token ids. Shape of `ids`."""
    lanes = philox4x32(((ids >> 2).astype(np.uint64), *_tail(ordinal, choice, domain)), seed)
    return np.choose(ids & 3, lanes).astype(np.uint32)


def gumbel(bits: U32) -> F32:
    """Standard Gumbel values from random bits: u = (x + 0.5)·2⁻³², G = −log(−log(1 − u)), in float64.

    Rounded once, to float32: in float32 arithmetic u would reach 1 and G infinity. In float64 u and 1 − u are exact.
    """
    u = (bits.astype(np.float64) + 0.5) * 2.0**-32
    return (-logarithm(-logarithm(1.0 - u))).astype(np.float32)


def gumbel_upper_bound(bits: U32) -> F32:
    """A cheap value that `gumbel(bits)` never exceeds, from the leading zeros of the bits.

    −log(1 − u) ≥ u, so G ≤ −log u, and u ≥ 2^(e−32) where 2^e is the highest power of two in x (2⁻³³ for x = 0).
    """
    exponent = np.frexp(bits.astype(np.float64) + 0.5)[1]  # x + 0.5 is in [2^(exponent-1), 2^exponent)
    return ((33 - exponent) * _LN2 + 1e-5).astype(np.float32)


def _tail(ordinal: int, choice: int, domain: int) -> tuple[U64, U64, U64]:
    words = (np.array([value], dtype=np.uint64) for value in (ordinal, choice, domain))
    first, second, third = words
    return first, second, third
