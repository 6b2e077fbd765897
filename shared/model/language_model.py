"""What the engine and the start-up check need of a model; `Decoder` and `NativeDecoder` are such."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from shared.model.batch import ForwardBatch
from shared.model.config import ModelConfig


class ForwardPass(Protocol):
    """Computes hidden states of a ragged batch against a paged KV cache, and logits of chosen rows."""

    @property
    def row_pad(self) -> int:
        """Rows of every product are padded to a multiple of this; 1 where no padding is asked for."""
        ...

    def forward(self, batch: ForwardBatch, kv: Tensor) -> Tensor:
        """Hidden states after the final norm, [num_tokens, hidden_size]; K and V are written to `kv`."""
        ...

    def logits(self, rows: Tensor) -> Tensor:
        """float32 [num_rows, vocab_size] of hidden rows [num_rows, hidden_size]."""
        ...


class LanguageModel(ForwardPass, Protocol):
    """A whole model: what it is, what it computes in, and a shorter version of itself."""

    config: ModelConfig

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        ...

    @property
    def kernel_set(self) -> str:
        """Names the code whose bits the results have; part of the numerics fingerprint."""
        ...

    @property
    def num_layers(self) -> int: ...

    def truncated(self, num_layers: int) -> LanguageModel:
        """The same model with its first layers only, sharing all weights."""
        ...
