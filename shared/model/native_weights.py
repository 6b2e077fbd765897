"""From a checkpoint's tensors to the memory the CPU kernels read: packed matrices and float32 vectors.

Quantised GGUF tensors keep their values; float tensors stay float32 or bfloat16, or are quantised here
(`quantization`). The arrays live as long as the `NativeWeights` that holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from shared.errors import ModelFormatError
from shared.kernels.library import CLayer, CMatrix, CModel, CNorm
from shared.kernels.packing import (
    INPUT_PAD,
    TILE,
    Matrix,
    concatenate,
    dense,
    pack,
    quantise_4bit,
    quantise_8bit,
)
from shared.kernels.weight_memory import WeightMemory
from shared.model.config import NORM_RMS, ModelConfig
from shared.model.native_support import ACTIVATIONS
from shared.model.row_order import gate_and_up_order, qkv_order, rotary_order
from shared.model.tensor_file import TensorReader
from shared.model.weight_names import WeightNames

F32 = npt.NDArray[np.float32]

QUANTISERS: dict[str, Callable[[F32], Matrix]] = {"int8": quantise_8bit, "int4": quantise_4bit}


class NativeWeights:
    """A model in the kernels' memory. `model` is the C struct; everything it points to belongs to this object."""

    def __init__(self, model: CModel, memory: list[npt.NDArray[np.generic]], layers: object) -> None:
        self.model = model
        self._memory = memory
        self._layers = layers


class NativeLoader:
    """Reads one checkpoint; reports the share of layers done to `progress`."""

    def __init__(self, reader: TensorReader, names: WeightNames, config: ModelConfig, quantization: str | None) -> None:
        self._reader = reader
        self._names = names
        self._config = config
        self._quantise = QUANTISERS[quantization] if quantization else None
        self._memory: list[npt.NDArray[np.generic]] = []
        self._large_pages = WeightMemory()
        self._owners: list[object] = []  # of memory that is not ours

    def load(
        self, block_size: int, kv_dtype: int, rotations: F32 | None, progress: Callable[[float], None]
    ) -> NativeWeights:
        """Read everything. Raises ModelFormatError naming the file and the tensor that is missing or misshapen."""
        config, names = self._config, self._names
        layers = (CLayer * config.num_layers)()
        for index in range(config.num_layers):
            self._layer(layers[index], index)
            progress((index + 1) / (config.num_layers + 1))
        model = CModel(
            config.vocab_size,
            config.hidden_size,
            config.intermediate_size,
            config.num_layers,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.max_position,
            0 if config.norm == NORM_RMS else 1,
            ACTIVATIONS[config.activation],
            int(config.gated_mlp),
            config.sliding_window or 0,
            block_size,
            kv_dtype,
            config.norm_eps,
            config.attention_scale,
            layers,
        )
        self._ends(model)
        model.final_norm = self._norm(names.final_norm)
        if config.rope_theta is None:
            positions = self._reader.floats(f"{names.positions}.weight", config.max_position, config.hidden_size)
            model.positions = self._keep(positions)
        if rotations is not None:
            model.rotations = self._keep(rotations)
        progress(1.0)
        return NativeWeights(model, self._memory, (layers, self._owners))

    def output_rows(self) -> Matrix:
        """What gives the logits, as stored."""
        config, names = self._config, self._names
        name = names.embedding if config.tie_word_embeddings else names.lm_head
        return self._matrix(name, config.vocab_size, config.hidden_size, transposed=False)

    def _ends(self, model: CModel) -> None:
        """The embedding, and what gives the logits."""
        config, names = self._config, self._names
        model.embedding = self._place(
            self._matrix(names.embedding, config.vocab_size, config.hidden_size, transposed=False)
        )
        model.lm_head = model.embedding if config.tie_word_embeddings else self._place(self.output_rows())

    def _layer(self, layer: CLayer, index: int) -> None:
        config, names = self._config, self._names
        heads_size = config.num_heads * config.head_dim
        layer.attn_norm = self._norm(names.attn_norm.format(i=index))
        layer.mlp_norm = self._norm(names.mlp_norm.format(i=index))
        parts, bias = self._qkv(index)
        layer.num_qkv = len(parts)
        row = 0
        for at, part in enumerate(parts):
            layer.qkv[at] = self._place(part, None if bias is None else bias[row : row + part.num_out])
            row += part.num_out
        out = names.attn_out.format(i=index)
        layer.attn_out = self._place(
            self._matrix(out, config.hidden_size, heads_size), self._bias(out, config.hidden_size, config.attn_out_bias)
        )
        self._feed_forward(layer, index)
        if config.qk_norm:
            layer.q_norm = self._head_norm(names.q_norm.format(i=index))
            layer.k_norm = self._head_norm(names.k_norm.format(i=index))

    def _qkv(self, index: int) -> tuple[list[Matrix], F32 | None]:
        """q, k and v as one matrix, or as up to three where the file stores them in unlike ways."""
        config, names = self._config, self._names
        sizes = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        is_split = len(names.qkv) == len(sizes)
        widths = sizes if is_split else [sum(sizes)]
        full_names = [name.format(i=index) for name in names.qkv[: len(widths)]]
        order = qkv_order(config, names)
        biases = [self._bias(name, width, config.qkv_bias) for name, width in zip(full_names, widths, strict=True)]
        bias = np.concatenate([part for part in biases if part is not None])[order] if config.qkv_bias else None
        matrices = [
            self._matrix(name, width, config.hidden_size) for name, width in zip(full_names, widths, strict=True)
        ]
        if len({matrix.kind for matrix in matrices}) == 1:
            return [concatenate(matrices).rows(order)], bias
        starts = np.cumsum([0, *widths])
        pieces = [order[a:b] - a for a, b in pairwise(starts)]
        return [matrix.rows(piece) for matrix, piece in zip(matrices, pieces, strict=True)], bias

    def _feed_forward(self, layer: CLayer, index: int) -> None:
        config, names = self._config, self._names
        inner, outer = config.intermediate_size, config.hidden_size
        padded = -(-inner // INPUT_PAD) * INPUT_PAD
        into = [self._matrix(name.format(i=index), inner, outer).padded(padded, outer) for name in names.mlp_in]
        biases = [self._bias(name.format(i=index), inner, config.mlp_bias) for name in names.mlp_in]
        bias = np.concatenate(
            [np.pad(part, (0, padded - inner)) for part in biases if part is not None] or [np.zeros(0, np.float32)]
        )
        matrix = _alike(into)
        if config.gated_mlp:
            order = gate_and_up_order(padded)
            matrix, bias = matrix.rows(order), bias[order] if config.mlp_bias else bias
        layer.into = self._place(matrix, bias.astype(np.float32) if config.mlp_bias else None)
        out = names.mlp_out.format(i=index)
        layer.out = self._place(
            self._matrix(out, outer, inner).padded(outer, padded), self._bias(out, outer, config.mlp_bias)
        )

    def _matrix(self, name: str, num_out: int, num_in: int, *, transposed: bool | None = None) -> Matrix:
        """A weight [num_out, num_in] as stored, or quantised if that was asked for."""
        is_transposed = self._names.transposed if transposed is None else transposed
        shape = (num_in, num_out) if is_transposed else (num_out, num_in)
        stored = self._reader.matrix(f"{name}.weight", *shape)
        if stored is not None and not is_transposed and (self._quantise is None or stored.scales is not None):
            return stored
        values = self._reader.floats(f"{name}.weight", *shape)
        values = np.ascontiguousarray(values.T) if is_transposed else values
        return self._quantise(values) if self._quantise and num_in % INPUT_PAD == 0 else dense(values)

    def _bias(self, name: str, size: int, has_bias: bool) -> F32 | None:
        return self._reader.floats(f"{name}.bias", size) if has_bias else None

    def _norm(self, name: str) -> CNorm:
        weight = self._keep(self._reader.floats(f"{name}.weight", self._config.hidden_size))
        has_bias = self._config.norm != NORM_RMS
        return CNorm(
            weight, self._keep(self._reader.floats(f"{name}.bias", self._config.hidden_size)) if has_bias else None
        )

    def _head_norm(self, name: str) -> int:
        weight = self._reader.floats(f"{name}.weight", self._config.head_dim)
        return self._keep(weight[rotary_order(self._config, self._names)])

    def _place(self, matrix: Matrix, bias: F32 | None = None) -> CMatrix:
        packed = pack(matrix, self._large_pages.take)
        self._memory.append(packed)
        num_out, num_in = -(-matrix.num_out // TILE) * TILE, -(-matrix.num_in // INPUT_PAD) * INPUT_PAD
        at = None if bias is None else self._keep(np.pad(bias, (0, num_out - len(bias))))
        return CMatrix(int(matrix.kind), num_out, num_in, packed.ctypes.data, at)

    def _keep_ids(self, ids: npt.NDArray[np.int32]) -> int:
        self._memory.append(ids)
        return int(ids.ctypes.data)

    def _keep(self, values: F32) -> int:
        array = np.ascontiguousarray(values, dtype=np.float32)
        self._memory.append(array)
        return int(array.ctypes.data)


def _alike(parts: Sequence[Matrix]) -> Matrix:
    if len({part.kind for part in parts}) > 1:
        kinds = ", ".join(sorted({part.kind.name for part in parts}))
        raise ModelFormatError(f"gate and up projections are stored in unlike ways ({kinds}); use --kernels torch.")
    return concatenate(parts)
