"""The parts a decoder is made of: linear maps, norms, activations, rotary positions.

They are plain objects holding tensors, not `nn.Module`s: there is no training here, and a call costs less. A
quantisation scheme replaces `Linear`; nothing else knows about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.model.config import RopeScaling


class LinearMap(Protocol):
    """Rows in, rows out. A row's result must not depend on the rows beside it when they are padded alike."""

    def __call__(self, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Linear:
    """weight [num_out, num_in], bias [num_out] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """As `Linear`, with the weight in the order oneDNN's kernels read it (float32 on the CPU).

    Half the time of `Linear` for the 4 to 32 rows of a decode step, and rows agree in every bit for any count but 1,
    so padding to 2 rows would do. The operators are those torch's own compiler emits; they have no public name.
    """

    packed_weight: Tensor
    bias: Tensor | None

    def __call__(self, rows: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed_weight, self.bias, "none", [], "")
        return result


_PACKED_ROWS = 4
"""Row count the packed order is chosen for; any other count can be computed with it."""


def make_linear(weight: Tensor, bias: Tensor | None) -> LinearMap:
    """The fastest linear map for where the weight lies; `Linear` where there is no better."""
    can_pack = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not can_pack:
        return Linear(weight, bias)
    return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS), bias)


class Norm(Protocol):
    def __call__(self, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Over the last dimension (Zhang and Sennrich 2019)."""

    weight: Tensor
    eps: float

    def __call__(self, rows: Tensor) -> Tensor:
        return F.rms_norm(rows, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, rows: Tensor) -> Tensor:
        return F.layer_norm(rows, self.weight.shape, self.weight, self.bias, self.eps)


def _gelu_tanh(rows: Tensor) -> Tensor:
    return F.gelu(rows, approximate="tanh")


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
}


@dataclass(frozen=True, slots=True)
class FeedForward:
    """Two linear maps around an activation; gated when `into` yields gate and up side by side (SwiGLU)."""

    into: LinearMap
    out: LinearMap
    activation: Callable[[Tensor], Tensor]
    gated: bool

    def __call__(self, rows: Tensor) -> Tensor:
        inner = self.into(rows)
        if not self.gated:
            return self.out(self.activation(inner))
        gate, up = inner.chunk(2, dim=-1)
        return self.out(self.activation(gate).mul_(up))


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each rotary pair, float32 [head_dim / 2] (Su et al. 2021; scaling as in Llama 3.1)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2.0 * math.pi / frequencies
    rotations = scaling.original_max_position / wavelengths
    spread = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((rotations - scaling.low_freq_factor) / spread).clamp(0.0, 1.0)
    return (1.0 - keep) * frequencies / scaling.factor + keep * frequencies


def rotary_table(frequencies: Tensor, num_positions: int) -> Tensor:
    """The rotation of each position as complex numbers, complex64 [num_positions, head_dim / 2]."""
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotate_(heads: Tensor, rotations: Tensor) -> None:
    """Turn neighbouring pairs of each head in place.

    heads [num_tokens, num_heads, head_dim], last dimension contiguous; rotations [num_tokens, 1, head_dim / 2].
    Pairs are neighbours, (0, 1), (2, 3), …: the loader stores q and k rows in that order, which makes the rotation
    one complex product. Scores do not depend on the order.
    """
    pairs = heads if heads.dtype == torch.float32 else heads.float()
    torch.view_as_complex(pairs.view(*pairs.shape[:-1], -1, 2)).mul_(rotations)
    if pairs is not heads:
        heads.copy_(pairs)
