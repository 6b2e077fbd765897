"""Keyed noise: known answers of Philox, the float64 formula, and the bound that sampling prunes with."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shared.engine import noise

# Known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 10 rounds).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def slow_philox(counter: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """Straight from the paper's figure, on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "seed", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(counter: tuple[int, ...], seed: int, expected: tuple[int, ...]) -> None:
    words = tuple(np.array([word], dtype=np.uint64) for word in counter)
    result = noise.philox4x32(words, seed)  # type: ignore[arg-type]
    assert tuple(int(word[0]) for word in result) == expected
    assert slow_philox(counter, seed) == expected


def test_bits_are_keyed_by_token_ordinal_choice_and_domain() -> None:
    seed, choice, ordinal, domain = 0x0123456789ABCDEF, 3, 17, 1
    bits = noise.random_bits(11, seed, choice, ordinal, domain)
    for token in range(11):
        assert bits[token] == slow_philox((token >> 2, ordinal, choice, domain), seed)[token & 3]


def test_a_subset_draws_the_same_bits_as_the_whole_vocabulary() -> None:
    ids = np.array([999, 4, 0, 5, 1000, 7], dtype=np.int64)
    whole = noise.random_bits(1001, 5, 1, 2)
    assert np.array_equal(noise.random_bits_of(ids, 5, 1, 2), whole[ids])


def test_different_keys_give_different_noise() -> None:
    base = noise.random_bits(64, 1, 0, 0)
    for other in (noise.random_bits(64, 2, 0, 0), noise.random_bits(64, 1, 1, 0), noise.random_bits(64, 1, 0, 1)):
        assert not np.array_equal(base, other)


@pytest.mark.parametrize("bits", [0, 1, 2**16, 2**31, 2**32 - 2, 2**32 - 1])
def test_gumbel_is_the_float64_formula_rounded_once(bits: int) -> None:
    u = (bits + 0.5) * 2.0**-32
    expected = -math.log(-math.log1p(-u))
    value = noise.gumbel(np.array([bits], dtype=np.uint32))[0]
    assert math.isfinite(value)
    assert value == pytest.approx(expected, rel=1e-7)


def test_the_upper_bound_is_never_exceeded() -> None:
    powers = np.array([2**k + d for k in range(32) for d in (-1, 0, 1) if 0 <= 2**k + d < 2**32], dtype=np.uint32)
    bits = np.concatenate((powers, noise.random_bits(20000, 9, 0, 0)))
    assert (noise.gumbel_upper_bound(bits) >= noise.gumbel(bits)).all()
    assert np.median(noise.gumbel_upper_bound(bits) - noise.gumbel(bits)) < 1.0


def test_noise_is_gumbel_distributed() -> None:
    values = np.sort(noise.gumbel(noise.random_bits(40000, 123, 0, 5)).astype(np.float64))
    cdf = np.exp(-np.exp(-values))
    distance = np.abs(cdf - (np.arange(len(values)) + 0.5) / len(values)).max()
    assert distance < 1.63 / math.sqrt(len(values))  # Kolmogorov–Smirnov at 1 %
