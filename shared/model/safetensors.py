"""Read safetensors folders, trusting nothing in them: names, header and offsets are checked before use.

Other checkpoint formats (.bin, .pt) are pickles, which can run code when loaded; they are refused.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import NoReturn, TypeGuard

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from shared.errors import ModelFormatError
from shared.kernels.packing import Kind, Matrix, dense
from shared.model.source import weight_files

_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 8
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_WEIGHT_DTYPES = ("F32", "F16", "BF16")


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, in one file or several with an index."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        for path, indexed in weight_files(folder).items():
            found = read_tensor_index(path)
            for name in found if indexed is None else indexed:
                if name not in found:
                    raise ModelFormatError(f"{path}: the tensor {name!r} that the index promises is missing.")
                self._dtypes[name], self.shapes[name] = found[name]
                self._file_of[name] = path

    def read(self, name: str) -> Tensor:
        """One tensor as stored (float32, float16 or bfloat16). KeyError if there is none of this name.

        The file is mapped anew for each, so that the pages of those read before do not stay in memory.
        """
        path = self._file_of[name]
        if self._dtypes[name] not in _WEIGHT_DTYPES:
            known = ", ".join(_WEIGHT_DTYPES)
            raise ModelFormatError(f"{path}: tensor {name!r} is {self._dtypes[name]}; weights must be one of {known}.")
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def matrix(self, name: str) -> Matrix | None:
        """A tensor as the kernels can keep it: bfloat16 as it is, anything else as float32."""
        tensor = self.read(name)
        if tensor.dtype == torch.bfloat16:
            return Matrix(Kind.BF16, tensor.view(torch.int16).numpy().view(np.uint16))
        return dense(tensor.float().numpy())


def read_tensor_index(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of one file. Raises ModelFormatError naming the file."""
    return _HeaderReader(path).tensors()


class _HeaderReader:
    """Checks one file's header against the file's size; reads no tensor data."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        header, data_bytes = self._header()
        tensors, spans = {}, []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, begin, end = self._entry(name, entry)
            tensors[name] = (dtype, shape)
            spans.append((begin, end, name))
        reached = 0
        for begin, end, name in sorted(spans):
            if begin != reached or end > data_bytes:
                self._fail(f"places tensor {name!r} at bytes {begin} to {end}: outside the data, overlapping or apart")
            reached = end
        if reached != data_bytes:
            self._fail(f"has {data_bytes} bytes of data, of which its tensors take {reached}")
        return tensors

    def _header(self) -> tuple[dict[str, object], int]:
        """The parsed header and the number of bytes after it."""
        try:
            size = self._path.stat().st_size
            with self._path.open("rb") as file:
                prefix = file.read(8)
                length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
                if length > min(_MAX_HEADER_BYTES, size - 8):
                    self._fail(f"claims a header of {length} bytes in a file of {size}")
                header = json.loads(file.read(length), object_pairs_hook=self._unique_keys)
        except OSError as error:
            raise ModelFormatError(f"{self._path}: cannot be read: {error}.") from error
        except (ValueError, RecursionError) as error:
            self._fail(f"has a header that is not JSON ({error})")
        if not isinstance(header, dict):
            self._fail("has a header that is not a JSON object")
        return header, size - 8 - length

    def _unique_keys(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        unique = dict(pairs)
        if len(unique) != len(pairs):
            self._fail("names a tensor or a field twice")
        return unique

    def _entry(self, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
            self._fail(f"stores tensor {name!r} as {dtype!r:.200}; known are {', '.join(_DTYPE_BYTES)}")
        if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
            self._fail(f"gives tensor {name!r} the shape {shape!r:.200}")
        if not _are_sizes(offsets) or len(offsets) != 2:
            self._fail(f"gives tensor {name!r} the offsets {offsets!r:.200}")
        begin, end = offsets
        if end - begin != math.prod(shape) * _DTYPE_BYTES[dtype]:
            self._fail(f"gives tensor {name!r} {end - begin} bytes, which do not fit its shape {shape}")
        return dtype, tuple(shape), begin, end

    def _fail(self, problem: str) -> NoReturn:
        raise ModelFormatError(f"{self._path}: the file {problem}. It is damaged or unfinished; fetch it again.")


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
