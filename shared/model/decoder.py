"""The one decoder. (Signature first; the body follows.)"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.model.batch import ForwardBatch
from shared.model.config import ModelConfig


class Decoder:
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    row_pad: int

    def forward(self, batch: ForwardBatch, kv: Tensor) -> Tensor:
        """Write K/V of the batch into `kv` [layer, block, 2, kv_head, slot, head_dim]; returns hidden [T, hidden]."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [R, vocab] for hidden rows [R, hidden]; any R, padded inside."""
        raise NotImplementedError
