"""A worker that stood still while a peer took its request over: all it tries then is refused and changes nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from shared.bus.results import Appended, Begun, Committed, Lease, Offer, Refused, Stale
from shared.protocol.keys import Keys
from shared.protocol.messages import OUTCOME_FINISHED
from tests.integration.bus_helpers import Bench, tokens


@pytest.fixture
def bench(redis_client: Redis, keys: Keys) -> Bench:
    return Bench.of(redis_client, keys)


async def _append(bench: Bench, old: Lease, offer: Offer) -> None:
    assert await bench.append(old, tokens([1], [2])) == [Refused()]
    assert await bench.append(old, tokens([1], [2], finish="stop")) == [Refused()]


async def _touch(bench: Bench, old: Lease, offer: Offer) -> None:
    touched = await bench.store.touch(old)
    assert (touched.owner, touched.cancel, touched.gateway) == (False, False, "")


async def _requeue(bench: Bench, old: Lease, offer: Offer) -> None:
    assert not await bench.store.requeue(old)


async def _fail(bench: Bench, old: Lease, offer: Offer) -> None:
    assert not await bench.store.fail(old, "internal_error", "x")


async def _offer(bench: Bench, old: Lease, offer: Offer) -> None:
    assert await bench.store.offer(old, b"mine") == Refused()


async def _begin(bench: Bench, old: Lease, offer: Offer) -> None:
    assert await bench.store.begin(old.stream, old.entry, "r", "zombie") == Stale()


async def _take(bench: Bench, old: Lease, offer: Offer) -> None:
    assert await bench.store.take(offer.stream, offer.entry, "r") == Stale()


async def _commit(bench: Bench, old: Lease, offer: Offer) -> None:
    assert await bench.store.commit(offer, old.owner, [tokens([], [1])]) == Refused()


async def _sweep(bench: Bench, old: Lease, offer: Offer) -> None:
    """As the sweeper of its own strays, and as one that takes the new owner for dead by the old entry."""
    assert await bench.store.sweep(old.stream, old.entry, "r", counted=False) == "stale"
    assert await bench.store.sweep(old.stream, old.entry, "r", counted=True) == "stale"
    assert await bench.store.strike(old.stream, old.entry, "r") == "stale"


Act = Callable[[Bench, Lease, Offer], Awaitable[None]]
ACTS = (_append, _touch, _requeue, _fail, _offer, _begin, _take, _commit, _sweep)


async def state_of(bench: Bench) -> tuple[object, ...]:
    """All of a request that a zombie could spoil: its fields, its journal, its entries and who holds them."""
    fields = await bench.client.hgetall(bench.keys.request("r"))
    journal = await bench.client.xrange(bench.keys.log("r"))
    entries = [await bench.client.xrange(stream) for stream in (bench.prefill, bench.decode)]
    held = [await bench.client.xpending_range(s, "workers", "-", "+", 10) for s in (bench.prefill, bench.decode)]
    return fields, journal, entries, [[(row["message_id"], row["consumer"]) for row in rows] for rows in held]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("was", ["prefill", "decode"])
async def test_a_zombie_changes_nothing(bench: Bench, was: str, act: Act) -> None:
    begun, offer = await bench.offered()
    old = begun.lease
    if was == "decode":
        committed = await bench.store.commit(offer, "d:1", [tokens([], [1])])
        assert isinstance(committed, Committed)
        old = committed.lease
    assert await bench.store.sweep(old.stream, old.entry, "r", counted=True) == "requeued"
    again = await bench.store.begin(*await bench.read(bench.prefill, "p2"), "r", "p2")
    assert isinstance(again, Begun)
    held = [1] if was == "decode" else []
    before = await state_of(bench)
    await act(bench, old, offer)
    assert await state_of(bench) == before
    assert await bench.append(again.lease, tokens(held, [7], finish="stop")) == [Appended(done=True)]
    end = (await bench.journal()).end
    assert end is not None
    assert end.outcome == OUTCOME_FINISHED
