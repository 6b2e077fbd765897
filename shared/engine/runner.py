"""Runs one step on the model: int arrays in, float32 logits of the asked rows out."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from shared.engine.batch import GroupInput, StepInput
from shared.engine.noise import F32
from shared.kv.cache import KVCache
from shared.model.batch import AttentionGroup, ForwardBatch


class LanguageModel(Protocol):
    """What the runner needs of a model; `shared.model.decoder.Decoder` is one."""

    @property
    def row_pad(self) -> int: ...

    def forward(self, batch: ForwardBatch, kv: torch.Tensor) -> torch.Tensor: ...

    def logits(self, rows: torch.Tensor) -> torch.Tensor: ...


class ModelRunner:
    """Owns the model and the KV cache tensors; knows nothing of sequences."""

    def __init__(self, model: LanguageModel, cache: KVCache, device: str) -> None:
        self._model = model
        self._device = torch.device(device)
        self.cache = cache
        self.row_pad = model.row_pad

    @torch.inference_mode()
    def run(self, step: StepInput) -> F32:
        """Logits [len(step.logit_rows), vocab_size] on the host."""
        batch = ForwardBatch(
            token_ids=self._tensor(step.token_ids),
            positions=self._tensor(step.positions),
            slot_mapping=self._tensor(step.slot_mapping),
            groups=tuple(self._group(group) for group in step.groups),
        )
        hidden = self._model.forward(batch, self.cache.data)
        if not len(step.logit_rows):
            return np.zeros((0, 0), dtype=np.float32)
        logits = self._model.logits(hidden[self._tensor(step.logit_rows)])
        return logits.float().cpu().numpy()

    def _group(self, group: GroupInput) -> AttentionGroup:
        return AttentionGroup(
            rows=self._tensor(group.rows),
            num_seqs=len(group.context_lens),
            query_len=group.query_len,
            block_tables=self._tensor(group.block_tables),
            context_lens=self._tensor(group.context_lens),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
