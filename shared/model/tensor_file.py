"""A model file or folder, opened, and the checked reading of its tensors by name."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.errors import ModelFormatError
from shared.kernels.packing import Matrix

F32 = npt.NDArray[np.float32]


class TensorFile(Protocol):
    """`shapes` of all tensors; `read` gives one as numbers, `matrix` as it is stored where the kernels know how."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor | F32: ...

    def matrix(self, name: str) -> Matrix | None: ...


class TensorReader:
    """Reads by name and expected shape; `prefix` may or may not stand before the names in the file."""

    def __init__(self, file: TensorFile, prefix: str) -> None:
        self._file = file
        self._prefix = prefix

    def has(self, name: str) -> bool:
        return self._stored_name(name) in self._file.shapes

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Values in their stored dtype, float32 if quantised. Raises ModelFormatError naming file and tensor."""
        return torch.as_tensor(self._file.read(self._checked(name, shape)))

    def floats(self, name: str, *shape: int) -> F32:
        """float32 values. Raises ModelFormatError naming file and tensor."""
        values: F32 = self.tensor(name, *shape).float().numpy()
        return values

    def matrix(self, name: str, *shape: int) -> Matrix | None:
        """The tensor as stored, or None when that is not a form the kernels know."""
        return self._file.matrix(self._checked(name, shape))

    def _checked(self, name: str, shape: tuple[int, ...]) -> str:
        name = self._stored_name(name)
        found = self._file.shapes.get(name)
        if found is None:
            raise ModelFormatError(f"{self._file.path}: the tensor {name!r} is missing.")
        if found != shape:
            raise ModelFormatError(
                f"{self._file.path}: the tensor {name!r} has shape {found}, but the configuration asks for {shape}."
            )
        return name

    def _stored_name(self, name: str) -> str:
        return name if name in self._file.shapes else self._prefix + name
