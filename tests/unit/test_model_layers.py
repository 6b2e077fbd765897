"""The parts against the obvious computation of each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared.model.config import RopeScaling
from shared.model.layers import (
    FeedForward,
    Linear,
    PackedLinear,
    make_linear,
    rotary_frequencies,
    rotary_table,
    rotate_,
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 96), (75, 131), (576, 960)])
def test_packed_linear_agrees_with_the_plain_one(num_in: int, num_out: int, bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(num_out, num_in) / num_in**0.5
    plain = Linear(weight, torch.randn(num_out) if bias else None)
    packed = make_linear(plain.weight, plain.bias)
    assert isinstance(packed, PackedLinear)
    for num_rows in (1, 4, 8, 132):
        rows = torch.randn(num_rows, num_in)
        assert (packed(rows) - plain(rows)).abs().max() < 2e-5


def test_packed_linear_rows_have_the_same_bits_in_any_count_above_one() -> None:
    torch.manual_seed(0)
    packed = make_linear(torch.randn(131, 203), torch.randn(131))
    rows = torch.randn(80, 203)
    whole = packed(rows)
    for count in range(2, 65):
        for first in (0, 1, 2, 3, 16):
            part = packed(rows[first : first + count])
            assert torch.equal(part, whole[first : first + count]), f"{count} rows from {first}"


def test_half_precision_stays_plain() -> None:
    assert isinstance(make_linear(torch.ones(4, 4, dtype=torch.bfloat16), None), Linear)


def test_gated_and_plain_feed_forward() -> None:
    torch.manual_seed(0)
    gate, up, down = torch.randn(8, 6), torch.randn(8, 6), torch.randn(6, 8)
    rows = torch.randn(4, 6)
    gated = FeedForward(Linear(torch.cat([gate, up])), Linear(down), torch.nn.functional.silu, gated=True)
    plain = FeedForward(Linear(up), Linear(down), torch.nn.functional.gelu, gated=False)
    expected = (torch.nn.functional.silu(rows @ gate.t()) * (rows @ up.t())) @ down.t()
    torch.testing.assert_close(gated(rows), expected)
    torch.testing.assert_close(plain(rows), torch.nn.functional.gelu(rows @ up.t()) @ down.t())


def rotated_by_halves(heads: Tensor, angles: Tensor) -> Tensor:
    """The rotation as papers and transformers write it, pairs lying half a head apart."""
    cos, sin = (torch.cat([part, part], dim=-1)[:, None] for part in (angles.cos(), angles.sin()))
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.05)])
def test_rotation_of_neighbouring_pairs_equals_rotation_of_halves(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    frequencies = rotary_frequencies(10, 10000.0, None)
    positions = torch.tensor([0, 1, 7, 40])
    heads = torch.randn(4, 3, 10).to(dtype)
    expected = rotated_by_halves(heads.float(), torch.outer(positions.float(), frequencies))
    pairs = heads.view(4, 3, 2, 5).transpose(-1, -2).reshape(4, 3, 10)
    rotate_(pairs, rotary_table(frequencies, 64)[positions].unsqueeze(1))
    found = pairs.view(4, 3, 5, 2).transpose(-1, -2).reshape(4, 3, 10)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < tolerance


def test_rotation_works_on_a_slice_in_place() -> None:
    fused = torch.ones(2, 5, 4)
    quarter_turn = torch.full((2, 1, 2), 1j)
    rotate_(fused[:, :3], quarter_turn)
    assert fused[:, :3].flatten(0, 1).tolist() == [[-1.0, 1.0, -1.0, 1.0]] * 6
    assert fused[:, 3:].eq(1.0).all()


def test_frequency_scaling() -> None:
    plain = rotary_frequencies(64, 10000.0, None)
    assert torch.equal(rotary_frequencies(64, 10000.0, RopeScaling("linear", 4.0)), plain / 4)
    scaled = rotary_frequencies(64, 10000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 256))
    ratio = plain / scaled
    assert ratio[0] == 1.0  # fast pairs stay
    assert ratio[-1] == pytest.approx(8.0)  # slow pairs are stretched by the factor
    assert (ratio.diff() >= -1e-6).all()
    assert ((ratio > 1.01) & (ratio < 7.99)).any()  # and between them it is gradual
