"""The one decoder: every supported family is this code under another `ModelConfig`."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.model.attention import AttentionPlan, HeadLayout, paged_attention, plan_attention
from shared.model.batch import ForwardBatch, padded_rows
from shared.model.config import ModelConfig
from shared.model.layers import LinearMap, Norm, rotate_

_VERSION = "torch-1"
"""Changes whenever this file or one it uses changes the bits of a result."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One transformer block. `qkv` yields q, k and v heads side by side, rotary pairs as neighbours."""

    attn_norm: Norm
    qkv: LinearMap
    q_norm: Norm | None
    k_norm: Norm | None
    attn_out: LinearMap
    mlp_norm: Norm
    mlp: LinearMap


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """Everything loaded from a checkpoint, on its device and in its compute dtype."""

    embedding: Tensor  # [vocab_size, hidden_size]
    positions: Tensor | None  # [max_position, hidden_size], for learned positions
    rotations: Tensor | None  # complex64 [max_position, head_dim / 2], for rotary positions
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm
    lm_head: LinearMap


class Decoder:
    """Computes one step at a time against a paged KV cache that the caller owns. Holds no request state."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, *, row_pad: int) -> None:
        self.config = config
        self._weights = weights
        self._heads = HeadLayout(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.attention_scale,
            sliding_window=config.sliding_window,
            row_pad=row_pad,
        )

    @property
    def weights(self) -> DecoderWeights:
        """What a draft shares with it."""
        return self._weights

    @property
    def row_pad(self) -> int:
        """Rows of every product are padded to a multiple of this; 1 gives row invariance up."""
        return self._heads.row_pad

    @property
    def device(self) -> torch.device:
        return self._weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.embedding.dtype

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: Tensor) -> Tensor:
        """Hidden states after the final norm, [num_tokens, hidden_size].

        Writes the batch's K and V into `kv` [layer, block, 2, kv_head, slot, head_dim]. The blocks of a group must
        hold finite numbers wherever they are not written yet. Calling it again with the same batch changes nothing.
        """
        weights = self._weights
        plan = plan_attention(batch, self._heads, kv.shape[4])
        hidden = F.embedding(batch.token_ids, weights.embedding)
        rotations = None
        if weights.positions is not None:
            hidden = hidden + F.embedding(batch.positions, weights.positions)
        if weights.rotations is not None:
            rotations = weights.rotations[batch.positions].unsqueeze(1)
        for layer, cache in zip(weights.layers, kv, strict=False):
            hidden = hidden + self._attention(layer, hidden, cache, plan, rotations)
            hidden += layer.mlp(layer.mlp_norm(hidden))
        return weights.final_norm(hidden)

    @torch.inference_mode()
    def logits(self, rows: Tensor) -> Tensor:
        """float32 [num_rows, vocab_size] for any number of hidden rows [num_rows, hidden_size]."""
        num_rows = len(rows)
        padded = F.pad(rows, (0, 0, 0, padded_rows(num_rows, self.row_pad) - num_rows))
        return self._weights.lm_head(padded)[:num_rows].float()

    @property
    def kernel_set(self) -> str:
        """Beside our own version: torch's, and which inner loops its libraries choose on this processor."""
        if self.device.type == "cuda":
            processor = f"{torch.cuda.get_device_name(self.device)} {torch.version.cuda}"
        else:
            mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
            processor = f"{torch.backends.cpu.get_cpu_capability()} mkl={mkl}"
        return f"{_VERSION} {torch.__version__} {self.device.type} {processor}"

    @property
    def num_layers(self) -> int:
        return len(self._weights.layers)

    def truncated(self, num_layers: int) -> Decoder:
        """The same decoder with its first layers only, sharing all tensors."""
        shorter = copy.copy(self)
        shorter._weights = dataclasses.replace(self._weights, layers=self._weights.layers[:num_layers])
        return shorter

    def with_row_pad(self, row_pad: int) -> Decoder:
        """The same decoder under another padding rule, sharing all tensors."""
        return Decoder(self.config, self._weights, row_pad=row_pad)

    def _attention(
        self, layer: DecoderLayer, hidden: Tensor, cache: Tensor, plan: AttentionPlan, rotations: Tensor | None
    ) -> Tensor:
        heads = self._heads
        fused = layer.qkv(layer.attn_norm(hidden))
        by_head = fused.view(len(fused), heads.heads_per_token, heads.head_dim)
        queries_and_keys = by_head[:, : heads.num_heads + heads.num_kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            queries, keys = queries_and_keys[:, : heads.num_heads], queries_and_keys[:, heads.num_heads :]
            queries.copy_(layer.q_norm(queries))
            keys.copy_(layer.k_norm(keys))
        if rotations is not None:
            rotate_(queries_and_keys, rotations)
        return layer.attn_out(paged_attention(fused, cache, plan, heads))
