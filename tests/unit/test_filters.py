"""What top_k, top_p and min_p keep: against plain Python integers, against float64, and the weights' own bits."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.engine.filters import LOWEST, SCALE_BITS, surviving_ids, weigh
from shared.protocol.sampling import SamplingParams
from tests.unit.test_exact import slow_exponential

TOP_KS = [0, 1, 2, 7, 50, 96, 97, 500]
TOP_PS = [1.0, 1.0 - 1e-12, 0.99, 0.9, 0.5, 0.01, 1e-6]
MIN_PS = [0.0, 1e-13, 0.05, 0.5, 1.0]


def filters(**fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=1, seed=0, **fields)


def row(seed: int, size: int = 97) -> np.ndarray:
    """Peaked, ordinary and flat rows, rows of few different values, and masked ids."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(size) * (0.0, 0.01, 3.0, 60.0)[seed % 4]).astype(np.float32)
    if seed % 3 == 1:
        values = np.round(values)
    if seed % 5 == 2:
        values[rng.random(size) < 0.5] = -np.inf
    return values


def slow_weight(difference: float) -> int:
    """Python rounds floats to integers exactly, halves to even."""
    return round(slow_exponential(max(difference, -31.0)) * 2.0**43)


def slow_survivors(scaled: np.ndarray, params: SamplingParams) -> list[int]:
    """Filters one after the other over a plain sorted list, in integers."""
    ranked = sorted((i for i in range(len(scaled)) if scaled[i] > -math.inf), key=lambda i: (-float(scaled[i]), i))
    if params.top_k:
        ranked = ranked[: params.top_k]
    weights = [slow_weight(float(scaled[i]) - float(scaled[ranked[0]])) for i in ranked]
    total, before, kept = sum(weights), 0, []
    for i, weight in zip(ranked, weights, strict=True):
        limit = max(1, min(math.ceil(params.top_p * float(total)), total))
        if (params.top_p == 1.0 or before < limit) and weight >= params.min_p * 2.0**43:
            kept.append(i)
        before += weight
    return sorted(kept)


def float_survivors(scaled: np.ndarray, params: SamplingParams) -> list[int] | None:
    """The usual formulas in float64; None where an id is so close to a border that rounding could decide."""
    ranked = np.lexsort((np.arange(len(scaled)), -scaled.astype(np.float64)))
    ranked = ranked[: params.top_k or None]
    values = scaled[ranked].astype(np.float64)
    shares = np.exp(values - values[0])
    before = (np.cumsum(shares) - shares) / shares.sum()
    if (np.abs(before - params.top_p) < 1e-9).any() or (np.abs(shares - params.min_p) < 1e-9).any():
        return None
    return sorted(ranked[(before < params.top_p) & (shares >= params.min_p)].tolist())


@given(
    seed=st.integers(0, 10_000),
    top_k=st.sampled_from(TOP_KS),
    top_p=st.sampled_from(TOP_PS),
    min_p=st.sampled_from(MIN_PS),
)
def test_what_is_kept_equals_the_slow_version(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    params = filters(top_k=top_k, top_p=top_p, min_p=min_p)
    assert surviving_ids(row(seed), params).tolist() == slow_survivors(row(seed), params)


def test_what_is_kept_equals_float64_away_from_the_borders() -> None:
    compared = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        scaled = (rng.standard_normal(300) * rng.uniform(0.5, 6)).astype(np.float32)
        params = filters(
            top_k=(0, 40)[seed % 2], top_p=float(rng.uniform(0.05, 0.99)), min_p=(0.0, 0.02)[seed // 2 % 2]
        )
        wanted = float_survivors(scaled, params)
        if wanted is not None:
            assert surviving_ids(scaled, params).tolist() == wanted
            compared += 1
    assert compared > 300


def test_weights_are_the_exponential_rounded_to_an_integer() -> None:
    differences = np.concatenate((-np.geomspace(1e-12, 31, 700), np.linspace(-31, 0, 700)))
    with localcontext() as context:
        context.prec = 40
        for difference, weight in zip(differences.tolist(), weigh(differences).tolist(), strict=True):
            exact = Decimal(difference).exp() * 2**SCALE_BITS
            assert abs(weight - exact) <= Decimal("0.5") + exact * Decimal("1e-14")


def test_weights_have_the_bits_of_unfused_float64_operations() -> None:
    differences = -np.abs(np.random.default_rng(5).standard_normal(20_000) * 12)
    assert weigh(differences).tolist() == [slow_weight(difference) for difference in differences.tolist()]


def test_the_largest_value_weighs_all_and_a_masked_one_nothing() -> None:
    assert weigh(np.array([0.0, -0.0, LOWEST, -1e30, -np.inf])).tolist() == [2**43, 2**43, 0, 0, 0]


@pytest.mark.parametrize("fields", [{"top_k": 2}, {"top_p": 0.6}], ids=["top_k", "top_p"])
def test_ties_are_broken_by_id(fields: dict[str, Any]) -> None:
    scaled = np.array([0.0, 1.0, -0.0, 0.0], dtype=np.float32)
    assert surviving_ids(scaled, filters(**fields)).tolist() == [0, 1]


def test_something_is_always_kept() -> None:
    masked = np.full(9, -np.inf, dtype=np.float32)
    for params in (filters(top_k=3), filters(top_p=0.5), filters(min_p=1.0)):
        assert surviving_ids(masked, params).tolist() == [0]
    masked[7] = -3.0
    for params in (filters(top_k=3), filters(top_p=1e-300), filters(min_p=1.0)):
        assert surviving_ids(masked, params).tolist() == [7]
