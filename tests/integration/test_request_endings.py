"""What the protocol model leaves out: choices, deadlines, cancels with a cut, private streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from shared.bus.results import Appended, Begun, Cancelled, Committed, Ended, Lease, Offer, Refused, Stale
from shared.protocol.journal import chain
from shared.protocol.keys import Keys
from shared.protocol.messages import End
from tests.integration.bus_helpers import Bench, tokens


@pytest.fixture
def bench(redis_client: Redis, keys: Keys) -> Bench:
    return Bench.of(redis_client, keys)


async def passed(bench: Bench, milliseconds: int) -> None:
    """Wait until Redis' own clock has gone on."""
    start = await bench.client.time()
    while (await _since(bench, start)) <= milliseconds:
        pass


async def _since(bench: Bench, start: tuple[int, int]) -> float:
    seconds, microseconds = await bench.client.time()
    return (seconds - start[0]) * 1000 + (microseconds - start[1]) / 1000


# ---- choices --------------------------------------------------------------------------------------


async def test_the_end_comes_after_the_last_choice(bench: Bench) -> None:
    lease = await bench.committed(bench.job(n=3))
    assert await bench.append(lease, tokens([1], [2], 1, "stop")) == [Appended()]
    assert await bench.append(lease, tokens([1], [3], 1)) == [Cancelled(choice_only=True)]
    results = await bench.append(lease, tokens([1], [5], 0, "length"), tokens([1], [6], 2, "stop"))
    assert results == [Appended(), Appended(done=True)]
    state = await bench.journal(n=3)
    assert [choice.tokens for choice in state.choices] == [[1, 5], [1, 2], [1, 6]]
    assert state.end == End("finished")


async def test_a_finish_may_come_without_tokens(bench: Bench) -> None:
    lease = await bench.committed()
    assert await bench.append(lease, tokens([1], [], finish="length")) == [Appended(done=True)]
    assert (await bench.journal()).choices[0].finish == "length"


async def test_a_choice_finished_before_a_crash_stays_finished(bench: Bench) -> None:
    lease = await bench.committed(bench.job(n=2))
    await bench.append(lease, tokens([1], [2], 0, "stop"))
    assert await bench.store.sweep(lease.stream, lease.entry, "r", counted=True) == "requeued"
    begun = await bench.store.begin(*await bench.read(bench.prefill), "r", "p2")
    assert isinstance(begun, Begun)
    assert begun.deaths == 1
    assert await bench.append(begun.lease, tokens([1], [2], 1, "stop")) == [Appended(done=True)]


# ---- cancel -----------------------------------------------------------------------------------------


async def test_a_queued_request_is_cancelled_at_once_and_its_entry_is_left_to_be_found_stale(bench: Bench) -> None:
    await bench.store.submit(bench.job())
    assert await bench.store.cancel("r", "client_gone") == "ended"
    assert (await bench.journal()).end == End("cancelled", "client_gone")
    assert await bench.client.xlen(bench.prefill) == 1, "an undelivered entry is never deleted: lag would lie"
    assert await bench.store.begin(*await bench.read(bench.prefill), "r", "p") == Stale()
    assert await bench.num_entries() == await bench.num_pending() == 0


async def test_force_ends_a_running_request_and_fences_its_owner(bench: Bench) -> None:
    lease = await bench.committed()
    assert await bench.store.cancel("r", "client_gone", force=True, upto=1) == "ended"
    assert await bench.append(lease, tokens([1], [2])) == [Refused()]
    assert (await bench.journal()).end == End("cancelled", "client_gone", upto=1)
    assert await bench.num_entries() == await bench.num_pending() == 0


async def test_a_reason_is_bounded(bench: Bench) -> None:
    await bench.store.submit(bench.job())
    await bench.store.cancel("r", "x" * 5000)
    end = (await bench.journal()).end
    assert end is not None
    assert len(end.code) == 64


async def test_touch_and_begin_and_take_end_a_cancelled_request(bench: Bench) -> None:
    begun, offer = await bench.offered(bench.job("r1"))
    await bench.store.cancel("r1", "x")
    assert await bench.store.take(offer.stream, offer.entry, "r1") == Stale()
    assert not (await bench.store.touch(begun.lease)).owner
    begun = await bench.begun(bench.job("r2"))
    await bench.store.cancel("r2", "x")
    touched = await bench.store.touch(begun.lease)
    assert (touched.owner, touched.cancel) == (False, True)
    for request_id in ("r1", "r2"):
        assert (await bench.journal(request_id)).end == End("cancelled", "x")


async def test_a_stop_string_cuts_the_only_choice_and_finishes(bench: Bench) -> None:
    lease = await bench.committed()
    await bench.append(lease, tokens([1], [2, 3, 4]))
    stops = {0: (2, chain("", [1, 2]))}
    assert await bench.store.cancel("r", "stop_string", force=True, upto=stops) == "ended"
    state = await bench.journal()
    assert (state.choices[0].tokens, state.choices[0].finish) == ([1, 2], "stop")
    assert state.end == End("finished")
    assert await bench.append(lease, tokens([1, 2, 3, 4], [5])) == [Refused()]


async def test_a_stop_string_ends_one_choice_of_two(bench: Bench) -> None:
    lease = await bench.committed(bench.job(n=2))
    stops = {1: (1, chain("", [1]))}
    assert await bench.store.cancel("r", "stop_string", force=True, upto=stops) == "pending"
    results = await bench.append(lease, tokens([1], [2], 0), tokens([1], [2], 1))
    assert results == [Appended(), Cancelled(choice_only=True)]
    assert await bench.append(lease, tokens([1, 2], [3], 0, "stop")) == [Appended(done=True)]
    state = await bench.journal(n=2)
    assert [choice.tokens for choice in state.choices] == [[1, 2, 3], [1]]


async def test_a_stop_string_beyond_what_redis_has_waits(bench: Bench) -> None:
    lease = await bench.committed()
    assert await bench.store.cancel("r", "stop_string", upto={0: (3, "0" * 16)}) == "pending"
    assert await bench.append(lease, tokens([1], [2])) == [Appended()]


# ---- deadlines --------------------------------------------------------------------------------------


async def _begin(bench: Bench) -> tuple[Bench, Lease | None]:
    await bench.store.submit(bench.job(budget_ms=1))
    where = await bench.read(bench.prefill)
    await passed(bench, 2)
    assert await bench.store.begin(*where, "r", "p") == Ended()
    return bench, None


async def _poll(bench: Bench) -> None:
    await bench.store.submit(bench.job(budget_ms=1))
    await passed(bench, 2)
    polled = await bench.store.poll("r", "g")
    assert polled is not None
    assert polled.state == "done"


async def _running(bench: Bench) -> tuple[Lease, Offer]:
    begun, offer = await bench.offered(bench.job(budget_ms=10_000))
    assert begun.remaining_ms is not None
    assert 0 < begun.remaining_ms <= 10_000
    await bench.client.hset(bench.keys.request("r"), "deadline", "1")
    return begun.lease, offer


async def _touch(bench: Bench) -> None:
    lease, _ = await _running(bench)
    assert not (await bench.store.touch(lease)).owner


async def _append(bench: Bench) -> None:
    lease, _ = await _running(bench)
    assert await bench.append(lease, tokens([], [1])) == [Cancelled()]


async def _take(bench: Bench) -> None:
    _, offer = await _running(bench)
    assert await bench.store.take(offer.stream, offer.entry, "r") == Stale()


async def _commit(bench: Bench) -> None:
    _, offer = await _running(bench)
    assert await bench.store.commit(offer, "d:1", []) == Ended()


async def _sweep(bench: Bench) -> None:
    lease, _ = await _running(bench)
    assert await bench.store.sweep(lease.stream, lease.entry, "r", counted=True) == "ended"


@pytest.mark.parametrize("step", [_begin, _poll, _touch, _append, _take, _commit, _sweep])
async def test_an_overdue_request_ends_wherever_it_is(bench: Bench, step: Callable[[Bench], Awaitable[object]]) -> None:
    await step(bench)
    end = (await bench.journal()).end
    assert end is not None
    assert (end.outcome, end.code) == ("error", "deadline_exceeded")
    stale = [(stream, entry) for stream, entry, _ in await bench.queue("p").pending_own()]
    assert stale == []


async def test_a_last_token_in_time_is_a_finish_even_after_the_deadline(bench: Bench) -> None:
    lease, _ = await _running(bench)
    assert await bench.append(lease, tokens([], [1], finish="stop")) == [Appended(done=True)]
    assert (await bench.journal()).end == End("finished")


# ---- sweep ------------------------------------------------------------------------------------


async def test_an_offer_is_handed_on_five_times_then_recomputed(bench: Bench) -> None:
    begun, offer = await bench.offered()
    where = offer.stream, offer.entry
    for _ in range(5):
        assert await bench.store.sweep(*where, "r", counted=False) == "offered"
        where = await bench.read(bench.decode, "d")
        taken = await bench.store.take(*where, "r")
        assert isinstance(taken, Offer)
        assert (taken.nonce, taken.address) == (begun.lease.nonce, b"address")
    assert await bench.store.sweep(*where, "r", counted=False) == "requeued"
    assert not (await bench.store.touch(begun.lease)).owner
    assert await bench.field("bounce") == "0"


async def test_sweeping_a_zombies_entry_does_not_touch_the_new_owner(bench: Bench) -> None:
    lease = await bench.committed()
    assert await bench.store.sweep(lease.stream, lease.entry, "r", counted=True) == "requeued"
    begun = await bench.store.begin(*await bench.read(bench.prefill), "r", "p2")
    assert isinstance(begun, Begun)
    assert await bench.store.sweep(lease.stream, lease.entry, "r", counted=True) == "stale"
    assert (await bench.store.touch(begun.lease)).owner


# ---- private streams ------------------------------------------------------------------------------------


async def test_a_self_test_travels_on_its_own_streams(bench: Bench) -> None:
    prefill, decode = bench.keys.private_work("prefill", "m", "w1"), bench.keys.probe_work("decode", "m")
    lease = await bench.committed(bench.job(prefill_stream=prefill, decode_stream=decode), "w1")
    assert isinstance(lease, Lease)
    assert await bench.store.requeue(lease)
    assert await bench.num_entries() == 0, "nothing of it is on the model's streams"
    assert await bench.client.xlen(prefill) == 1
    queue = bench.queue("w1", prefill)
    await queue.refresh_private([prefill], 20)
    deadline = time.monotonic() + 5
    while await bench.client.exists(prefill):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    assert await queue.read(1, 0) == [], "a lost group is made again"
    assert await bench.client.exists(prefill)


async def test_commit_after_take_by_two_workers_has_one_winner(bench: Bench) -> None:
    _, offer = await bench.offered()
    answers = [await bench.store.commit(offer, owner, [tokens([], [1])]) for owner in ("d1:1", "d2:2")]
    assert [type(answer) for answer in answers] == [Committed, Refused]
