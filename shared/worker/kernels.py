"""Which code computes the model: the native CPU kernels where they can, plain torch everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from shared.config import EngineSettings
from shared.cores import core_share
from shared.engine.runner import NativeRunner, Runner, TorchRunner
from shared.errors import ConfigurationError
from shared.kernels.library import Library, load_library
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.model.language_model import LanguageModel
from shared.model.native import NativeDecoder
from shared.model.native_support import why_not
from shared.model.registry import ROW_PAD, load, load_native
from shared.model.source import ModelSource

log = structlog.get_logger()

_NATIVE_CACHES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True, slots=True)
class Kernels:
    """The choice for one model: the native library, or None for torch."""

    library: Library | None

    def cache_dtype(self, settings: EngineSettings) -> str:
        """`kv_cache_dtype` with auto resolved: half the bytes where the kernels read them, else what is computed in."""
        if self.library is not None and settings.kv_cache_dtype == "auto":
            return "bfloat16"
        return settings.cache_dtype

    def load(
        self,
        source: ModelSource,
        settings: EngineSettings,
        layout: KVLayout,
        threads: int,
        progress: Callable[[float], None],
    ) -> LanguageModel:
        """Read the weights. Raises ModelFormatError or ConfigurationError."""
        if self.library is None:
            row_pad = ROW_PAD if settings.batch_invariant else 1
            return load(source, settings.device, settings.compute_dtype, progress, row_pad=row_pad)
        return load_native(source, self.library, layout, threads, quantization=settings.quantization, progress=progress)


def choose_kernels(source: ModelSource, settings: EngineSettings) -> Kernels:
    """Follow `kernels`, and say what was chosen and why. ConfigurationError where native was asked for in vain."""
    library = load_library() if settings.kernels != "torch" else None
    reason = _reason(source, settings, library)
    if reason and settings.kernels == "native":
        raise ConfigurationError(f"the native kernels cannot serve this model: {reason}. Set --kernels torch or auto.")
    if reason and settings.quantization:
        raise ConfigurationError(f"--quantization needs the native kernels, and {reason}.")
    if reason and settings.kv_cache_dtype == "int8":
        raise ConfigurationError(f"--kv-cache-dtype int8 needs the native kernels, and {reason}.")
    if reason:
        log.info("kernels_chosen", kernels="torch", reason=reason)
        return Kernels(None)
    assert library is not None
    log.info("kernels_chosen", kernels="native", isa=library.best_isa.name.lower())
    return Kernels(library)


def make_runner(model: LanguageModel, cache: KVCache, device: str) -> Runner:
    """The runner for how a model was loaded; the kernels share the cores with other workers of this machine."""
    if isinstance(model, NativeDecoder):
        return NativeRunner(model, cache, core_share())
    return TorchRunner(model, cache, device)


def _reason(source: ModelSource, settings: EngineSettings, library: Library | None) -> str:
    """Why torch computes, as a clause; empty when the native kernels do."""
    if settings.kernels == "torch":
        return "torch was asked for"
    if settings.device != "cpu":
        return f"they run on a CPU, not on {settings.device}"
    if library is None:
        return "they were not built: install Slipstream where there is a C++ compiler"
    if settings.dtype not in ("auto", "float32"):
        return f"they compute in float32, not in {settings.dtype}"
    if settings.kv_cache_dtype not in ("auto", *_NATIVE_CACHES):
        return f"they keep K and V as {', '.join(_NATIVE_CACHES)}, not as {settings.kv_cache_dtype}"
    return why_not(source, settings.block_size)
