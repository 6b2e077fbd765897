"""Drafts on the CPU kernels: their own weights in few bits, the target's embedding where it lies in memory."""

from __future__ import annotations

import numpy as np
import torch

from shared.kernels.library import CLayer, CModel, Library
from shared.kernels.packing import Matrix
from shared.kv.layout import KVLayout
from shared.model.draft import FUSE, DraftSource
from shared.model.native import KV_DTYPES, NativeDecoder
from shared.model.native_heads import NativeHeads
from shared.model.native_weights import NativeLoader, NativeWeights
from shared.model.registry import open_reader
from shared.model.source import ModelSource
from shared.model.weight_names import weight_names
from shared.model.weights import read_rotations


def load_native_layers(
    draft: DraftSource, target: ModelSource, decoder: NativeDecoder, library: Library, layout: KVLayout, threads: int
) -> NativeDecoder:
    """A draft of layers as a decoder; its first ones and the embedding are the target's."""
    weights = _load(_DraftLoader, draft, target, decoder, layout)
    return NativeDecoder(draft.config, weights, library, threads, decoder.isa)


def load_native_heads(
    draft: DraftSource, target: ModelSource, decoder: NativeDecoder, library: Library, layout: KVLayout, threads: int
) -> NativeHeads:
    """Heads on the target's rows; they have no cache."""
    weights = _load(_HeadsLoader, draft, target, decoder, layout)
    return NativeHeads(draft.config, weights, library, threads, decoder.isa)


def _load(
    kind: type[_DraftLoader], draft: DraftSource, target: ModelSource, decoder: NativeDecoder, layout: KVLayout
) -> NativeWeights:
    names = weight_names(target.kind, target.config.architecture)
    reader = open_reader(target, names)
    rotations = read_rotations(reader, names, target.config)
    turns = None if rotations is None else torch.view_as_real(rotations).numpy()
    head = NativeLoader(reader, names, target.config, None).output_rows().rows(draft.head_ids.astype(np.int64))
    loader = kind(draft, decoder.weights, head)
    return loader.load(layout.block_size, KV_DTYPES[layout.dtype], turns, lambda _: None)


class _DraftLoader(NativeLoader):
    def __init__(self, draft: DraftSource, target: NativeWeights, head: Matrix) -> None:
        super().__init__(draft.reader, draft.names, draft.config, "int8")
        self._target, self._head, self._head_ids = target, head, draft.head_ids
        self._exit_layer = draft.exit_layer

    def _ends(self, model: CModel) -> None:
        model.embedding = self._target.model.embedding
        model.lm_head = self._place(self._head)
        model.head_ids = self._keep_ids(self._head_ids)
        model.vocab_size = len(self._head_ids)
        self._go_on_from_the_target(model)
        self._owners.append(self._target)

    def _go_on_from_the_target(self, model: CModel) -> None:
        """Put the target's first layers before the draft's own."""
        own = [model.layers[index] for index in range(model.num_layers)]
        layers = (CLayer * (self._exit_layer + len(own)))(*self._target.model.layers[: self._exit_layer], *own)
        self._owners += [model.layers, layers]
        model.layers, model.num_layers = layers, len(layers)


class _HeadsLoader(_DraftLoader):
    def _layer(self, layer: CLayer, index: int) -> None:
        layer.mlp_norm = self._norm(self._names.mlp_norm.format(i=index))
        self._feed_forward(layer, index)

    def _ends(self, model: CModel) -> None:
        super()._ends(model)
        size = self._config.hidden_size
        model.fuse = self._place(self._matrix(FUSE, size, 2 * size, transposed=False))
