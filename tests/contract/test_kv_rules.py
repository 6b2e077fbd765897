"""The KV rules of the engine, one by one, on a real (tiny) model, real caches and real hand-offs.

Rule 9, "draft KV may change speed, never tokens", has no test here: there is no draft model yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.engine.engine import Engine, Output
from shared.engine.runner import TorchRunner
from shared.engine.scheduler import SchedulerLimits
from shared.engine.sequence import Sequence
from shared.kv.block_manager import chain_root
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.model.decoder import Decoder
from shared.model.registry import ROW_PAD, load
from shared.model.source import resolve
from shared.protocol.journal import JournalState
from shared.protocol.messages import Job, TokenLogprob
from shared.protocol.sampling import MAX_STOP_IDS, SamplingParams
from shared.transfer.base import Part
from shared.transfer.blocks import gather
from shared.transfer.exporter import Exporter
from shared.transfer.importer import Importer
from shared.worker.build import set_torch_threads
from shared.worker.jobs import CacheScope
from tests.engine_fakes import make_sequence, output_of, run_to_end
from tests.inprocess import workers
from tests.tiny_model import HEAD_DIM, KV_HEADS, LAYERS, NAME, VOCAB, write_tiny_model
from tests.transfer_rig import (
    IDENTITY,
    LAYOUT,
    LIMITS,
    NUM_BLOCKS,
    SECRET,
    Pair,
    failure,
    random_cache,
    tokens_of,
    transfer_pair,
)

PROMPT = [(13 * i) % (VOCAB - 4) + 3 for i in range(70)]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 8}
DTYPES = ("float32", "bfloat16", "float16")
NAN = float("nan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("kv-rules") / NAME)


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    set_torch_threads(1)
    return load(resolve(str(folder)), "cpu", "float32", lambda _: None, row_pad=ROW_PAD)


Made = tuple[Engine, KVCache]
Make = Callable[..., Made]


@pytest.fixture
def make(decoder: Decoder) -> Make:
    """An engine on the tiny model with a cache of its own."""

    def make(
        *,
        dtype: str = "float32",
        block_size: int = 16,
        budget: int = 512,
        blocks: int = 40,
        prefix_caching: bool = True,
    ) -> Made:
        cache = KVCache(KVLayout(LAYERS, KV_HEADS, HEAD_DIM, block_size, dtype), blocks)
        limits = SchedulerLimits(max_num_batched_tokens=budget)
        return Engine(TorchRunner(decoder, cache, "cpu"), limits, prefix_caching=prefix_caching), cache

    return make


def held_run(made: Made, prompt: list[int] = PROMPT) -> tuple[Output, torch.Tensor]:
    """Compute a prompt; its last output, with log-probs of every row, and its KV token by token."""
    engine, cache = made
    sequence = make_sequence(prompt, prompt_logprobs=2, **SAMPLED)
    sequence.hold = True
    engine.add(sequence)
    output = run_to_end(engine)[-1]
    return output, tokens_of(cache, sequence.block_ids, len(prompt))


def run(engine: Engine, prompt: list[int], **params: Any) -> tuple[Sequence, list[Output]]:
    sequence = make_sequence(prompt, **(SAMPLED | params))
    engine.add(sequence)
    return sequence, run_to_end(engine)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


# --- 1 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("budget", [1, 3, 7, 16, 33])
def test_rule_1_with_lossy_kv_a_chunk_reads_its_own_kv_after_rounding(make: Make, dtype: str, budget: int) -> None:
    """Were the own chunk read unrounded, the split into chunks would show in every row after the first chunk."""
    whole, whole_kv = held_run(make(dtype=dtype))
    chunked, chunked_kv = held_run(make(dtype=dtype, budget=budget))
    assert torch.equal(bits(chunked_kv), bits(whole_kv))
    assert chunked.prompt_logprobs == whole.prompt_logprobs
    assert chunked.samples == whole.samples


def test_rule_1_rounding_is_seen_at_all(make: Make) -> None:
    """The check above would pass on a cache that is not lossy too: this one is."""
    exact, _ = held_run(make())
    lossy, lossy_kv = held_run(make(dtype="bfloat16"))
    assert lossy_kv.dtype == torch.bfloat16
    assert lossy.prompt_logprobs[1] is not None
    assert lossy.prompt_logprobs[2:] != exact.prompt_logprobs[2:]


# --- 2 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4, 16, 128])
def test_rule_2_a_block_holds_nothing_per_block(dtype: str, block_size: int) -> None:
    """Everything a token needs, scales too, is its own: bytes are linear in tokens, whatever the block size."""
    layout = KVLayout(3, 2, 8, block_size, dtype)
    one_token = replace(layout, block_size=1)
    assert layout.bytes_per_block == block_size * one_token.bytes_per_block
    cache = KVCache(layout, 3)
    assert cache.data.nbytes == 3 * layout.bytes_per_block
    for slots in {1, block_size // 2 or 1, block_size}:
        assert Part(0, 3, 0, 1, slots).num_bytes(layout) == slots * layout.bytes_per_token


@pytest.mark.parametrize("dtype", DTYPES)
def test_rule_2_the_kv_of_a_token_does_not_depend_on_the_block_size(make: Make, dtype: str) -> None:
    _, small = held_run(make(dtype=dtype, block_size=4))
    _, large = held_run(make(dtype=dtype, block_size=32))
    assert torch.equal(bits(small), bits(large))


# --- 3 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("float32", "bfloat16"), ("bfloat16", "float16"), ("bfloat16", "float32")]
)
async def test_rule_3_a_peer_with_another_kv_dtype_is_refused(transport: str, ours: str, theirs: str) -> None:
    source = random_cache(replace(LAYOUT, dtype=theirs), shared=True)
    target = KVCache(replace(LAYOUT, dtype=ours), NUM_BLOCKS)
    exporter = Exporter(source, IDENTITY, SECRET, LIMITS)
    importer = Importer(target, IDENTITY, SECRET, LIMITS, [transport])
    await exporter.start()
    try:
        pair = Pair(source, target, exporter, importer)
        error = await failure(pair.pull(pair.finished(10)))
        assert error.reason in ("layout", "refused")
        assert importer.bytes_received == 0
        pair.assert_target_untouched()
    finally:
        await importer.close()
        await exporter.close()
        source.close()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("dtype", DTYPES)
async def test_rule_3_every_bit_arrives_as_it_was(transport: str, dtype: str) -> None:
    """Subnormals, NaN payloads and signed zeros too: any conversion would touch one of them."""
    async with transfer_pair([transport], layout=replace(LAYOUT, dtype=dtype)) as pair:
        raw = pair.source.data.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8))
        export = pair.finished(18)
        await pair.pull(export)
        pair.assert_received(export)


# --- 4 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 64])
def test_rule_4_a_prefix_hit_leaves_at_least_one_token_to_compute(make: Make, length: int) -> None:
    engine, _ = make()
    miss, _ = run(engine, PROMPT[:length])
    hit, outputs = run(engine, PROMPT[:length])
    assert hit.num_cached == (length - 1) // 16 * 16
    assert outputs[0].num_computed == length
    assert outputs[0].samples, "the first step had a row to sample from"
    assert output_of(hit) == output_of(miss)


# --- 5 ----------------------------------------------------------------------------------------------------------------


def poisoned_run(made: Made) -> tuple[list[int], tuple[TokenLogprob | None, ...]]:
    """Run a request on blocks that an earlier one left full of NaN."""
    engine, cache = made
    run(engine, PROMPT[::-1])
    cache.data[:, 1:] = NAN
    sequence, outputs = run(engine, PROMPT[:37], prompt_logprobs=1, max_tokens=20)
    return output_of(sequence), outputs[0].prompt_logprobs


def test_rule_5_a_nan_in_a_freed_block_never_reaches_a_later_request(make: Make) -> None:
    clean = run(make(prefix_caching=False)[0], PROMPT[:37], prompt_logprobs=1, max_tokens=20)
    poisoned = poisoned_run(make(prefix_caching=False, blocks=8))
    assert poisoned == (output_of(clean[0]), clean[1][0].prompt_logprobs)


def test_rule_5_without_zeroing_it_would(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "zero", lambda *_: None)
    clean = run(make(prefix_caching=False)[0], PROMPT[:37], prompt_logprobs=1, max_tokens=20)
    poisoned = poisoned_run(make(prefix_caching=False, blocks=8))
    assert poisoned != (output_of(clean[0]), clean[1][0].prompt_logprobs)


def test_rule_5_reserved_blocks_are_zero_before_kv_arrives(make: Make) -> None:
    engine, cache = make(prefix_caching=False)
    cache.data.fill_(NAN)
    targets = [make_sequence(PROMPT[:20], choice=choice) for choice in range(2)]
    assert engine.reserve(targets, 20, growth=30) is not None
    held = sorted({block for target in targets for block in target.block_ids})
    assert not cache.data[:, held].any()
    assert cache.data[:, max(held) + 1 :].isnan().all(), "only the blocks handed out are touched"


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_rule_5_invalid_slots_of_the_last_block_do_not_travel(transport: str) -> None:
    async with transfer_pair([transport]) as pair:
        export = pair.open(6)
        pair.source.data[:, export.block_ids[1], :, :, 2:] = NAN
        export.progress(6)
        export.finish(b"record")
        pulled = await pair.pull(export)
        assert pulled.bytes_moved == 6 * LAYOUT.bytes_per_token
        pair.assert_received(export)
        assert not pair.target.data[:, pair.local_blocks(6)[1], :, :, 2:].any()


class Scribble:
    """Changes one slot of the source's pool after the digest of a frame was made."""

    def __init__(self) -> None:
        self.cache: KVCache | None = None
        self.block = self.slot = -1
        self.calls = 0

    def __call__(self, frame: bytes) -> bytes:
        self.calls += 1
        assert self.cache is not None
        self.cache.data[:, self.block, :, :, self.slot] = float(self.calls)
        return frame


@pytest.mark.parametrize(("slot", "is_valid"), [(1, True), (2, False), (3, False)])
async def test_rule_5_digests_cover_valid_slots_only(slot: int, is_valid: bool) -> None:
    """By shared memory the reader digests the pool itself, so a late write into a slot shows if the slot counts."""
    tap = Scribble()
    async with transfer_pair(["shm"], tap=tap) as pair:
        export = pair.finished(6)
        tap.cache, tap.block, tap.slot = pair.source, export.block_ids[1], slot
        if is_valid:
            assert (await failure(pair.pull(export))).reason == "digest"
        else:
            await pair.pull(export)
            pair.assert_received(export)
        assert tap.calls > 0


def test_rule_5_the_bytes_of_a_part_are_blind_to_invalid_slots() -> None:
    cache, part = random_cache(), Part(0, LAYOUT.num_layers, 0, 1, 3)
    before = gather(cache, part, [5])
    cache.data[:, 5, :, :, 3:] = NAN
    assert torch.equal(gather(cache, part, [5]), before)
    assert len(before) == 3 * LAYOUT.bytes_per_token


# --- 6 ----------------------------------------------------------------------------------------------------------------

SCOPE = CacheScope("revision", "float32", "numerics")
JOB = Job("id", "model", (1, 2, 3), SamplingParams(max_tokens=4, seed=1), "gw", "p", "d", adapter="adapter", tenant="t")


@pytest.mark.parametrize(
    ("scope", "job"),
    [
        (SCOPE, replace(JOB, tenant="another")),
        (SCOPE, replace(JOB, model="another")),
        (SCOPE, replace(JOB, adapter="another")),
        (replace(SCOPE, revision="another"), JOB),
        (replace(SCOPE, kv_dtype="bfloat16"), JOB),
        (replace(SCOPE, numerics="another"), JOB),
    ],
    ids=["tenant", "model", "adapter", "revision", "kv_dtype", "numerics"],
)
def test_rule_6_each_thing_the_bits_depend_on_starts_another_chain(scope: CacheScope, job: Job, make: Make) -> None:
    engine, _ = make()
    ours, other = (make_sequence(PROMPT) for _ in range(2))
    ours.hash_root, other.hash_root = SCOPE.root(JOB), scope.root(job)
    engine.add(ours)
    run_to_end(engine)
    assert engine.scheduler.cached_prefix(other) == []
    other.hash_root, other._hashes = SCOPE.root(replace(JOB, request_id="another", gateway="another")), []
    assert len(engine.scheduler.cached_prefix(other)) == (len(PROMPT) - 1) // 16


PARTS = st.lists(st.text("\0", max_size=2), min_size=2, max_size=4)


@given(PARTS, PARTS)
def test_rule_6_no_two_scopes_start_the_same_chain(one: list[str], two: list[str]) -> None:
    assert (chain_root(*one) == chain_root(*two)) == (one == two)


# --- 7 ----------------------------------------------------------------------------------------------------------------


def test_rule_7_prompt_logprobs_skip_prefix_reads(make: Make) -> None:
    cold, _ = make()
    _, wanted = run(cold, PROMPT, prompt_logprobs=3, max_tokens=1)
    warm, _ = make(budget=17)
    run(warm, PROMPT)
    assert warm.blocks.num_cached > 0
    computed = warm.load().computed_tokens
    _, outputs = run(warm, PROMPT, prompt_logprobs=3, max_tokens=1)
    assert warm.load().computed_tokens - computed == len(PROMPT), "a row that is read from the cache has no logits"
    assert outputs[-1].prompt_logprobs == wanted[-1].prompt_logprobs
    assert len(outputs[-1].prompt_logprobs) == len(PROMPT)


def test_rule_7_prompt_logprobs_publish_their_blocks(make: Make) -> None:
    engine, _ = make()
    scored, _ = run(engine, PROMPT, prompt_logprobs=0)
    computed = engine.load().computed_tokens
    hit, _ = run(engine, PROMPT)
    saved = (len(PROMPT) - 1) // 16 * 16
    assert engine.load().computed_tokens - computed == len(PROMPT) - saved + len(output_of(hit)) - 1
    assert output_of(hit) == output_of(scored)


# --- 8 ----------------------------------------------------------------------------------------------------------------

LASTING: dict[str, Any] = {
    "temperature": 1.0,
    "seed": 31,
    "max_tokens": 400,
    "min_tokens": 150,
    "presence_penalty": 0.7,
    "frequency_penalty": 0.2,
    "repetition_penalty": 1.2,
    "stop_ids": tuple(range(3, 3 + MAX_STOP_IDS)),
    "logprobs": 2,
}


@pytest.mark.parametrize("n", [1, 2])
async def test_rule_8_a_migrated_request_keeps_its_prompt_length(
    redis_url: str, deployment: str, folder: Path, n: int
) -> None:
    """Output that counted as prompt would shift penalties, min_tokens, stop ids and the noise of every later draw."""
    async with workers(redis_url, deployment, folder) as bench:
        undisturbed = await bench.generate(PROMPT[:21], **LASTING, n=n)
        job = await bench.submit(PROMPT[:21], **LASTING, n=n)
        at: list[list[int]] = []
        for wanted in (20, 60):
            at.append([len(choice.tokens) for choice in (await _reaches(bench.journal, job, wanted)).choices])
            await bench.decode[0].hand_back()
        state = await bench.ended(job)
        assert state.epoch > undisturbed.epoch + 1, "the request did not change hands twice"
        assert all(0 < count < 150 for counts in at for count in counts), "it moved too late to prove anything"
        assert [choice.tokens for choice in state.choices] == [choice.tokens for choice in undisturbed.choices]
        assert [choice.logprobs for choice in state.choices] == [choice.logprobs for choice in undisturbed.choices]
        assert [choice.finish for choice in state.choices] == ["stop"] * n
        for choice in state.choices:
            assert len(choice.tokens) >= 150
            assert sorted(choice.logprobs) == list(range(len(choice.tokens)))
        await bench.nothing_leaks()


async def _reaches(journal: Callable[[Job], Any], job: Job, count: int) -> JournalState:
    async with asyncio.timeout(20):
        while True:
            state: JournalState = await journal(job)
            if all(len(choice.tokens) >= count for choice in state.choices):
                return state
            await asyncio.sleep(0.002)


# --- 10 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rule_10_a_head_range_of_a_block_is_one_run_of_memory(dtype: str) -> None:
    """What a planner for tensor parallelism cuts: for K and V each, heads first to last without a gap."""
    layout = KVLayout(2, 4, 8, 16, dtype)
    cache = KVCache(layout, 5)
    one_head = layout.block_size * layout.head_dim
    for layer in range(layout.num_layers):
        for kind in range(2):
            for first, last in combinations(range(layout.num_kv_heads + 1), 2):
                heads = cache.layer(layer)[3, kind, first:last]
                assert heads.is_contiguous()
                assert heads.numel() == (last - first) * one_head
                whole = cache.layer(layer)[3, kind]
                assert heads.storage_offset() == whole.storage_offset() + first * one_head
