"""Sizing the KV cache, and an engine built from a real folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.config import EngineSettings, SpeculationSettings
from shared.engine.calibration import NUM_POSITIONS
from shared.engine.runner import NativeRunner
from shared.errors import ConfigurationError
from shared.kv.layout import KVLayout
from shared.model.source import ModelSource, resolve
from shared.worker import build
from shared.worker.build import BuiltEngine, build_engine, kv_tokens, num_threads
from tests.engine_fakes import make_sequence, output_of, run_to_end
from tests.model_checkpoints import random_model
from tests.native_models import library
from tests.tiny_model import CONTEXT, HEAD_DIM, KV_HEADS, LAYERS, NAME, write_tiny_model

LAYOUT = KVLayout(LAYERS, KV_HEADS, HEAD_DIM, 16)


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    """The number of threads belongs to the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve(str(write_tiny_model(tmp_path_factory.mktemp("build") / NAME)))


def memory_is(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(build, "free_memory", lambda device: num_bytes)


def build_small(source: ModelSource, **settings: object) -> BuiltEngine:
    chosen = EngineSettings(**({"kv_cache_tokens": 256, "threads": 1} | settings))
    return build_engine(source, chosen, prefill_share=1.0, shared_cache=False)


# --- KV room ----------------------------------------------------------------------------------------------------------


def test_tokens_win_over_bytes() -> None:
    settings = EngineSettings(kv_cache_tokens=999, kv_cache_memory=1 << 30)
    assert kv_tokens(settings, LAYOUT, 1024) == 999


def test_bytes_are_what_the_tokens_take() -> None:
    assert kv_tokens(EngineSettings(kv_cache_memory=1 << 20), LAYOUT, 1024) == (1 << 20) // LAYOUT.bytes_per_token


def test_bytes_below_a_block_still_make_a_block() -> None:
    huge = KVLayout(80, 64, 256, 16)
    assert kv_tokens(EngineSettings(kv_cache_memory=1 << 20), huge, 1024) == 16


def test_by_default_two_full_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    memory_is(monkeypatch, 1 << 40)
    assert kv_tokens(EngineSettings(), LAYOUT, 1024) == 2048


def test_the_default_takes_a_share_of_the_free_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    memory_is(monkeypatch, 1000 * LAYOUT.bytes_per_token)
    assert kv_tokens(EngineSettings(), LAYOUT, 1024) == 300


def test_too_little_memory_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    memory_is(monkeypatch, 200 * LAYOUT.bytes_per_token)
    with pytest.raises(ConfigurationError, match=r"only 60 tokens .* 30% .* SLIPSTREAM_ENGINE__KV_CACHE_MEMORY"):
        kv_tokens(EngineSettings(), LAYOUT, 1024)


def test_a_set_size_is_not_second_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    memory_is(monkeypatch, 0)
    assert kv_tokens(EngineSettings(kv_cache_tokens=512), LAYOUT, 1024) == 512


def test_free_memory_is_the_machines() -> None:
    assert 1 << 20 < build.free_memory("cpu") < 1 << 50


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_computes_with_the_threads_that_were_set(source: ModelSource, threads: int) -> None:
    settings = EngineSettings(kv_cache_tokens=250, threads=threads, kernels="torch")
    build_engine(source, settings, prefill_share=1.0, shared_cache=False)
    assert torch.get_num_threads() == threads


def test_torch_keeps_to_one_thread_where_the_kernels_compute(tmp_path: Path) -> None:
    library()
    random_model("LlamaForCausalLM", heads=4, kv_heads=2, hidden_size=64).save_pretrained(tmp_path)
    settings = EngineSettings(kv_cache_tokens=256, threads=2, kernels="native")
    built = build_engine(resolve(str(tmp_path)), settings, prefill_share=1.0, shared_cache=False)
    assert isinstance(built.engine._runner, NativeRunner)
    assert torch.get_num_threads() == 1


def test_unset_threads_are_the_cores_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5})
    assert num_threads(None) == 3


@pytest.mark.parametrize(("max_position", "guesses"), [(CONTEXT, True), (NUM_POSITIONS - 1, False)])
def test_a_model_too_short_to_measure_steps_with_is_served_without_guesses(
    source: ModelSource, max_position: int, guesses: bool
) -> None:
    short = replace(source, config=replace(source.config, max_position=max_position))
    settings = EngineSettings(kv_cache_tokens=512, threads=1, kernels="torch")
    speculation = SpeculationSettings()
    built = build_engine(short, settings, prefill_share=1.0, shared_cache=False, speculation=speculation)
    assert (built.engine.speculation is not None) == guesses


# --- the whole --------------------------------------------------------------------------------------------------------


def test_an_engine_with_its_pool_limits_and_promise(source: ModelSource) -> None:
    seen: list[float] = []
    settings = EngineSettings(kv_cache_tokens=250, threads=1, max_num_batched_tokens=32)
    built = build_engine(source, settings, prefill_share=1.0, shared_cache=False, progress=seen.append)
    assert built.cache.num_blocks == 1 + 16, "one block more than the tokens need, for padding rows"
    assert built.layout == LAYOUT
    assert built.max_model_len == CONTEXT
    assert built.max_request_tokens == 256, "the pool is smaller than the model's context"
    assert built.invariance.ok, built.invariance.detail
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    sequence = make_sequence(list(range(3, 60)), max_tokens=3)
    built.engine.add(sequence)
    run_to_end(built.engine)
    assert len(output_of(sequence)) == 3


@pytest.mark.parametrize(("asked", "kept"), [(64, 64), (CONTEXT, CONTEXT), (10 * CONTEXT, CONTEXT)])
def test_max_model_len_may_shorten_the_models_context_only(source: ModelSource, asked: int, kept: int) -> None:
    assert build_small(source, max_model_len=asked, kv_cache_tokens=2048).max_model_len == kept


def test_without_batch_invariance_nothing_is_promised(source: ModelSource) -> None:
    built = build_small(source, batch_invariant=False)
    assert not built.invariance.ok
    assert "batch_invariant is off" in built.invariance.detail


def test_numerics_tell_kv_dtypes_and_padding_apart(source: ModelSource) -> None:
    ways: list[dict[str, object]] = [{}, {"kv_cache_dtype": "bfloat16"}, {"batch_invariant": False}]
    assert len({build_small(source, **way).numerics for way in ways}) == 3
    assert build_small(source).numerics == build_small(source).numerics


def test_a_shared_cache_has_a_file_until_it_is_closed(source: ModelSource) -> None:
    settings = EngineSettings(kv_cache_tokens=64, threads=1)
    built = build_engine(source, settings, prefill_share=1.0, shared_cache=True)
    path = built.cache.shared_path
    assert path is not None
    assert Path(path).stat().st_size == built.layout.bytes_per_block * built.cache.num_blocks
    built.cache.close()
    assert not Path(path).exists()
