"""Which deaths of workers are a request's fault, which clear it again, and what is noted of one that was given up."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from shared.bus.connection import as_text
from shared.bus.requests import MAX_BOUNCES, MAX_DEATHS, MAX_KILLS
from shared.bus.results import Begun, Committed, Lease, Offer
from shared.protocol.keys import Keys
from tests.integration.bus_helpers import Bench, tokens


@pytest.fixture
def bench(redis_client: Redis, keys: Keys) -> Bench:
    return Bench.of(redis_client, keys)


async def begin_again(bench: Bench) -> Lease:
    begun = await bench.store.begin(*await bench.read(bench.prefill), "r", "p")
    assert isinstance(begun, Begun)
    return begun.lease


async def die(bench: Bench, lease: Lease) -> str:
    """The worker of that lease dies and is swept."""
    return await bench.store.sweep(lease.stream, lease.entry, "r", counted=True)


async def commit_again(bench: Bench) -> Lease:
    """Through prefill, which samples one token, to the ownership of a decode worker."""
    lease = await begin_again(bench)
    held = (await bench.journal()).choices[0].tokens
    await bench.append(lease, tokens(held, [7]))
    await bench.store.offer(lease, b"address")
    offer = await bench.store.take(*await bench.read(bench.decode, "d"), "r")
    assert isinstance(offer, Offer)
    committed = await bench.store.commit(offer, f"d:{next(bench.numbers)}x", [tokens(held, [7])])
    assert isinstance(committed, Committed)
    return committed.lease


async def deaths(bench: Bench) -> tuple[int, int]:
    """(deaths since the last progress, deaths in the request's life)"""
    return int(await bench.field("deaths")), int(await bench.field("kills"))


# ---- what counts ---------------------------------------------------------------------------------


async def test_the_second_death_without_progress_quarantines(bench: Bench) -> None:
    lease = (await bench.begun()).lease
    assert await die(bench, lease) == "requeued"
    assert await deaths(bench) == (1, 1)
    assert await die(bench, await begin_again(bench)) == "dead"
    end = (await bench.journal()).end
    assert end is not None
    assert (end.outcome, end.code) == ("error", "request_quarantined")
    assert await bench.num_entries() == await bench.num_pending() == 0


async def test_a_death_in_decode_and_one_in_the_prefill_after_it_are_two(bench: Bench) -> None:
    assert await die(bench, await bench.committed()) == "requeued"
    assert await die(bench, await begin_again(bench)) == "dead"


async def test_an_entry_that_nobody_began_costs_nothing(bench: Bench) -> None:
    await bench.store.submit(bench.job())
    for _ in range(MAX_KILLS + 1):
        assert await bench.store.sweep(*await bench.read(bench.prefill), "r", counted=True) == "requeued"
    assert await deaths(bench) == (0, 0)


async def test_an_offer_of_a_dead_decode_worker_makes_no_suspect(bench: Bench) -> None:
    _, offer = await bench.offered()
    where = offer.stream, offer.entry
    for _ in range(MAX_BOUNCES):
        assert await bench.store.sweep(*where, "r", counted=True) == "offered"
        where = await bench.read(bench.decode, "d")
    assert await bench.store.sweep(*where, "r", counted=True) == "requeued"
    assert await deaths(bench) == (0, MAX_BOUNCES + 1)


async def test_what_kills_every_decode_worker_that_pulls_it_is_put_away(bench: Bench) -> None:
    _, offer = await bench.offered()
    await bench.store.sweep(offer.stream, offer.entry, "r", counted=True)
    assert await deaths(bench) == (0, 1)
    await bench.client.hset(bench.keys.request("r"), "kills", str(MAX_KILLS - 1))
    assert await bench.store.sweep(*await bench.read(bench.decode, "d"), "r", counted=True) == "dead"


async def test_handing_back_costs_nothing(bench: Bench) -> None:
    lease = (await bench.begun()).lease
    for _ in range(MAX_KILLS + 1):
        assert await bench.store.sweep(lease.stream, lease.entry, "r", counted=False) == "requeued"
        lease = await begin_again(bench)
        assert await bench.store.requeue(lease)
        lease = await begin_again(bench)
    assert await deaths(bench) == (0, 0)


async def test_prefill_that_waits_for_a_reader_did_not_die_of_the_prompt(bench: Bench) -> None:
    lease = (await bench.begun()).lease
    await bench.append(lease, tokens([], [1]))
    assert await die(bench, lease) == "requeued"
    assert await deaths(bench) == (0, 1)
    lease = await begin_again(bench)
    assert (await bench.store.touch(lease, computed=True)).owner
    assert await die(bench, lease) == "requeued"
    assert await deaths(bench) == (0, 2)
    assert await die(bench, await begin_again(bench)) == "requeued", "a new attempt computes anew"
    assert await deaths(bench) == (1, 3)


async def test_a_finish_without_tokens_says_nothing_of_the_prompt(bench: Bench) -> None:
    lease = (await bench.begun(bench.job(n=2))).lease
    await bench.append(lease, tokens([], [], finish="length"))
    assert await die(bench, lease) == "requeued"
    assert await deaths(bench) == (1, 1)


async def test_a_request_that_fails_in_living_workers_is_a_suspect_too(bench: Bench) -> None:
    lease = (await bench.begun()).lease
    await bench.append(lease, tokens([], [1]))
    assert await bench.store.strike(lease.stream, lease.entry, "r") == "requeued"
    assert await deaths(bench) == (1, 1)
    lease = await begin_again(bench)
    assert await bench.store.strike(lease.stream, lease.entry, "r") == "dead"
    assert await bench.store.strike(lease.stream, lease.entry, "r") == "stale"


async def test_an_offer_that_no_decode_worker_can_read_ends(bench: Bench) -> None:
    await bench.store.submit(bench.job())
    for round_number in range(MAX_DEATHS):
        lease = await begin_again(bench)
        await bench.store.offer(lease, b"unreadable")
        for bounce in range(MAX_BOUNCES + 1):
            outcome = await bench.store.strike(*await bench.read(bench.decode, "d"), "r")
            last = ("requeued", "dead")[round_number] if bounce == MAX_BOUNCES else "offered"
            assert outcome == last
    assert await bench.num_entries() == await bench.num_pending() == 0


# ---- what clears ---------------------------------------------------------------------------------


async def test_a_token_of_a_decode_worker_clears(bench: Bench) -> None:
    lease = await bench.committed()
    for death in range(1, MAX_KILLS):
        assert await die(bench, lease) == "requeued"
        lease = await commit_again(bench)
        assert await deaths(bench) == (1, death), "prefill's own token clears nothing"
        held = (await bench.journal()).choices[0].tokens
        await bench.append(lease, tokens(held, [8]))
        assert await deaths(bench) == (0, death)
    assert await die(bench, lease) == "dead", f"{MAX_KILLS} deaths are too many for one life"


async def test_a_death_in_decode_is_not_cleared_by_a_commit(bench: Bench) -> None:
    assert await die(bench, await bench.committed()) == "requeued"
    assert await die(bench, await commit_again(bench)) == "dead"


async def test_a_death_in_prefill_is_cleared_by_a_commit(bench: Bench) -> None:
    assert await die(bench, (await bench.begun()).lease) == "requeued"
    lease = await commit_again(bench)
    assert await deaths(bench) == (0, 1)
    assert await die(bench, lease) == "requeued"


async def test_a_refused_append_clears_nothing(bench: Bench) -> None:
    lease = await bench.committed()
    await die(bench, lease)
    await commit_again(bench)
    await bench.append(lease, tokens([1], [9]))
    assert await deaths(bench) == (1, 1)


# ---- what workers and people hear of it ----------------------------------------------------------


async def test_a_worker_sees_a_suspect_before_it_begins(bench: Bench) -> None:
    await die(bench, (await bench.begun()).lease)
    (item,) = await bench.queue("p2", bench.prefill).read(1, 0)
    assert item[2] == {"id": "r", "deaths": "1"}
    begun = await bench.store.begin(item[0], item[1], "r", "p2")
    assert isinstance(begun, Begun)
    assert begun.deaths == 1


async def test_the_note_says_what_died_where_and_nothing_of_the_prompt(bench: Bench) -> None:
    await die(bench, await bench.committed(bench.job(prompt_ids=(71, 72, 73, 74))))
    lease = await commit_again(bench)
    before = int((await bench.client.time())[0]) * 1000
    await die(bench, lease)
    dead = await bench.client.xrange(bench.keys.dead)
    assert dead is not None
    ((_, fields),) = dead
    assert fields is not None
    note = {as_text(name): as_text(value) for name, value in fields.items()}
    assert before - 1000 <= int(note.pop("time")) <= before + 60_000
    assert note == {
        "id": "r",
        "reason": "request_quarantined",
        "deaths": "2",
        "kills": "2",
        "epoch": "4",
        "model": "m",
        "role": "decode",
        "prompt": "4",
        "tokens": "2",
        "gateway": "g",
    }
