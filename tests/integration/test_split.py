"""Split service against one engine in one process: the same tokens, whatever happens on the way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from shared.protocol.messages import OUTCOME_CANCELLED, OUTCOME_ERROR, OUTCOME_FINISHED, PATH_RECOMPUTE, PATH_REMOTE
from tests.inprocess import unsplit_tokens, workers
from tests.tiny_model import CONTEXT, VOCAB, write_tiny_model

LENGTHS = (1, 2, 15, 16, 17, 40, 200)
PROMPTS = [[(7 * length + 3 * i) % (VOCAB - 4) + 3 for i in range(length)] for length in LENGTHS]
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 1234, "top_p": 0.95, "presence_penalty": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_split_equals_one_process(
    redis_url: str, deployment: str, model: Path, transport: str, params: dict[str, Any]
) -> None:
    expected = unsplit_tokens(model, PROMPTS, **params)
    async with workers(redis_url, deployment, model, transfer={"transports": (transport,)}) as bench:
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            state = await bench.generate(prompt, **params)
            assert state.choices[0].tokens == tokens
            assert state.end is not None
            assert (state.end.outcome, state.end.usage.path) == (OUTCOME_FINISHED, PATH_REMOTE)
            assert state.end.usage.transport == transport
        await bench.nothing_leaks()


async def test_small_chunks_small_pool_and_a_batch_change_nothing(redis_url: str, deployment: str, model: Path) -> None:
    """Chunks of 16 tokens, 16 requests at once, and a decode pool so small that requests are preempted."""
    prompts = [[(i * 31 + j) % (VOCAB - 4) + 3 for j in range(10 + 3 * i)] for i in range(16)]
    expected = unsplit_tokens(model, prompts, **SAMPLED, max_tokens=90)
    settings = {"max_num_batched_tokens": 16, "max_num_seqs": 16, "kv_cache_tokens": 1024}
    async with workers(redis_url, deployment, model, engine=settings) as bench:
        states = await asyncio.gather(*(bench.generate(prompt, **SAMPLED, max_tokens=90) for prompt in prompts))
        assert [state.choices[0].tokens for state in states] == expected
        assert sum(state.end.usage.preemptions for state in states if state.end) > 0, "no request was preempted"
        await bench.nothing_leaks()


async def test_a_prefix_hit_equals_a_miss(redis_url: str, deployment: str, model: Path) -> None:
    async with workers(redis_url, deployment, model) as bench:
        miss = await bench.generate(PROMPTS[-1], **SAMPLED)
        hit = await bench.generate(PROMPTS[-1], **SAMPLED)
        assert hit.choices[0].tokens == miss.choices[0].tokens
        assert miss.end is not None
        assert hit.end is not None
        assert miss.end.usage.prefill_cached_tokens == 0
        assert hit.end.usage.prefill_cached_tokens >= 16
        assert hit.end.usage.decode_cached_tokens >= 16
        assert 0 < hit.end.usage.kv_bytes < miss.end.usage.kv_bytes


async def test_choices_share_one_prefill_and_equal_single_runs(redis_url: str, deployment: str, model: Path) -> None:
    prompt = PROMPTS[5]
    expected = unsplit_tokens(model, [prompt], **SAMPLED, n=4)
    async with workers(redis_url, deployment, model) as bench:
        state = await bench.generate(prompt, **SAMPLED, n=4)
        assert [choice.tokens for choice in state.choices] == expected
        assert len({tuple(tokens) for tokens in expected}) > 1
        await bench.nothing_leaks()


async def test_logprobs_and_prompt_logprobs_arrive(redis_url: str, deployment: str, model: Path) -> None:
    async with workers(redis_url, deployment, model) as bench:
        state = await bench.generate(PROMPTS[4], logprobs=3, prompt_logprobs=1)
        choice = state.choices[0]
        assert sorted(choice.logprobs) == list(range(16))
        best = [choice.logprobs[index].top[0][0] for index in range(16)]
        assert best == choice.tokens, "greedy tokens are the likeliest ones"
        assert len(state.prompt_logprobs) == len(PROMPTS[4])
        assert state.prompt_logprobs[0] is None


async def test_a_request_of_one_token_needs_no_hand_off(redis_url: str, deployment: str, model: Path) -> None:
    async with workers(redis_url, deployment, model) as bench:
        state = await bench.generate(PROMPTS[3], max_tokens=1)
        assert state.end is not None
        assert state.end.usage.path == "prefill_only"
        assert len(state.choices[0].tokens) == 1
        await bench.nothing_leaks()


class FlipByte:
    """Changes one byte of every frame while told to spoil: in the KV content, or in the digest where there is none."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.spoiling = False
        self.spoiled = 0

    def __call__(self, frame: bytes) -> bytes:
        if not self.spoiling:
            return frame
        self.spoiled += 1
        spoiled = bytearray(frame)
        spoiled[self.index] ^= 1
        return bytes(spoiled)


@pytest.mark.parametrize(("transport", "index"), [("shm", -1), ("tcp", -1), ("tcp", -1000)])
async def test_a_flipped_byte_is_refused_counted_and_recomputed(
    redis_url: str, deployment: str, model: Path, transport: str, index: int
) -> None:
    tap = FlipByte(index)
    async with workers(redis_url, deployment, model, tap=tap, transfer={"transports": (transport,)}) as bench:
        tap.spoiling = True
        state = await bench.generate(PROMPTS[6], **SAMPLED)
        assert state.end is not None
        assert tap.spoiled > 0
        assert (state.end.usage.path, state.end.usage.reason) == (PATH_RECOMPUTE, "digest")
        assert bench.decode[0].counters.recomputed == {"digest": 1}
        assert state.choices[0].tokens == unsplit_tokens(model, [PROMPTS[6]], **SAMPLED)[0]
        await bench.nothing_leaks()


@pytest.mark.parametrize("after", [0, 1, 5])
async def test_cancelling_frees_blocks_on_both_sides(redis_url: str, deployment: str, model: Path, after: int) -> None:
    async with workers(redis_url, deployment, model) as bench:
        job = await bench.submit(PROMPTS[6], max_tokens=700)
        async with asyncio.timeout(10):
            while len((await bench.journal(job)).choices[0].tokens) < after:
                await asyncio.sleep(0.005)
        await bench.store.cancel(job.request_id, "client_gone")
        state = await bench.ended(job)
        assert state.end is not None
        assert state.end.outcome == OUTCOME_CANCELLED
        assert len(state.choices[0].tokens) < 700
        await bench.nothing_leaks()


async def test_a_prompt_longer_than_the_pool_ends_with_an_error(redis_url: str, deployment: str, model: Path) -> None:
    async with workers(redis_url, deployment, model, engine={"kv_cache_tokens": 256}) as bench:
        state = await bench.generate([5] * 300)
        assert state.end is not None
        assert (state.end.outcome, state.end.code) == (OUTCOME_ERROR, "context_length_exceeded")
        good = await bench.generate(PROMPTS[0])
        assert len(good.choices[0].tokens) == 16


async def test_requests_that_outgrow_the_pool_together_all_finish(redis_url: str, deployment: str, model: Path) -> None:
    async with workers(redis_url, deployment, model, engine={"kv_cache_tokens": 512}) as bench:
        prompts = [[i + 3] * 100 for i in range(6)]
        states = await asyncio.gather(*(bench.generate(prompt, max_tokens=200) for prompt in prompts))
        assert [len(state.choices[0].tokens) for state in states] == [200] * 6
        assert max(len(prompt) + 200 for prompt in prompts) < CONTEXT
        await bench.nothing_leaks()
