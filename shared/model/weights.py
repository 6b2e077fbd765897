"""From named tensors of a checkpoint to the decoder's weights: fused, reordered, padded, checked against the config."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.model.config import NORM_RMS, ModelConfig
from shared.model.decoder import DecoderLayer, DecoderWeights
from shared.model.layers import (
    ACTIVATION_FUNCTIONS,
    FeedForward,
    LayerNorm,
    LinearMap,
    Norm,
    RMSNorm,
    make_linear,
    rotary_frequencies,
    rotary_table,
)
from shared.model.row_order import qkv_order, rotary_order
from shared.model.tensor_file import TensorReader
from shared.model.weight_names import WeightNames

_MLP_PAD = 64
"""The inner size of the feed-forward is padded to a multiple of this with zero weights: activations round differently
in a vector loop's tail, so a row's bits would depend on where in memory it lies (engine-rules.md)."""


class WeightLoader:
    """Builds a decoder's weights; reports the share of layers done to `progress`."""

    def __init__(
        self, reader: TensorReader, names: WeightNames, config: ModelConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._reader = reader
        self._read = reader.tensor
        self._names = names
        self._config = config
        self._device = device
        self._dtype = dtype

    def load(self, progress: Callable[[float], None]) -> DecoderWeights:
        """Read everything. Raises ModelFormatError naming the file and the tensor that is missing or misshapen."""
        config, names = self._config, self._names
        embedding = self._place(self._read(f"{names.embedding}.weight", config.vocab_size, config.hidden_size))
        positions = None
        if config.rope_theta is None:
            positions = self._place(self._read(f"{names.positions}.weight", config.max_position, config.hidden_size))
        layers = []
        for index in range(config.num_layers):
            layers.append(self._layer(index))
            progress((index + 1) / (config.num_layers + 1))
        lm_head = embedding
        if not config.tie_word_embeddings:
            lm_head = self._place(read_output_rows(self._reader, names, config))
        rotations = read_rotations(self._reader, names, config)
        if rotations is not None:
            rotations = rotations.to(self._device)
        progress(1.0)
        head = make_linear(lm_head, None)
        return DecoderWeights(embedding, positions, rotations, tuple(layers), self._final_norm(), head)

    def _layer(self, index: int) -> DecoderLayer:
        config, names = self._config, self._names
        q_norm = self._head_norm(names.q_norm.format(i=index)) if config.qk_norm else None
        k_norm = self._head_norm(names.k_norm.format(i=index)) if config.qk_norm else None
        heads_size = config.num_heads * config.head_dim
        return DecoderLayer(
            attn_norm=self._norm(names.attn_norm.format(i=index), config.hidden_size),
            qkv=self._qkv(index),
            q_norm=q_norm,
            k_norm=k_norm,
            attn_out=self._linear(
                *self._matrix(names.attn_out.format(i=index), config.hidden_size, heads_size, config.attn_out_bias)
            ),
            mlp_norm=self._norm(names.mlp_norm.format(i=index), config.hidden_size),
            mlp=self._mlp(index),
        )

    def _mlp(self, index: int) -> FeedForward:
        into, out = self._feed_forward(index)
        return FeedForward(into, out, ACTIVATION_FUNCTIONS[self._config.activation], self._config.gated_mlp)

    def _qkv(self, index: int) -> LinearMap:
        """q, k and v as one matrix, heads in order, rotary pairs as neighbours."""
        config, names = self._config, self._names
        sizes = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        parts = names.qkv if len(names.qkv) == len(sizes) else (names.qkv[0],)
        widths = sizes if len(parts) > 1 else [sum(sizes)]
        read = [
            self._matrix(name.format(i=index), width, config.hidden_size, config.qkv_bias)
            for name, width in zip(parts, widths, strict=True)
        ]
        weight = torch.cat([part[0] for part in read])
        bias = torch.cat([part[1] for part in read if part[1] is not None]) if config.qkv_bias else None
        order = torch.from_numpy(qkv_order(config, self._names))
        return self._linear(weight[order], None if bias is None else bias[order])

    def _feed_forward(self, index: int) -> tuple[LinearMap, LinearMap]:
        config, names = self._config, self._names
        inner, outer = config.intermediate_size, config.hidden_size
        extra = -inner % _MLP_PAD
        weights, biases = [], []
        for name in names.mlp_in:
            weight, bias = self._matrix(name.format(i=index), inner, outer, config.mlp_bias)
            weights.append(F.pad(weight, (0, 0, 0, extra)))
            biases.append(None if bias is None else F.pad(bias, (0, extra)))
        bias = torch.cat([item for item in biases if item is not None]) if config.mlp_bias else None
        into = self._linear(torch.cat(weights), bias)
        weight, bias = self._matrix(names.mlp_out.format(i=index), outer, inner, config.mlp_bias)
        return into, self._linear(F.pad(weight, (0, extra)), bias)

    def _matrix(self, name: str, num_out: int, num_in: int, has_bias: bool) -> tuple[Tensor, Tensor | None]:
        """Weight [num_out, num_in] and bias, as stored but never transposed."""
        if self._names.transposed:
            weight = self._read(f"{name}.weight", num_in, num_out).t()
        else:
            weight = self._read(f"{name}.weight", num_out, num_in)
        return weight, self._read(f"{name}.bias", num_out) if has_bias else None

    def _final_norm(self) -> Norm:
        return self._norm(self._names.final_norm, self._config.hidden_size)

    def _norm(self, name: str, size: int) -> Norm:
        weight = self._place(self._read(f"{name}.weight", size))
        if self._config.norm == NORM_RMS:
            return RMSNorm(weight, self._config.norm_eps)
        return LayerNorm(weight, self._place(self._read(f"{name}.bias", size)), self._config.norm_eps)

    def _head_norm(self, name: str) -> RMSNorm:
        """A norm over each head, its weights in the order of the rotary pairs."""
        weight = self._read(f"{name}.weight", self._config.head_dim)
        order = torch.from_numpy(rotary_order(self._config, self._names))
        return RMSNorm(self._place(weight[order]), self._config.norm_eps)

    def _linear(self, weight: Tensor, bias: Tensor | None) -> LinearMap:
        return make_linear(self._place(weight), None if bias is None else self._place(bias))

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype).contiguous()


def read_output_rows(reader: TensorReader, names: WeightNames, config: ModelConfig) -> Tensor:
    """What the logits are made with, [vocab_size, hidden_size], as stored; the embedding where it is tied to it."""
    name = names.embedding if config.tie_word_embeddings else names.lm_head
    return reader.tensor(f"{name}.weight", config.vocab_size, config.hidden_size)


def read_rotations(reader: TensorReader, names: WeightNames, config: ModelConfig) -> Tensor | None:
    """The rotation of each position, complex64 [max_position, head_dim / 2]; None for learned positions."""
    if config.rope_theta is None:
        return None
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    factors = f"{names.rope_factors}.weight"
    if reader.has(factors):
        frequencies = frequencies / reader.tensor(factors, config.head_dim // 2).float()
    return rotary_table(frequencies, config.max_position)
