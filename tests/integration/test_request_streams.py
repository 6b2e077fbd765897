"""The gateway's streams on the real server: fast path, replay, resubmission, repair, cancel, adoption."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from shared.bus.connection import connect, connect_blocking
from shared.bus.embedded import EmbeddedServer
from shared.bus.events import EventFeed
from shared.bus.handle import StreamReader
from shared.bus.requests import Append
from shared.bus.results import Begun, Lease
from shared.bus.stream import Patience, RequestStreams
from shared.errors import BusUnavailable, ProtocolError
from shared.protocol.journal import chain
from shared.protocol.keys import Keys
from shared.protocol.messages import End, Tokens
from tests.integration.bus_helpers import Bench, tokens

WAIT_S = 10.0


@dataclass
class Gateway:
    streams: RequestStreams
    bench: Bench

    async def open(self, **changes: Any) -> StreamReader:
        return await self.streams.open(self.bench.job(**changes))

    async def begun(self, request_id: str = "r") -> Lease:
        begun = await self.bench.store.begin(*await self.bench.read(self.bench.prefill), request_id, "p")
        assert isinstance(begun, Begun)
        return begun.lease

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await self.bench.client.ping()

    async def until_queued(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while await self.bench.field("state") != "queued":
                pass


@contextlib.asynccontextmanager
async def gateway(url: str, keys: Keys, name: str = "g", **options: float) -> AsyncIterator[Gateway]:
    commands, blocking = connect(url), connect_blocking(url)
    bench = Bench.of(commands, keys)
    try:
        async with RequestStreams(bench.store, EventFeed(blocking, keys, name), name, Patience(**options)) as streams:
            yield Gateway(streams, bench)
    finally:
        await commands.aclose()
        await blocking.aclose()


@pytest_asyncio.fixture
async def g(redis_url: str, keys: Keys) -> AsyncIterator[Gateway]:
    async with gateway(redis_url, keys, silence_s=0.2) as made:
        yield made


async def collect(handle: StreamReader) -> tuple[list[int], End]:
    """All tokens of choice 0 and the End; nothing may follow it."""
    got: list[int] = []
    end: End | None = None
    async with asyncio.timeout(WAIT_S):
        async for event in handle:
            assert end is None
            if isinstance(event, End):
                end = event
            else:
                assert event.base == len(got)
                got.extend(event.tokens)
    assert end is not None
    return got, end


async def first(handle: StreamReader) -> Tokens | End:
    async with asyncio.timeout(WAIT_S):
        return await anext(handle)


async def test_tokens_arrive_by_publication(redis_url: str, keys: Keys) -> None:
    async with gateway(redis_url, keys, silence_s=1000) as g:
        handle = await g.open()
        lease = await g.begun()
        await g.bench.append(lease, tokens([], [1, 2]))
        event = await first(handle)
        assert isinstance(event, Tokens)
        assert (event.tokens, str(handle.position), handle.epoch) == ((1, 2), "2-1", 2)
        await g.bench.append(lease, tokens([1, 2], [3], finish="stop"))
        assert await collect_rest(handle) == ([3], End("finished"))
        assert g.streams.counters.replays == 0
        assert len(g.streams) == 0


async def collect_rest(handle: StreamReader) -> tuple[list[int], End]:
    events = []
    async with asyncio.timeout(WAIT_S):
        async for event in handle:
            events.append(event)
    assert isinstance(events[-1], End)
    return [token for event in events[:-1] if isinstance(event, Tokens) for token in event.tokens], events[-1]


async def test_lost_publications_are_read_from_the_journal(g: Gateway) -> None:
    """The worker's writes go to a channel nobody listens to: silence, then the journal."""
    handle = await g.open()
    lease = await g.begun()
    await g.bench.client.hset(g.bench.keys.request("r"), "chan", "nowhere")
    await g.bench.append(lease, tokens([], [1]))
    await g.bench.append(lease, tokens([1], [2, 3], finish="length"))
    assert await collect(handle) == ([1, 2, 3], End("finished"))
    assert g.streams.counters.replays > 0


async def test_a_gap_is_filled_before_what_follows(redis_url: str, keys: Keys) -> None:
    async with gateway(redis_url, keys, silence_s=1000) as g:
        handle = await g.open()
        lease = await g.begun()
        channel = await g.bench.field("chan")
        await g.bench.client.hset(g.bench.keys.request("r"), "chan", "nowhere")
        await g.bench.append(lease, tokens([], [1]))
        await g.bench.client.hset(g.bench.keys.request("r"), "chan", channel)
        await g.bench.append(lease, tokens([1], [2]))
        await g.bench.append(lease, tokens([1, 2], [3], finish="stop"))
        assert await collect(handle) == ([1, 2, 3], End("finished"))


async def test_a_request_redis_forgot_is_submitted_again_with_what_was_delivered(g: Gateway) -> None:
    handle = await g.open()
    lease = await g.begun()
    await g.bench.append(lease, tokens([], [1, 2]))
    await first(handle)
    await g.bench.client.delete(*[key async for key in g.bench.client.scan_iter(match=f"{g.bench.keys.prefix}*")])
    await g.until(lambda: g.streams.counters.resubmits == 1)
    assert await g.bench.append(lease, tokens([1, 2], [9])) != []
    await g.until_queued()
    lease = await g.begun()
    assert lease.epoch > 2
    assert (await g.bench.journal()).choices[0].tokens == [1, 2]
    await g.bench.append(lease, tokens([1, 2], [3], finish="stop"))
    assert await collect_rest(handle) == ([3], End("finished"))


async def test_a_journal_that_contradicts_the_client_is_repaired(g: Gateway) -> None:
    handle = await g.open()
    lease = await g.begun()
    await g.bench.append(lease, tokens([], [1, 2]))
    await first(handle)
    await lose_last_append(g, lease, tokens([], [7, 8]))
    await g.until(lambda: g.streams.counters.repairs == 1)
    await g.until_queued()
    lease = await g.begun()
    await g.bench.append(lease, tokens([1, 2], [3], finish="stop"))
    assert await collect_rest(handle) == ([3], End("finished"))


async def lose_last_append(g: Gateway, lease: Lease, instead: Tokens) -> None:
    """As after a fail-over: the append is lost and the worker's next attempt sampled otherwise."""
    key, log = g.bench.keys.request(lease.request_id), g.bench.keys.log(lease.request_id)
    await g.bench.client.hset(key, mapping={"n:0": "0", "h:0": "", "chan": "nowhere"})
    entries: Any = await g.bench.client.xrange(log)
    await g.bench.client.xdel(log, entries[-1][0])
    await g.bench.store.append([Append(lease, instead)])


async def test_a_conflict_that_has_already_ended_is_an_error(g: Gateway) -> None:
    handle = await g.open()
    lease = await g.begun()
    await g.bench.append(lease, tokens([], [1, 2]))
    await first(handle)
    await lose_last_append(g, lease, tokens([], [7, 8], finish="stop"))
    _, end = await collect_rest(handle)
    assert (end.outcome, end.code) == ("error", "stream_conflict")


async def test_a_forced_cancel_ends_it_at_once_in_the_background(g: Gateway) -> None:
    handle = await g.open()
    lease = await g.begun()
    await handle.cancel("client_gone", force=True)
    await g.until(lambda: len(g.streams) == 0)
    assert not (await g.bench.store.touch(lease)).owner
    assert await collect(handle) == ([], End("cancelled", "client_gone"))


async def test_a_cancel_is_repeated_until_the_terminal_event(g: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await g.open()
    real, calls = g.bench.store.cancel, []

    async def lost(*args: Any, **options: Any) -> str:
        calls.append(args)
        return "pending" if len(calls) < 3 else await real(*args, **options)

    monkeypatch.setattr(g.bench.store, "cancel", lost)
    await handle.cancel("client_gone")
    await handle.cancel("again")
    assert await collect(handle) == ([], End("cancelled", "client_gone"))
    assert len(calls) == 3


async def test_a_stop_string_ends_one_choice_and_the_other_goes_on(g: Gateway) -> None:
    handle = await g.open(n=2)
    lease = await g.begun()
    await g.bench.append(lease, tokens([], [1, 2, 3], 0), tokens([], [4], 1))
    assert isinstance(await first(handle), Tokens)
    assert isinstance(await first(handle), Tokens)
    await handle.cancel("stop_string", upto={0: 2})
    event = await first(handle)
    assert isinstance(event, Tokens)
    assert (event.choice, event.tokens, event.finish) == (0, (), "stop")
    await g.bench.append(lease, tokens([4], [5], 1, "length"))
    assert await collect_rest(handle) == ([5], End("finished"))
    state = await g.bench.journal(n=2)
    assert [choice.tokens for choice in state.choices] == [[1, 2], [4, 5]]


async def test_a_cancel_of_a_forgotten_request_ends_here(g: Gateway) -> None:
    handle = await g.open()
    await g.bench.client.delete(g.bench.keys.request("r"), g.bench.keys.log("r"))
    await handle.cancel("client_gone")
    assert await collect(handle) == ([], End("cancelled", "client_gone"))
    assert not await g.bench.client.exists(g.bench.keys.request("r"))


async def test_an_overdue_request_in_the_queue_ends(g: Gateway) -> None:
    handle = await g.open(budget_ms=50)
    _, end = await collect(handle)
    assert (end.outcome, end.code) == ("error", "deadline_exceeded")


async def test_ids_in_use_are_refused(g: Gateway, redis_url: str, keys: Keys) -> None:
    await g.open()
    with pytest.raises(ProtocolError, match="in use"):
        await g.open()
    async with gateway(redis_url, keys, "g2") as second:
        with pytest.raises(ProtocolError, match="in use by gateway g"):
            await second.open(gateway="g2")


async def test_stopping_ends_every_stream(redis_url: str, keys: Keys) -> None:
    async with gateway(redis_url, keys) as g:
        handle = await g.open()
    _, end = await collect(handle)
    assert (end.outcome, end.code) == ("error", "gateway_stopped")


async def test_a_redis_that_dies_ends_streams_after_the_patience() -> None:
    with EmbeddedServer() as server:
        async with gateway(server.url, Keys("gone"), silence_s=0.1, patience_s=0.3) as g:
            handle = await g.open()
            server.stop()
            _, end = await collect(handle)
            assert (end.outcome, end.code) == ("error", "bus_unavailable")
            with pytest.raises(BusUnavailable):
                await g.open(request_id="r2")
            async with asyncio.timeout(WAIT_S):
                for _ in iter(lambda: len(g.streams), 0):
                    await asyncio.sleep(0)


async def test_a_cut_subscription_is_renewed_and_journals_are_read(redis_url: str, keys: Keys) -> None:
    async with gateway(redis_url, keys, silence_s=1000) as g:
        handle = await g.open()
        lease = await g.begun()
        await g.bench.client.client_kill_filter(_type="pubsub")
        await g.bench.append(lease, tokens([], [1], finish="stop"))
        assert await collect(handle) == ([1], End("finished"))
        assert g.streams.counters.resubscribes >= 1


async def test_rubbish_on_the_channel_is_ignored(g: Gateway) -> None:
    handle = await g.open()
    lease = await g.begun()
    for rubbish in (b"", b"\xc1", b"\x91\x01", b"\x91\x95\xa1r\xa1x\x01\xa1T\xa0"):
        await g.bench.client.publish(g.bench.keys.tokens("g"), rubbish)
    await g.bench.append(lease, tokens([], [1], finish="stop"))
    assert await collect(handle) == ([1], End("finished"))
    assert chain("", [1]) == (await g.bench.journal()).choices[0].h


@pytest.mark.parametrize(
    ("fault", "code"), [(RuntimeError("a bug"), "internal_error"), (ProtocolError("a bad entry"), "protocol_error")]
)
async def test_a_fault_while_reading_the_journal_ends_the_stream(
    g: Gateway, monkeypatch: pytest.MonkeyPatch, fault: Exception, code: str
) -> None:
    async def broken(*_: object) -> None:
        raise fault

    monkeypatch.setattr(g.bench.store, "poll", broken)
    _, end = await collect(await g.open())
    assert (end.outcome, end.code) == ("error", code)


async def test_a_loop_that_fails_is_started_again(redis_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(redis_url, keys, silence_s=1000) as g:
        judge, failures = g.streams._judge, iter([RuntimeError("a bug")])

        def failing(*args: Any) -> None:
            for failure in failures:
                raise failure
            judge(*args)

        monkeypatch.setattr(g.streams, "_judge", failing)
        handle = await g.open()
        lease = await g.begun()
        await g.bench.append(lease, tokens([], [1]))
        await g.bench.append(lease, tokens([1], [2], finish="stop"))
        assert await collect(handle) == ([1, 2], End("finished"))
