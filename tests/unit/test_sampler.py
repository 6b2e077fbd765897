"""Sampling against slow references, its order of filters, and the distribution it draws from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.engine import noise
from shared.engine.sampler import (
    SampleInput,
    adjust,
    draw,
    draw_over_all,
    draw_unfiltered,
    sample,
    token_logprob,
)
from shared.protocol.sampling import SamplingParams


def request(prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), choice: int = 0, **fields: Any) -> SampleInput:
    params = SamplingParams(**({"max_tokens": 100, "seed": 42} | fields))
    return SampleInput(params, choice, prompt, output)


def random_logits(seed: int, size: int = 97) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


def test_zero_temperature_is_argmax_with_ties_to_the_lowest_id() -> None:
    logits = np.array([1.0, 3.0, 3.0, 2.0], dtype=np.float32)
    assert sample(logits, request(temperature=0.0)) == 1
    assert sample(logits, request(temperature=0.0, top_p=0.1, top_k=1)) == 1


@settings(max_examples=60)
@given(seed=st.integers(0, 2**64 - 1), ordinal=st.integers(0, 5000), choice=st.integers(0, 63))
def test_the_pruned_draw_equals_noise_over_the_whole_vocabulary(seed: int, ordinal: int, choice: int) -> None:
    scaled = random_logits(seed % 1000, 2048)
    assert draw_unfiltered(scaled, seed, choice, ordinal) == draw_over_all(scaled, seed, choice, ordinal)


def test_the_pruned_draw_copes_with_masked_and_tiny_vocabularies() -> None:
    scaled = np.full(300, -np.inf, dtype=np.float32)
    scaled[[5, 250]] = 0.0
    for ordinal in range(20):
        assert draw_unfiltered(scaled, 1, 0, ordinal) == draw_over_all(scaled, 1, 0, ordinal)
        assert draw_unfiltered(scaled[:6], 1, 0, ordinal) == 5


def test_a_filtered_draw_uses_the_same_noise_as_an_unfiltered_one() -> None:
    scaled = random_logits(3)
    everyone = np.arange(len(scaled), dtype=np.int64)
    for ordinal in range(30):
        assert draw(scaled, everyone, 8, 0, ordinal) == draw_over_all(scaled, 8, 0, ordinal)


def test_golden_draws() -> None:
    """Fixed by the definition alone: computed with Python integers and math.log, not with our code."""
    logits = np.linspace(-2, 2, 16, dtype=np.float32)

    def reference(ordinal: int) -> int:
        scores = []
        for token in range(16):
            word = _slow_bits(token, ordinal)
            u = (word + 0.5) * 2.0**-32
            value = np.float32(float(logits[token]) / 0.7) + np.float32(-math.log(-math.log1p(-u)))
            scores.append(value)
        return int(np.argmax(scores))

    for ordinal in range(40):
        output = tuple([0] * ordinal)
        assert sample(logits, request(output=output, temperature=0.7, choice=2)) == reference(ordinal)


def _slow_bits(token: int, ordinal: int) -> int:
    from tests.unit.test_noise import slow_philox

    return slow_philox((token >> 2, ordinal, 2, noise.DOMAIN_TARGET), 42)[token & 3]


def test_draws_follow_the_softmax_distribution() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5], dtype=np.float32)
    weights = np.exp(logits.astype(np.float64))
    expected = weights / weights.sum()
    trials = 8000
    counts = np.bincount([draw_unfiltered(logits, 77, 0, i) for i in range(trials)], minlength=5)
    chi_square = float(((counts - trials * expected) ** 2 / (trials * expected)).sum())
    assert chi_square < 18.47  # 99.9 % quantile, 4 degrees of freedom


def test_penalties_follow_their_formulas() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.5], dtype=np.float32)
    adjusted = adjust(
        logits,
        request(prompt=(1,), output=(0, 0), repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25),
    )
    assert adjusted.tolist() == [2.0 / 2 - 2 * 0.25 - 0.5, -2.0 * 2, 1.0, 0.5]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5], "the caller's logits must stay as they were"


def test_bias_comes_before_penalties() -> None:
    logits = np.array([-1.0, 0.0], dtype=np.float32)
    adjusted = adjust(logits, request(output=(0,), logit_bias=((0, 3.0),), repetition_penalty=2.0))
    assert adjusted[0] == 1.0  # (-1 + 3) / 2, not -1 * 2 + 3


@pytest.mark.parametrize(("produced", "masked"), [(0, True), (2, True), (3, False)])
def test_min_tokens_masks_stop_ids_until_reached(produced: int, masked: bool) -> None:
    logits = np.array([0.0, 9.0], dtype=np.float32)
    given = request(output=(0,) * produced, temperature=0.0, min_tokens=3, stop_ids=(1,))
    assert sample(logits, given) == (0 if masked else 1)


def test_nothing_to_adjust_costs_no_copy() -> None:
    logits = random_logits(1)
    assert adjust(logits, request()) is logits


def test_logprobs_are_of_the_raw_distribution_in_order() -> None:
    logits = np.array([1.0, 3.0, 3.0, 0.0], dtype=np.float32)
    total = math.log(sum(math.exp(float(v)) for v in logits))
    result = token_logprob(logits, 0, 3)
    assert result.logprob == pytest.approx(1.0 - total)
    assert [token for token, _ in result.top] == [1, 2, 0]
    assert result.top[0][1] == pytest.approx(3.0 - total)
    assert token_logprob(logits, 0, 0).top == ()


def test_finish_reason_knows_stop_length_and_min_tokens() -> None:
    params = SamplingParams(max_tokens=3, seed=0, min_tokens=2, stop_ids=(9,))
    assert params.finish_reason([]) is None
    assert params.finish_reason([9]) is None
    assert params.finish_reason([1, 9]) == "stop"
    assert params.finish_reason([1, 2, 3]) == "length"
    assert params.finish_reason([1, 2, 9]) == "stop"
