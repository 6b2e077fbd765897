"""From settings to a running engine: load the model, size the KV cache, check the promise of equal tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import structlog
import torch

from shared.config import EngineSettings, SpeculationSettings
from shared.engine.calibration import NUM_POSITIONS
from shared.engine.engine import Engine
from shared.engine.scheduler import SchedulerLimits
from shared.engine.speculation import Speculation
from shared.errors import ConfigurationError
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.model.invariance import ProbeResult, numerics_fingerprint, probe
from shared.model.language_model import LanguageModel
from shared.model.source import ModelSource
from shared.speculative.context import ProposerContext
from shared.speculative.drafts import find_draft
from shared.speculative.registry import load_proposer
from shared.worker.kernels import choose_kernels, make_runner

log = structlog.get_logger()

_DEFAULT_CONTEXTS = 2
_MEMORY_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine with everything its service has to know about it."""

    engine: Engine
    cache: KVCache
    layout: KVLayout
    numerics: str
    max_model_len: int
    invariance: ProbeResult
    source: ModelSource

    @property
    def max_request_tokens(self) -> int:
        """Longest prompt + output this worker can hold."""
        return min(self.max_model_len, self.engine.max_request_tokens)


def build_engine(
    source: ModelSource,
    settings: EngineSettings,
    *,
    prefill_share: float,
    shared_cache: bool,
    speculation: SpeculationSettings | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> BuiltEngine:
    """Blocking, up to many seconds. Raises ConfigurationError or ModelFormatError with what to change."""
    threads = num_threads(settings.threads)
    kernels = choose_kernels(source, settings)
    set_torch_threads(threads if kernels.library is None else 1)
    layout = KVLayout(
        num_layers=source.config.num_layers,
        num_kv_heads=source.config.num_kv_heads,
        head_dim=source.config.head_dim,
        block_size=settings.block_size,
        dtype=kernels.cache_dtype(settings),
        k_transposed=kernels.library is not None,
    )
    decoder = kernels.load(source, settings, layout, threads, progress)
    max_model_len = min(settings.max_model_len or source.config.max_position, source.config.max_position)
    num_blocks = 1 + layout.num_blocks(kv_tokens(settings, layout, max_model_len))
    cache = KVCache(layout, num_blocks, settings.device, shared=shared_cache)
    limits = SchedulerLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        enable_chunked_prefill=settings.enable_chunked_prefill,
        prefill_share=prefill_share,
        reserve_blocks=max(1, 32 // settings.block_size),
    )
    runner = make_runner(decoder, cache, settings.device)
    guesses = None
    if speculation is not None:
        draft = find_draft(speculation.draft, source)
        context = ProposerContext(source, decoder, layout, num_blocks, draft)
        guesses = make_speculation(speculation, limits, context)
    engine = Engine(runner, limits, prefix_caching=settings.enable_prefix_caching, speculation=guesses)
    invariance = check_invariance(decoder, layout, settings)
    numerics = numerics_fingerprint(decoder, source, layout.dtype)
    return BuiltEngine(engine, cache, layout, numerics, max_model_len, invariance, source)


def make_speculation(
    settings: SpeculationSettings, limits: SchedulerLimits, context: ProposerContext
) -> Speculation | None:
    """The proposers asked for that have something to work with; None without any. Raises ConfigurationError."""
    if settings.proposers and context.source.config.max_position < NUM_POSITIONS:
        log.info("speculation_off", reason=f"the model has fewer than {NUM_POSITIONS} positions to measure steps with")
        return None
    made = [load_proposer(name, context) for name in settings.proposers]
    proposers = [proposer for proposer in made if proposer is not None]
    if not proposers:
        return None
    log.info("speculation", proposers=[proposer.name for proposer in proposers])
    return Speculation(proposers, {}, limits.max_num_batched_tokens, settings.max_draft_tokens)


def check_invariance(decoder: LanguageModel, layout: KVLayout, settings: EngineSettings) -> ProbeResult:
    """Run the start-up probe on the model's own shapes; where it fails, equality is not promised."""
    if not settings.batch_invariant:
        return ProbeResult(ok=False, detail="batch_invariant is off: tokens may depend on what runs beside them")
    result = probe(decoder, layout)
    if not result.ok:
        log.warning("equal_tokens_not_promised", detail=result.detail)
    return result


def num_threads(threads: int | None) -> int:
    """Compute threads: so many, or one for each core that this process may use."""
    return threads or len(os.sched_getaffinity(0))


def set_torch_threads(count: int) -> None:
    """One where the native kernels compute: torch's own go on spinning for milliseconds after the least operation.

    Clearing a few KV blocks between two steps would take a core from the next ones.
    """
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def kv_tokens(settings: EngineSettings, layout: KVLayout, max_model_len: int) -> int:
    """Tokens of KV room: as set, or two full contexts, bounded by a share of the memory that is free."""
    if settings.kv_cache_tokens is not None:
        return settings.kv_cache_tokens
    if settings.kv_cache_memory is not None:
        return max(layout.block_size, settings.kv_cache_memory // layout.bytes_per_token)
    affordable = int(free_memory(settings.device) * _MEMORY_SHARE) // layout.bytes_per_token
    tokens = min(_DEFAULT_CONTEXTS * max_model_len, affordable)
    if tokens < 4 * layout.block_size:
        raise ConfigurationError(
            f"only {affordable} tokens of KV cache fit into {_MEMORY_SHARE:.0%} of the free memory; "
            "free some, or set SLIPSTREAM_ENGINE__KV_CACHE_MEMORY"
        )
    return tokens


def free_memory(device: str) -> int:
    """Free bytes on the device the cache will live on."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return int(psutil.virtual_memory().available)
