"""Decoders on the CPU kernels, from small random checkpoints and with the instruction set and threads a test wants."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.kernels.library import Isa, Library, load_library
from shared.kv.layout import KVLayout
from shared.model.native import NativeDecoder
from shared.model.native_support import why_not
from shared.model.registry import load_native
from shared.model.source import ModelSource, resolve


def library() -> Library:
    """The compiled kernels; a machine without a compiler skips what tests them, and says so."""
    found = load_library()
    if found is None:
        pytest.skip("the native kernels were not built here")
    return found


def isas() -> list[Isa]:
    """Instruction sets this processor runs; at least the plain loops."""
    found = load_library()
    return [isa for isa in Isa if found is not None and isa <= found.best_isa] or [Isa.SCALAR]


def native(
    source: ModelSource | Path,
    *,
    isa: Isa | None = None,
    threads: int = 1,
    kv_dtype: str = "float32",
    quantization: str | None = None,
    block_size: int = 16,
) -> NativeDecoder:
    """A checkpoint folder, file or source on the kernels."""
    found = source if isinstance(source, ModelSource) else resolve(str(source))
    config = found.config
    assert why_not(found, block_size) == ""
    layout = KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_size, kv_dtype, k_transposed=True)
    return load_native(found, library(), layout, threads, quantization=quantization, isa=isa)
