"""Read GGUF files, trusting nothing in them: every count, length and offset is checked before it is used.

Parsers of this format have been attacked through overflowing counts and offsets outside the file
(CVE-2025-53630, CVE-2026-27940, CVE-2026-7482), so sizes are compared with what the file still holds before anything
is allocated. The layout is the GGUF specification's (ggml-org/ggml, docs/gguf.md). Imports no torch.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from shared.errors import ModelFormatError
from shared.kernels.gguf_blocks import from_gguf
from shared.kernels.packing import Matrix

_MAGIC = b"GGUF"
_MAX_HEADER_BYTES = 256 << 20  # its lists take ten times that in memory; large vocabularies need a tenth of it
_VERSIONS = (2, 3)
_MAX_KEY_BYTES = 65_535
_MAX_ARRAY_DEPTH = 2
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20
_MIN_PAIR_BYTES = 8 + 4 + 1  # empty key, value type, one byte of value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # empty name, dimension count, one dimension, type, offset

_TYPE_BOOL, _TYPE_STRING, _TYPE_ARRAY = 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class TensorType:
    """A storage type: `block_bytes` bytes hold `block_size` values."""

    name: str
    block_size: int
    block_bytes: int


TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    12: TensorType("Q4_K", 256, 144),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `shape` outermost dimension first (numpy's order), `start` bytes into the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """Everything before the tensor data; `num_bytes` is where it ends."""

    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]
    num_bytes: int


def read_metadata(path: str | Path) -> dict[str, object]:
    """The metadata of a GGUF file: numbers, strings and lists of them. Raises ModelFormatError naming the file."""
    return read_header(path).metadata


def read_header(path: str | Path) -> Header:
    """Metadata and tensor index, checked against the file's size. Raises ModelFormatError naming the file."""
    path = Path(path)
    with _mapped(path) as data:
        return _HeaderReader(path, data).header()


class GGUFFile:
    """An open GGUF file; tensors are dequantised one at a time, straight from the mapping."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._data = _mapped(self.path)
        self.header = _HeaderReader(self.path, self._data).header()
        self.shapes = {name: info.shape for name, info in self.header.tensors.items()}

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor as float32 in its own memory. KeyError if there is none of this name."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        info, raw = self.header.tensors[name], self._raw(name)
        if TENSOR_TYPES[info.type_id].name == "F32":
            return raw.view("<f4").reshape(info.shape).astype(np.float32)
        if TENSOR_TYPES[info.type_id].name == "F16":
            return raw.view("<f2").reshape(info.shape).astype(np.float32)
        rows = raw.reshape(*info.shape[:-1], -1)
        return np.ascontiguousarray(dequantize(rows, GGMLQuantizationType(info.type_id)), dtype=np.float32)

    def matrix(self, name: str) -> Matrix | None:
        """A matrix as it is stored, quants and scales apart. KeyError if there is none of this name."""
        info = self.header.tensors[name]
        return from_gguf(TENSOR_TYPES[info.type_id].name, self._raw(name), info.shape) if len(info.shape) == 2 else None

    def _raw(self, name: str) -> npt.NDArray[np.uint8]:
        """A view into the mapping. Pages read before are let go: kept, they would double the memory of loading."""
        info = self.header.tensors[name]
        self._data.madvise(mmap.MADV_DONTNEED)
        return np.frombuffer(self._data, dtype=np.uint8, count=info.num_bytes, offset=info.start)


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"{path}: cannot be read as a GGUF file: {error}.") from error


class _HeaderReader:
    """A cursor over the header that never moves past the end of the file, nor past what a header may take."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._end = min(len(data), _MAX_HEADER_BYTES)
        self._at = 0

    def header(self) -> Header:
        if self._take(4) != _MAGIC:
            self._fail("does not start with the letters GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            self._fail(f"has GGUF version {version}; versions 2 and 3, little-endian, can be read")
        num_tensors, num_pairs = self._number("Q"), self._number("Q")
        self._require(num_pairs, _MIN_PAIR_BYTES, "metadata entries")
        metadata = self._metadata(num_pairs)
        self._require(num_tensors, _MIN_TENSOR_BYTES, "tensors")
        raw_tensors = [self._tensor_info() for _ in range(num_tensors)]
        num_bytes = self._at
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            self._fail(f"has general.alignment {alignment!r}; it must be a power of two up to {_MAX_ALIGNMENT}")
        data_start = -(-num_bytes // alignment) * alignment
        return Header(metadata, self._placed(raw_tensors, data_start, alignment), num_bytes)

    def _metadata(self, num_pairs: int) -> dict[str, object]:
        metadata: dict[str, object] = {}
        for _ in range(num_pairs):
            key = self._string(_MAX_KEY_BYTES)
            if key in metadata:
                self._fail(f"has the metadata key {key!r} twice")
            metadata[key] = self._value(self._number("I"), _MAX_ARRAY_DEPTH)
        return metadata

    def _value(self, type_id: int, depth: int) -> object:
        if type_id in _SCALARS:
            return self._scalar(_SCALARS[type_id])
        if type_id == _TYPE_BOOL:
            return self._number("B") != 0
        if type_id == _TYPE_STRING:
            return self._string()
        if type_id != _TYPE_ARRAY:
            self._fail(f"has a metadata value of unknown type {type_id}")
        if depth == 0:
            self._fail("has metadata arrays nested too deeply")
        return self._array(self._number("I"), self._number("Q"), depth - 1)

    def _array(self, type_id: int, length: int, depth: int) -> list[object]:
        if type_id in _SCALARS:
            code = _SCALARS[type_id]
            self._require(length, struct.calcsize(code), "array items")
            return list(struct.unpack(f"<{length}{code}", self._take(length * struct.calcsize(code))))
        self._require(length, {_TYPE_BOOL: 1, _TYPE_STRING: 8}.get(type_id, 12), "array items")
        if type_id == _TYPE_STRING:
            return self._strings(length)
        return [self._value(type_id, depth) for _ in range(length)]

    def _strings(self, count: int) -> list[object]:
        """Many strings at once, with as little work per string as possible: vocabularies are large."""
        data, at, size = self._data, self._at, self._end
        unpack, strings = struct.Struct("<Q").unpack_from, []
        try:
            for _ in range(count):
                start = at + 8
                at = start + (unpack(data, at)[0] if start <= size else size)
                if at > size:
                    self._fail("ends inside a string")
                strings.append(data[start:at].decode())
        except UnicodeDecodeError:
            self._fail("holds a string that is not UTF-8")
        self._at = at
        return list(strings)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(_MAX_KEY_BYTES)
        num_dimensions = self._number("I")
        if not 0 < num_dimensions <= _MAX_DIMENSIONS:
            self._fail(f"gives tensor {name!r} {num_dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are allowed")
        innermost_first = tuple(self._number("Q") for _ in range(num_dimensions))
        return name, innermost_first[::-1], self._number("I"), self._number("Q")

    def _placed(
        self, raw: list[tuple[str, tuple[int, ...], int, int]], data_start: int, alignment: int
    ) -> dict[str, TensorInfo]:
        """Check that every tensor lies inside the file and no two share bytes."""
        tensors: dict[str, TensorInfo] = {}
        for name, shape, type_id, offset in raw:
            if name in tensors:
                self._fail(f"has the tensor {name!r} twice")
            num_bytes = self._tensor_bytes(name, shape, type_id)
            if offset % alignment or offset + num_bytes > len(self._data) - data_start:
                self._fail(f"places tensor {name!r} at offset {offset}, outside the file or misaligned")
            tensors[name] = TensorInfo(name, shape, type_id, data_start + offset, num_bytes)
        end = data_start
        for info in sorted(tensors.values(), key=lambda tensor: tensor.start):
            if info.start < end:
                self._fail(f"places tensor {info.name!r} over another one")
            end = info.start + info.num_bytes
        return tensors

    def _tensor_bytes(self, name: str, shape: tuple[int, ...], type_id: int) -> int:
        kind = TENSOR_TYPES.get(type_id)
        if kind is None:
            supported = ", ".join(tensor_type.name for tensor_type in TENSOR_TYPES.values())
            self._fail(f"stores tensor {name!r} as type {type_id}; supported are {supported}")
        count = 1
        for dimension in shape:
            count *= dimension
        if count == 0 or shape[-1] % kind.block_size:
            self._fail(f"gives tensor {name!r} the shape {shape}, which {kind.name} cannot hold")
        return count // kind.block_size * kind.block_bytes

    def _require(self, count: int, item_bytes: int, what: str) -> None:
        if count * item_bytes > self._end - self._at:
            self._fail(f"claims {count} {what}, more than the file can hold")

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > self._end - self._at:
            self._fail("ends too early")
        self._at += num_bytes
        return self._data[self._at - num_bytes : self._at]

    def _scalar(self, code: str) -> int | float:
        value: int | float = struct.unpack("<" + code, self._take(struct.calcsize(code)))[0]
        return value

    def _number(self, code: str) -> int:
        return int(self._scalar(code))

    def _string(self, max_bytes: int | None = None) -> str:
        length = self._number("Q")
        if max_bytes is not None and length > max_bytes:
            self._fail(f"has a name of {length} bytes; {max_bytes} are allowed")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            self._fail("holds a string that is not UTF-8")

    def _fail(self, problem: str) -> NoReturn:
        raise ModelFormatError(f"{self._path}: the file {problem}. It is damaged or not a GGUF file; fetch it again.")
