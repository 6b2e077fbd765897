"""What the compiled kernels draw from rows made to be difficult is what the plain sampler draws."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from shared.engine import noise
from shared.engine.draws import FILTERED, GREEDY, GUMBEL
from shared.engine.filters import is_filtered, weigh
from shared.engine.sampler import SampleInput, sample
from shared.kernels.library import CLayer, CModel, CStep, Isa
from shared.protocol.sampling import SamplingParams
from tests.native_models import isas, library

F32 = npt.NDArray[np.float32]
DrawRows = Callable[[F32, list[SampleInput]], list[int]]
SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 300, 1000, 2049]
TEMPERATURES = [0.0, 1e-4, 0.3, 0.7, 1.0, 1.7, 40.0, 1e6]
TOP_KS = [0, 0, 1, 2, 7, 40, 300, 5000]
TOP_PS = [1.0, 1.0, 1.0 - 1e-12, 0.999, 0.95, 0.5, 0.1, 1e-6]
MIN_PS = [0.0, 0.0, 1e-13, 1e-3, 0.05, 0.5, 1.0]


@pytest.fixture(params=isas(), ids=lambda isa: isa.name.lower())
def draw_rows(request: pytest.FixtureRequest) -> Iterator[DrawRows]:
    """Draws each row of logits [num_rows, vocab_size] as its entry asks for."""
    isa: Isa = request.param
    layers = (CLayer * 1)()
    model = CModel(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, hidden_size=32, vocab_size=16)
    model.layers = ctypes.cast(layers, ctypes.POINTER(CLayer))
    engine = library().create(model, 1, isa)

    def draw(logits: F32, asked: list[SampleInput]) -> list[int]:
        sampled = np.full(len(asked), -2, dtype=np.int32)
        arrays: dict[str, npt.NDArray[np.generic]] = {"logits": logits, "sampled": sampled}
        params = [one.params for one in asked]
        arrays["sample"] = np.array([_way(one) for one in params], dtype=np.int32)
        arrays["seeds"] = np.array([one.seed for one in params], dtype=np.uint64)
        arrays["ordinals"] = np.array([len(one.output_ids) for one in asked], dtype=np.uint32)
        arrays["choices"] = np.array([one.choice for one in asked], dtype=np.uint32)
        arrays["top_ks"] = np.array([one.top_k for one in params], dtype=np.int32)
        for name in ("temperature", "top_p", "min_p"):
            arrays[f"{name}s"] = np.array([getattr(one, name) for one in params], dtype=np.float64)
        arrays["adjust_starts"] = np.zeros(len(asked) + 1, dtype=np.int64)
        step = CStep(num_logit_rows=len(asked))
        for name, array in arrays.items():
            setattr(step, name, array.ctypes.data)
        library().draw(engine, step, logits.shape[1])
        return [int(token) for token in sampled]

    yield draw
    library().destroy(engine)


def _way(params: SamplingParams) -> int:
    return GREEDY if params.is_greedy else FILTERED if is_filtered(params) else GUMBEL


def rows_of(seed: int, count: int, size: int) -> F32:
    """Peaked, ordinary and flat rows, rows of few different values, neighbouring floats, and masked ids."""
    rng = np.random.default_rng(seed)
    scales = rng.choice([0.0, 1e-6, 0.5, 3.0, 30.0], (count, 1))
    rows: F32 = (rng.standard_normal((count, size)) * scales).astype(np.float32)
    kinds = rng.integers(0, 6, count)
    rows[kinds == 1] = np.round(rows[kinds == 1])
    rows[kinds == 2] = np.float32(1000.0) + rows[kinds == 2] * np.float32(1e-4)
    rows[kinds == 3] *= rng.random((int((kinds == 3).sum()), size)) < 0.3  # zeros of both signs
    masked = (kinds == 4)[:, None] & (rng.random((count, size)) < 0.7)
    masked[:, rng.integers(0, size)] = False
    rows[masked] = -np.inf
    return rows


def asked_of(seed: int, count: int) -> list[SampleInput]:
    rng = np.random.default_rng(seed)
    return [
        SampleInput(
            SamplingParams(
                max_tokens=99,
                seed=int(rng.integers(0, 1 << 64, dtype=np.uint64)),
                temperature=float(rng.choice(TEMPERATURES)),
                top_k=int(rng.choice(TOP_KS)),
                top_p=float(rng.choice(TOP_PS)),
                min_p=float(rng.choice(MIN_PS)),
            ),
            choice=int(rng.integers(0, 64)),
            prompt_ids=(),
            output_ids=(0,) * int(rng.integers(0, 50)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("size", SIZES)
def test_draws_equal_the_sampler(draw_rows: DrawRows, size: int) -> None:
    for seed in range(4):
        rows, asked = rows_of(seed, 80, size), asked_of(seed + size, 80)
        assert draw_rows(rows, asked) == [sample(row, one) for row, one in zip(rows, asked, strict=True)]


def test_draws_over_a_whole_vocabulary_equal_the_sampler(draw_rows: DrawRows) -> None:
    rows, asked = rows_of(9, 40, 49_152), asked_of(9, 40)
    drawn = draw_rows(rows, asked)
    assert drawn == [sample(row, one) for row, one in zip(rows, asked, strict=True)]
    assert len(set(drawn)) > 10


def test_the_border_lies_where_the_reference_has_it(draw_rows: DrawRows) -> None:
    """At a temperature of 10⁶ the noise alone decides, so over many draws each kept id wins: the sets must agree."""
    rng = np.random.default_rng(3)
    rows = np.repeat(np.round(rng.standard_normal((6, 40)) * 2).astype(np.float32), 300, axis=0)
    asked = []
    for index in range(len(rows)):
        fields = ({"top_k": 9}, {"top_p": 0.3}, {"min_p": 1 - 2e-6})[index // 300 % 3]
        asked.append(SampleInput(SamplingParams(9, index, temperature=1e6, **fields), 0, (), ()))
    drawn = draw_rows(rows, asked)
    assert drawn == [sample(row, one) for row, one in zip(rows, asked, strict=True)]
    assert len(set(drawn[:300])) == 9
    assert len(set(drawn[300:600])) == 12  # 0.3 of 40 nearly equal weights


def test_weights_agree_to_the_last_unit(draw_rows: DrawRows) -> None:
    """Two ids of which the second wins if it is kept, and top_p a quarter of a unit to both sides of its border."""
    rng = np.random.default_rng(6)
    rows, asked = [], []
    for seed in range(1500):
        first, second = noise.gumbel(noise.random_bits(2, seed, 0, 0)).tolist()
        if second > first:
            difference = np.float32(rng.random() * (second - first))
            total = 2**43 + int(weigh(np.array([-float(difference)]))[0])
            for unit in (-0.25, 0.25):
                rows.append([0.0, -difference])
                asked.append(SampleInput(SamplingParams(9, seed, top_p=(2**43 + unit) / total), 0, (), ()))
    drawn = draw_rows(np.array(rows, dtype=np.float32), asked)
    assert drawn == [0, 1] * (len(rows) // 2)
    assert len(drawn) > 1000


def test_noise_agrees_to_the_last_bit(draw_rows: DrawRows) -> None:
    """Two ids whose scores are equal or one float apart, because their logits make up for the noise's difference."""
    rows, asked = [], []
    for seed in range(1000):
        first, second = noise.gumbel(noise.random_bits(2, seed, 0, 0))
        difference = second - first
        for logit in (np.nextafter(difference, np.float32(-99)), difference, np.nextafter(difference, np.float32(99))):
            rows.append([logit, 0.0])
            asked.append(SampleInput(SamplingParams(9, seed, top_k=seed % 2 * 2), 0, (), ()))
    drawn = draw_rows(np.array(rows, dtype=np.float32), asked)
    assert drawn == [sample(row, one) for row, one in zip(np.array(rows, dtype=np.float32), asked, strict=True)]
    assert 800 < sum(drawn) < 2200


def test_rows_without_a_finite_logit_draw_the_lowest_id(draw_rows: DrawRows) -> None:
    asked = [replace(one, params=replace(one.params, temperature=0.7)) for one in asked_of(2, 50)]
    assert draw_rows(np.full((50, 70), -np.inf, dtype=np.float32), asked) == [0] * 50


def test_rows_that_are_not_numbers_give_some_id(draw_rows: DrawRows) -> None:
    """What a broken model computes is nobody's token, but it is an id, and nothing else is read or written."""
    rng = np.random.default_rng(1)
    rows = rows_of(8, 200, 500)
    rows[rng.random(rows.shape) < 0.4] = np.nan
    rows[7] = np.nan
    rows[100:][rng.random((100, 500)) < 0.1] = np.inf
    assert all(0 <= token < 500 for token in draw_rows(rows, asked_of(5, 200)))
