"""What a model is made of, independent of the file format it came in. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.errors import ModelFormatError

NORM_RMS = "rms"
NORM_LAYER = "layer"

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")

_MAX_DIMENSION = 1 << 24
_MAX_POSITION = 1 << 21
"""No size in a real configuration comes near these; a larger one is a damaged or hostile file."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched; `kind` is "linear" or "llama3" (Llama 3.1's piecewise rule)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer.

    `architecture` is the Hugging Face class name, also for GGUF files. `rope_theta` None means learned positions.
    `sliding_window` w: a token sees itself and the w - 1 tokens before it. `dtype` is the checkpoint's own.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm: str = NORM_RMS
    norm_eps: float = 1e-5
    activation: str = "silu"
    gated_mlp: bool = True
    rope_theta: float | None = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scale: float = 0.0
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.attention_scale == 0.0 and self.head_dim > 0:
            object.__setattr__(self, "attention_scale", 1.0 / math.sqrt(self.head_dim))
        self._check_sizes()
        self._check_choices()

    @property
    def group_size(self) -> int:
        """Query heads that share one K/V head."""
        return self.num_heads // self.num_kv_heads

    def _check_sizes(self) -> None:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        bounds = dict.fromkeys((*names, "head_dim"), _MAX_DIMENSION) | {"max_position": _MAX_POSITION}
        for name, bound in bounds.items():
            value = getattr(self, name)
            if not 0 < value <= bound:
                raise ModelFormatError(f"{name} is {value}; it must lie between 1 and {bound}.")
        if self.num_heads % self.num_kv_heads:
            raise ModelFormatError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} K/V heads evenly.")
        if self.rope_theta is not None and self.head_dim % 2:
            raise ModelFormatError(f"head_dim is {self.head_dim}; rotary positions need an even one.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ModelFormatError(f"sliding_window is {self.sliding_window}; it must be at least 1 or absent.")

    def _check_choices(self) -> None:
        if self.norm not in (NORM_RMS, NORM_LAYER):
            raise ModelFormatError(f"norm {self.norm!r} is not known; known are {NORM_RMS} and {NORM_LAYER}.")
        if self.activation not in ACTIVATIONS:
            raise ModelFormatError(f"activation {self.activation!r} is not known; known are {', '.join(ACTIVATIONS)}.")
        numbers = [self.norm_eps, self.attention_scale]
        if self.rope_theta is not None:
            numbers.append(self.rope_theta)
        if self.rope_scaling is not None:
            scaling = self.rope_scaling
            numbers += [scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor]
            if scaling.original_max_position < 1 or scaling.high_freq_factor <= scaling.low_freq_factor:
                raise ModelFormatError("the rope_scaling values contradict each other; check config.json.")
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ModelFormatError("norm_eps, rope_theta, rope_scaling and the attention scale must be positive.")


def refuse_architecture(name: object, supported: list[str]) -> ModelFormatError:
    """The error for a model family that is not implemented, naming those that are."""
    return ModelFormatError(f"architecture {name!r} is not supported; supported are {', '.join(sorted(supported))}.")
