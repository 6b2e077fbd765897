"""Drafts computed by torch, on any device: for targets that torch computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.model.decoder import Decoder, DecoderWeights
from shared.model.draft import FUSE, DraftSource
from shared.model.layers import FeedForward, LinearMap, Norm, make_linear
from shared.model.registry import open_reader
from shared.model.source import ModelSource
from shared.model.weight_names import weight_names
from shared.model.weights import WeightLoader, read_output_rows


@dataclass(frozen=True, slots=True)
class HeadsLayer:
    """A layer without attention."""

    mlp_norm: Norm
    mlp: FeedForward


@dataclass(frozen=True, slots=True)
class TorchHeads:
    """Heads as `shared.distill.heads.Heads` trains them, on the target's device and in its dtype."""

    embedding: Tensor  # [vocab_size, hidden_size], the target's
    fuse: LinearMap
    layers: tuple[HeadsLayer, ...]
    final_norm: Norm
    lm_head: LinearMap

    @torch.inference_mode()
    def forward(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """Rows [n, hidden_size] behind these tokens [n], from the rows before them, of the target or of the heads.

        Raises ValueError for rows of another width.
        """
        if states.shape[1:] != self.embedding.shape[1:]:
            raise ValueError(f"states are {tuple(states.shape)}, not rows of the model's width")
        rows = self.fuse(torch.cat([states.to(self.embedding.dtype), F.embedding(token_ids, self.embedding)], -1))
        for layer in self.layers:
            rows = rows + layer.mlp(layer.mlp_norm(rows))
        return self.final_norm(rows)

    @torch.inference_mode()
    def logits(self, rows: Tensor) -> Tensor:
        """float32 [n, len(head_ids)]."""
        return self.lm_head(rows).float()


def load_torch_layers(draft: DraftSource, source: ModelSource, target: Decoder) -> Decoder:
    """A draft of layers; its first ones, the embedding and the rotations are the target's own tensors."""
    weights = _loader(draft, target).layers_behind(target.weights, draft.exit_layer, _head(draft, source, target))
    return Decoder(draft.config, weights, row_pad=target.row_pad)


def load_torch_heads(draft: DraftSource, source: ModelSource, target: Decoder) -> TorchHeads:
    """Heads on the rows of a target; the embedding is its own tensor."""
    return _loader(draft, target).heads(target.weights, _head(draft, source, target))


class _DraftLoader(WeightLoader):
    def layers_behind(self, target: DecoderWeights, exit_layer: int, head: LinearMap) -> DecoderWeights:
        own = [self._layer(index) for index in range(self._config.num_layers)]
        layers = (*target.layers[:exit_layer], *own)
        return DecoderWeights(
            target.embedding, target.positions, target.rotations, layers, self._final_norm(), lm_head=head
        )

    def heads(self, target: DecoderWeights, head: LinearMap) -> TorchHeads:
        size = self._config.hidden_size
        layers = tuple(
            HeadsLayer(self._norm(self._names.mlp_norm.format(i=index), size), self._mlp(index))
            for index in range(self._config.num_layers)
        )
        fuse = self._linear(*self._matrix(FUSE, size, 2 * size, has_bias=False))
        return TorchHeads(target.embedding, fuse, layers, self._final_norm(), head)


def _loader(draft: DraftSource, target: Decoder) -> _DraftLoader:
    return _DraftLoader(draft.reader, draft.names, draft.config, target.device, target.dtype)


def _head(draft: DraftSource, source: ModelSource, target: Decoder) -> LinearMap:
    """The target's output rows for the tokens that the draft can say."""
    names = weight_names(source.kind, source.config.architecture)
    rows = read_output_rows(open_reader(source, names), names, source.config)
    chosen = rows[torch.from_numpy(draft.head_ids).long()]
    return make_linear(chosen.to(target.device, target.dtype).contiguous(), None)
