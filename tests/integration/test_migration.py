"""A request that loses its worker at any point ends with the very journal it would have had: tokens and log-probs.

The worker is cut off in place: nobody is asked, its entries stay with it, and a peer's sweep brings the request back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared import faultpoints
from shared.protocol.journal import JournalState
from shared.protocol.messages import OUTCOME_FINISHED, Job
from shared.speculative.draft_model import DraftModelProposer
from shared.speculative.heads import HeadsProposer
from tests.drafts import target_of, write_draft, write_heads
from tests.inprocess import Bench, workers
from tests.model_checkpoints import tokens
from tests.native_models import library
from tests.speculation_fakes import let_guess_freely
from tests.tiny_model import NAME, VOCAB, write_tiny_model

PROMPT = [(13 * i + i // 5) % (VOCAB - 4) + 3 for i in range(70)]
CHOICES: dict[str, Any] = {
    "n": 3,
    "temperature": 0.9,
    "top_p": 0.95,
    "seed": 99,
    "presence_penalty": 0.7,
    "frequency_penalty": 0.4,
    "repetition_penalty": 1.2,
    "logprobs": 2,
    "max_tokens": 40,
    "min_tokens": 10,
}
SINGLE: dict[str, Any] = CHOICES | {"n": 1, "prompt_logprobs": 1}
POINTS = (
    "prefill.begun",
    "prefill.blocks_allocated",
    "prefill.chunk_exported",
    "prefill.first_token_appended",
    "prefill.final_frame",
    "decode.taken",
    "decode.reserved",
    "decode.verified",
    "decode.committed",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("migration") / NAME)


class Cut:
    """The first handler that comes to a point ends there, as if its process were gone: it calls no script any more."""

    def __init__(self, point: str) -> None:
        self._point = point
        self.is_done = False

    def __call__(self, name: str) -> None:
        if name == self._point and not self.is_done:
            self.is_done = True
            raise asyncio.CancelledError


def contents(state: JournalState) -> list[Any]:
    """All that a client can see of a journal."""
    return [(choice.tokens, choice.logprobs, choice.finish) for choice in state.choices] + [state.prompt_logprobs]


async def swept(bench: Bench, job: Job) -> str:
    """What a peer does about a dead worker's entries, at once: the entry that stands is taken from its holder."""
    fields: Any = await bench.store._client.hgetall(bench.keys.request(job.request_id))
    stream, entry = fields[b"stream"].decode(), fields[b"entry"].decode()
    return await bench.store.sweep(stream, entry, job.request_id, counted=True)


@pytest.fixture
async def bench(redis_url: str, deployment: str, model: Path) -> AsyncIterator[Bench]:
    """Without guesses, which would end the requests before they can be lost."""
    engine, speculation = {"max_num_batched_tokens": 16}, {"proposers": "none"}
    async with workers(redis_url, deployment, model, engine=engine, speculation=speculation) as bench:
        yield bench
        await bench.nothing_leaks()


@pytest.mark.parametrize("params", [SINGLE, CHOICES], ids=["one", "three"])
async def test_a_worker_lost_on_the_way(bench: Bench, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]) -> None:
    expected = contents(await bench.generate(PROMPT, **params))
    for point in POINTS:
        cut = Cut(point)
        monkeypatch.setattr(faultpoints, "fault_point", cut)
        job = await bench.submit(PROMPT, **params)
        await bench.until(lambda cut=cut: cut.is_done)  # type: ignore[misc]
        await swept(bench, job)
        state = await bench.ended(job)
        assert contents(state) == expected, point
        assert state.end is not None
        assert state.end.outcome == OUTCOME_FINISHED


@pytest.mark.parametrize("params", [SINGLE, CHOICES], ids=["one", "three"])
async def test_a_decode_worker_lost_after_some_tokens(bench: Bench, params: dict[str, Any]) -> None:
    expected = contents(await bench.generate(PROMPT, **params))
    assert len(expected[0][0]) == params["max_tokens"]
    for count in (1, 2, 17, 39):
        job = await lost_after(bench, params, count)
        assert contents(await bench.ended(job)) == expected, count


@pytest.mark.parametrize("params", [SINGLE, CHOICES], ids=["one", "three"])
async def test_a_decode_worker_lost_while_it_speculates(
    redis_url: str, deployment: str, model: Path, params: dict[str, Any]
) -> None:
    """The next worker guesses otherwise, its store being another one, and gives the same tokens."""
    async with workers(redis_url, deployment, model, speculation={"proposers": "none"}) as plain:
        expected = contents(await plain.generate(PROMPT, **params))
    async with workers(redis_url, f"{deployment}-2", model, decode=2) as bench:
        for service in bench.decode:
            let_guess_freely(service.engine)
        for _ in range(3):
            assert contents(await bench.generate(PROMPT, **params)) == expected
            job = await lost_after(bench, params, 2)
            assert contents(await bench.ended(job)) == expected
        assert sum(sum(service.engine.load().accepted) for service in bench.decode) > 0
        await bench.nothing_leaks()


@pytest.mark.parametrize("kind", ["heads", "layers"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
async def test_a_decode_worker_lost_while_a_draft_guesses(
    redis_url: str, deployment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, temperature: float
) -> None:
    """Nothing of a draft moves with a request: the next worker builds what it needs anew, and gives the same tokens."""
    for proposer in (
        HeadsProposer,
        DraftModelProposer,
    ):  # a random model is as quick as its draft: say that it costs nothing
        monkeypatch.setattr(proposer, "seconds", lambda *_: 0.0)
    library()
    target = target_of(tmp_path / "model")
    if kind == "heads":
        write_heads(tmp_path / "draft", target)
    else:
        write_draft(tmp_path / "draft", target, target.config.num_layers)
    prompt, params = tokens(40), SINGLE | {"temperature": temperature, "max_tokens": 60}
    async with workers(redis_url, deployment, tmp_path / "model", speculation={"proposers": "none"}) as plain:
        expected = contents(await plain.generate(prompt, **params))
    speculation = {"proposers": "draft,heads", "draft": str(tmp_path / "draft")}
    async with workers(redis_url, f"{deployment}-2", tmp_path / "model", decode=2, speculation=speculation) as bench:
        for service in bench.decode:
            let_guess_freely(service.engine)
        for count in (2, 20):
            job = await lost_after(bench, params, count, prompt)
            assert contents(await bench.ended(job)) == expected
        assert sum(sum(service.engine.load().drafted) for service in bench.decode) > 0
        await bench.nothing_leaks()


async def lost_after(bench: Bench, params: dict[str, Any], count: int, prompt: list[int] = PROMPT) -> Job:
    """A request whose decode worker is gone after `count` tokens or some more; asked again if it ended before that."""
    for _ in range(20):
        job = await bench.submit(prompt, **params)
        while min(len(choice.tokens) for choice in (await bench.journal(job)).choices) < count:
            await bench.registry.beat_gateway("test")
        if await swept(bench, job) == "requeued":
            return job
    raise AssertionError(f"every request ended before its worker was lost after {count} tokens")


async def test_a_stop_string_found_while_the_request_moves(bench: Bench) -> None:
    """The gateway cuts one choice below what is journaled, after the offer was read and before it is committed."""
    params = CHOICES | {"n": 2, "max_tokens": 300}
    whole = await bench.generate(PROMPT, **params)
    for count in (12, 18, 24, 30):
        job = await bench.submit(PROMPT, **params)
        held = await bench.journal(job)
        while min(len(choice.tokens) for choice in held.choices) < count:
            await bench.registry.beat_gateway("test")
            held = await bench.journal(job)
        assert await swept(bench, job) == "requeued", "it was too fast to prove anything"
        stop = count - 3, held.choices[0].hash_at(count - 3)
        await bench.store.cancel(job.request_id, "stop_string", upto={0: stop})
        state = await bench.ended(job)
        assert state.end is not None
        assert state.end.outcome == OUTCOME_FINISHED
        assert state.choices[0].tokens == whole.choices[0].tokens[: count - 3]
        assert state.choices[1].tokens == whole.choices[1].tokens


async def test_choices_that_lack_their_last_tokens_get_them(bench: Bench) -> None:
    """Several choices are not sampled by prefill a second time, so even one missing token needs the decode worker."""
    expected = await bench.generate(PROMPT, **CHOICES)
    for missing in (1, 2):
        snapshot = [choice.tokens[:-missing] for choice in expected.choices]
        job = bench.job(PROMPT, **CHOICES)
        await bench.store.submit(job, snapshot, emax=3)
        state = await bench.ended(job)
        assert [choice.tokens for choice in state.choices] == [choice.tokens for choice in expected.choices]


async def test_prompt_logprobs_come_from_decode_when_prefill_never_got_to_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill is lost with its offer out; the decode worker computes the prompt, and all that goes with it."""
    expected = contents(await bench.generate(PROMPT, **SINGLE))
    cut = Cut("prefill.offered")
    monkeypatch.setattr(faultpoints, "fault_point", cut)
    job = await bench.submit(PROMPT, **SINGLE)
    state = await bench.ended(job)
    assert cut.is_done
    assert state.end is not None
    assert state.end.usage.path == "recompute"
    assert contents(state) == expected
