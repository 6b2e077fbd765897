"""How each kind of model source is read, and `load`, which turns a source into a decoder."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from shared.errors import ConfigurationError, ModelFormatError
from shared.kernels.library import Isa, Library
from shared.kv.layout import KVLayout
from shared.model.decoder import Decoder
from shared.model.native import KV_DTYPES, NativeDecoder
from shared.model.native_weights import NativeLoader
from shared.model.source import ModelSource
from shared.model.tensor_file import TensorFile, TensorReader
from shared.model.weight_names import WeightNames, weight_names
from shared.model.weights import WeightLoader, read_rotations

TENSOR_FILES: dict[str, str] = {
    "hf": "shared.model.safetensors:SafetensorsFolder",
    "gguf": "shared.model.gguf:GGUFFile",
}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ROW_PAD = 4
"""Rows every product is padded to, so that each goes through the same inner loop (measured: engine-rules.md)."""


def load(
    source: ModelSource,
    device: str,
    dtype: str,
    progress: Callable[[float], None] = lambda _: None,
    *,
    row_pad: int = ROW_PAD,
) -> Decoder:
    """Read the weights, dequantised to `dtype`, onto `device`. Blocking; calls `progress` with rising shares up to 1.

    Raises ModelFormatError naming the file and tensor at fault, ConfigurationError for an unknown dtype or device.
    """
    if dtype not in _DTYPES:
        raise ConfigurationError(f"dtype {dtype!r} is not known; known are {', '.join(_DTYPES)}.")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ConfigurationError(f"device {device!r} is not known; use cpu or cuda.") from error
    names = weight_names(source.kind, source.config.architecture)
    loader = WeightLoader(open_reader(source, names), names, source.config, target, _DTYPES[dtype])
    with torch.inference_mode():
        weights = loader.load(progress)
    return Decoder(source.config, weights, row_pad=row_pad)


def load_native(
    source: ModelSource,
    library: Library,
    layout: KVLayout,
    threads: int,
    *,
    quantization: str | None = None,
    isa: Isa | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> NativeDecoder:
    """Pack the weights for the CPU kernels. Blocking; raises as `load`. Ask `why_not` first."""
    names, config = weight_names(source.kind, source.config.architecture), source.config
    reader = open_reader(source, names)
    rotations = read_rotations(reader, names, config)
    turns = None if rotations is None else torch.view_as_real(rotations).numpy()
    loader = NativeLoader(reader, names, config, quantization)
    weights = loader.load(layout.block_size, KV_DTYPES[layout.dtype], turns, progress)
    return NativeDecoder(config, weights, library, threads, library.best_isa if isa is None else isa)


def open_reader(source: ModelSource, names: WeightNames) -> TensorReader:
    """The source's tensors by the names its family gives them. Raises ModelFormatError."""
    file, prefix = open_tensors(source), names.optional_prefix
    return TensorReader(file, prefix if f"{prefix}{names.embedding}.weight" in file.shapes else "")


def open_tensors(source: ModelSource) -> TensorFile:
    """The source's tensors, index checked, data not read. Raises ModelFormatError."""
    if source.kind not in TENSOR_FILES:
        raise ModelFormatError(f"{source.kind!r} is not a kind of model; known are {', '.join(TENSOR_FILES)}.")
    module, _, name = TENSOR_FILES[source.kind].partition(":")
    file: TensorFile = getattr(importlib.import_module(module), name)(source.path)
    return file
