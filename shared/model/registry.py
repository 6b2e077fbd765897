"""How each kind of model source is read, and `load`, which turns a source into a decoder."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from shared.errors import ConfigurationError, ModelFormatError
from shared.model.decoder import Decoder
from shared.model.source import ModelSource
from shared.model.weight_names import weight_names
from shared.model.weights import TensorFile, WeightLoader

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
    loader = WeightLoader(open_tensors(source), names, source.config, target, _DTYPES[dtype])
    with torch.inference_mode():
        weights = loader.load(progress)
    return Decoder(source.config, weights, row_pad=row_pad)


def open_tensors(source: ModelSource) -> TensorFile:
    """The source's tensors, index checked, data not read. Raises ModelFormatError."""
    if source.kind not in TENSOR_FILES:
        raise ModelFormatError(f"{source.kind!r} is not a kind of model; known are {', '.join(TENSOR_FILES)}.")
    module, _, name = TENSOR_FILES[source.kind].partition(":")
    file: TensorFile = getattr(importlib.import_module(module), name)(source.path)
    return file
