"""A draft model: a few layers between its target's own embedding and some of its output rows.

`slipstream distill` writes the folder: `config.json` in Llama's form with a key of its own, and the tensors of the
layers, the final norm and `head_ids`, the token of each logit. What is the target's is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from shared.errors import ConfigurationError, ModelFormatError
from shared.kernels.library import CModel, Library
from shared.kernels.packing import Matrix
from shared.kv.layout import KVLayout
from shared.model.config import ModelConfig
from shared.model.hf_config import from_hf
from shared.model.native import KV_DTYPES, NativeDecoder
from shared.model.native_weights import NativeLoader, NativeWeights
from shared.model.registry import open_reader
from shared.model.safetensors import SafetensorsFolder
from shared.model.source import ModelSource, read_json
from shared.model.tensor_file import TensorReader
from shared.model.weight_names import WeightNames, weight_names
from shared.model.weights import read_rotations

KEY = "slipstream_draft"
FORMAT_VERSION = 1
HEAD_IDS = "head_ids"

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DraftSource:
    """A draft's folder, checked against the target it was made for; `head_ids` ascend."""

    path: Path
    config: ModelConfig
    names: WeightNames
    reader: TensorReader
    head_ids: Int32


def resolve_draft(path: Path, target: ModelSource) -> DraftSource:
    """Raises ModelFormatError for a folder that is no draft, ConfigurationError for another target's."""
    content = read_json(path / "config.json")
    about = content.get(KEY)
    if not isinstance(about, dict) or about.get("version") != FORMAT_VERSION:
        raise ModelFormatError(f"{path}: config.json has no {KEY!r} of version {FORMAT_VERSION}: this is not a draft.")
    if about.get("target_sha256") != target.revision:
        raise ConfigurationError(
            f"the draft {path} was made for another model than {target.name}; make one with `slipstream distill`."
        )
    config = from_hf(content)
    _check(path, config, target.config)
    file, names = SafetensorsFolder(path), weight_names("hf", config.architecture)
    head_ids = _head_ids(file, path)
    if (
        not len(head_ids)
        or head_ids[0] < 0
        or head_ids[-1] >= target.config.vocab_size
        or (np.diff(head_ids) <= 0).any()
    ):
        raise ModelFormatError(f"{path}: {HEAD_IDS} must ascend within the target's vocabulary.")
    return DraftSource(path, config, names, TensorReader(file, names.optional_prefix), head_ids)


def load_native_draft(
    draft: DraftSource, target: ModelSource, decoder: NativeDecoder, library: Library, layout: KVLayout, threads: int
) -> NativeDecoder:
    """The draft on the CPU kernels, its weights in 8 bits, its embedding the target's in memory."""
    names = weight_names(target.kind, target.config.architecture)
    reader = open_reader(target, names)
    rotations = read_rotations(reader, names, target.config)
    turns = None if rotations is None else torch.view_as_real(rotations).numpy()
    head = NativeLoader(reader, names, target.config, None).output_rows().rows(draft.head_ids.astype(np.int64))
    loader = _DraftLoader(draft, decoder.weights, head)
    weights = loader.load(layout.block_size, KV_DTYPES[layout.dtype], turns, lambda _: None)
    return NativeDecoder(draft.config, weights, library, threads, decoder.isa)


class _DraftLoader(NativeLoader):
    def __init__(self, draft: DraftSource, target: NativeWeights, head: Matrix) -> None:
        super().__init__(draft.reader, draft.names, draft.config, "int8")
        self._target, self._head, self._head_ids = target, head, draft.head_ids

    def _ends(self, model: CModel) -> None:
        model.embedding = self._target.model.embedding
        model.lm_head = self._place(self._head)
        model.head_ids = self._keep_ids(self._head_ids)
        model.vocab_size = len(self._head_ids)
        self._owners.append(self._target)


def _head_ids(file: SafetensorsFolder, path: Path) -> Int32:
    if len(file.shapes.get(HEAD_IDS, ())) != 1:
        raise ModelFormatError(f"{path}: the tensor {HEAD_IDS!r} is missing or not a list of ids.")
    with safe_open(path / "model.safetensors", framework="np") as stored:
        ids: Int32 = stored.get_tensor(HEAD_IDS)
    if ids.dtype != np.int32:
        raise ModelFormatError(f"{path}: {HEAD_IDS} must be 32-bit integers, not {ids.dtype}.")
    return np.ascontiguousarray(ids)


def _check(path: Path, draft: ModelConfig, target: ModelConfig) -> None:
    """What the two share in memory must have one shape."""
    for name in ("hidden_size", "head_dim", "vocab_size", "max_position", "rope_theta", "rope_scaling"):
        if getattr(draft, name) != getattr(target, name):
            raise ModelFormatError(
                f"{path}: {name} is {getattr(draft, name)}, the target's {getattr(target, name)}; make the draft again."
            )
