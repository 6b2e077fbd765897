"""The draft as a trainable module: layers of llama form between the target's own embeddings and output rows.

Parameters have Hugging Face's names and its order of rotary dimensions. Embeddings and output rows are frozen and
belong to the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.distill.lessons import TEST_POSITIONS, Lesson
from shared.distill.losses import expected_in_head, place_table
from shared.distill.options import DistillOptions
from shared.distill.rows import Piece, batches_of_epoch, make_batch, pack
from shared.distill.texts import Text
from shared.errors import ConfigurationError
from shared.model.config import NORM_RMS, ModelConfig
from shared.model.registry import open_reader
from shared.model.source import ModelSource
from shared.model.tensor_file import TensorReader
from shared.model.weight_names import WeightNames, weight_names
from shared.model.weights import read_output_rows, read_rotations

Cache = list[tuple[Tensor, Tensor]]
"""Rotated keys and values of each layer, [batch, num_kv_heads, num_tokens, head_dim]."""


def refuse_target(config: ModelConfig) -> None:
    """Raise ConfigurationError unless the target's layers are of the form a draft has."""
    plain = not (config.qkv_bias or config.attn_out_bias or config.mlp_bias or config.qk_norm)
    known = config.norm == NORM_RMS and config.gated_mlp and config.activation == "silu"
    if not (plain and known and config.rope_theta is not None and config.sliding_window is None):
        raise ConfigurationError(
            f"a draft has layers as Llama has them, and those of {config.architecture} have biases, norms or positions "
            "of another kind; distill knows targets of Llama's form"
        )


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._head_dim = config.head_dim
        self._scale = config.attention_scale
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)

    def forward(
        self, rows: Tensor, turns: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        queries, keys, values = (self._heads(linear(rows)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        queries, keys = _turned(queries, turns), _turned(keys, turns)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask[:, None], scale=self._scale, enable_gqa=True
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2)), (keys, values)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:2], -1, self._head_dim).transpose(1, 2)


def _turned(heads: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions in Hugging Face's order: a dimension of the first half and one of the second make a pair."""
    cosine, sine = turns[:, None, :, :, 0], turns[:, None, :, :, 1]
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(heads.dtype)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(rows)) * self.up_proj(rows))
        return result


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, rows: Tensor, turns: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, kept = self.self_attn(self.input_layernorm(rows), turns, mask, past)
        rows = rows + attended
        return rows + self.mlp(self.post_attention_layernorm(rows)), kept


class Body(nn.Module):
    """What Hugging Face calls `model`, without the embeddings."""

    def __init__(self, config: ModelConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)


@dataclass(frozen=True, slots=True)
class Frozen:
    """What the draft takes from the target as it is, float32."""

    embedding: Tensor  # [vocab_size, hidden_size]
    head: Tensor  # [head_size, hidden_size]
    head_ids: Tensor  # int64 [head_size], ascending
    turns: Tensor  # [max_position, head_dim / 2, 2], cosine and sine


class Student(nn.Module):
    """The draft; `model` holds all parameters."""

    def __init__(self, config: ModelConfig, num_layers: int, frozen: Frozen, exit_layer: int = 0) -> None:
        """Of `num_layers` own layers behind the target's first `exit_layer`, which stay as they are."""
        super().__init__()
        self.config = config
        self.num_layers = num_layers
        self.exit_layer = exit_layer
        self.model = Body(config, exit_layer + num_layers)
        for layer in self.model.layers[:exit_layer]:
            layer.requires_grad_(False)
        for name in ("embedding", "head", "head_ids", "turns"):
            self.register_buffer(name, getattr(frozen, name), persistent=False)
        self.embedding: Tensor
        self.head: Tensor
        self.head_ids: Tensor
        self.turns: Tensor

    def forward(
        self, token_ids: Tensor, positions: Tensor, mask: Tensor, past: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        """Hidden states [batch, num_tokens, hidden_size] after the final norm, and the cache with these tokens in it.

        `mask` [batch, num_tokens, num_keys] is true where a token may look; the keys are the cache's, then the tokens'.
        """
        rows, turns = F.embedding(token_ids, self.embedding), self.turns[positions]
        kept: Cache = []
        for index, layer in enumerate(self.model.layers):
            rows, pair = layer(rows, turns, mask, None if past is None else past[index])
            kept.append(pair)
        return self.model.norm(rows), kept

    def logits(self, rows: Tensor) -> Tensor:
        """float32 [num_rows, head_size], in the order of `head_ids`."""
        return F.linear(rows, self.head.to(rows.dtype)).float()


def keep_ids(student: nn.Module, ids: npt.NDArray[np.int64]) -> None:
    """Let a student say only these ids of its head; ascending."""
    places = torch.searchsorted(student.head_ids, torch.from_numpy(ids).to(student.head_ids.device))  # type: ignore[arg-type]
    student.head_ids, student.head = student.head_ids[places], student.head[places]  # type: ignore[index]


Packed = list[list[Piece]]
"""Rows of texts that are computed together."""


class LayersCourse:
    """Implements `Course` for a draft with layers as a decoder has them. A batch is some rows of whole texts."""

    def __init__(self, student: Student, texts: Sequence[Text], options: DistillOptions) -> None:
        self._student = student
        self._options = options
        self._texts = [text for text in texts if not text.is_held_out]
        self._held_out = [text for text in texts if text.is_held_out]
        self._device = student.head.device

    def epoch(self, number: int) -> list[Packed]:
        options = self._options
        return batches_of_epoch(self._texts, options.row_tokens, options.batch_rows, options.seed, number)

    def held_out(self) -> list[Packed]:
        pieces, positions = [], 0
        for text in self._held_out:
            if positions < TEST_POSITIONS:
                pieces.append(Piece(text))
                positions += text.num_generated
        rows = pack(pieces, self._options.row_tokens)
        return [
            rows[first : first + self._options.batch_rows] for first in range(0, len(rows), self._options.batch_rows)
        ]

    def lessons(self, batch: Packed) -> list[Lesson]:
        """Products in bfloat16, everything else in float32: twice as fast, and the weights themselves stay float32."""
        laid = make_batch(batch, self._options.row_tokens, self._device)
        with torch.autocast(self._device.type, torch.bfloat16):
            hidden, _ = self._student(laid.token_ids, laid.positions, laid.mask)
            logits = self._student.logits(hidden.flatten(0, 1)[laid.chosen])
        table = place_table(self._student.head_ids.cpu().numpy(), self._student.config.vocab_size)
        return [Lesson(logits, expected_in_head(laid.expected, table, self._device))]


def read_frozen(source: ModelSource, head_ids: npt.NDArray[np.int64]) -> Frozen:
    """Embeddings, the output rows of `head_ids` and the rotations of the target."""
    reader, names, config = *_opened(source), source.config
    embedding = reader.tensor(f"{names.embedding}.weight", config.vocab_size, config.hidden_size).float()
    head = embedding if config.tie_word_embeddings else read_output_rows(reader, names, config).float()
    rotations = read_rotations(reader, names, config)
    assert rotations is not None
    ids = torch.from_numpy(head_ids)
    return Frozen(embedding, head[ids].clone(), ids, torch.view_as_real(rotations))


def read_layers(source: ModelSource, layers: Sequence[int]) -> dict[str, Tensor]:
    """Parameters of a student whose layers are these of the target, under the student's names."""
    reader, names, config = *_opened(source), source.config
    size, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors = {"model.norm.weight": reader.tensor(f"{names.final_norm}.weight", size).float()}
    for index, layer in enumerate(layers):
        stored = dict(zip(("q_proj", "k_proj", "v_proj"), names.qkv, strict=True))
        parts = {
            "input_layernorm": (names.attn_norm, (size,)),
            "self_attn.q_proj": (stored["q_proj"], (heads, size)),
            "self_attn.k_proj": (stored["k_proj"], (kv_heads, size)),
            "self_attn.v_proj": (stored["v_proj"], (kv_heads, size)),
            "self_attn.o_proj": (names.attn_out, (size, heads)),
            "post_attention_layernorm": (names.mlp_norm, (size,)),
            "mlp.gate_proj": (names.mlp_in[0], (inner, size)),
            "mlp.up_proj": (names.mlp_in[1], (inner, size)),
            "mlp.down_proj": (names.mlp_out, (size, inner)),
        }
        for name, (theirs, shape) in parts.items():
            tensor = reader.tensor(f"{theirs.format(i=layer)}.weight", *shape).float()
            if name.endswith(("q_proj", "k_proj")):
                tensor = _in_halves(tensor, config, names)
            tensors[f"model.layers.{index}.{name}.weight"] = tensor.clone()
    return tensors


def _in_halves(weight: Tensor, config: ModelConfig, names: WeightNames) -> Tensor:
    """Rows of q or k from the order they are stored in to Hugging Face's."""
    if not names.interleaved:
        return weight
    heads = weight.view(-1, config.head_dim // 2, 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def _opened(source: ModelSource) -> tuple[TensorReader, WeightNames]:
    names = weight_names(source.kind, source.config.architecture)
    return open_reader(source, names), names
