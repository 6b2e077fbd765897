"""Each script's compare, on the real server: what it lets through, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from redis.asyncio import Redis

from shared.bus.requests import Append
from shared.bus.results import (
    Appended,
    Begun,
    Behind,
    Cancelled,
    Committed,
    Conflict,
    Ended,
    Lease,
    Offer,
    Refused,
    Stale,
    Submitted,
)
from shared.protocol.journal import chain
from shared.protocol.keys import Keys
from shared.protocol.messages import End, Usage
from tests.integration.bus_helpers import Bench, tokens


@pytest.fixture
def bench(redis_client: Redis, keys: Keys) -> Bench:
    return Bench.of(redis_client, keys)


def zombie(lease: Lease) -> Lease:
    """The same epoch, another begin."""
    return replace(lease, owner="p:ffff")


async def test_a_request_goes_through_all_its_states(bench: Bench) -> None:
    lease = await bench.committed()
    usage = Usage(transport="shm", kv_bytes=7)
    await bench.store.append([Append(lease, tokens([1], [2, 3]), usage)])
    assert await bench.append(lease, tokens([1, 2, 3], [4], finish="stop")) == [Appended(done=True)]
    state = await bench.journal()
    assert state.choices[0].tokens == [1, 2, 3, 4]
    assert state.end == End("finished", usage=usage)
    assert await bench.num_entries() == await bench.num_pending() == 0
    assert 0 < await bench.client.pttl(bench.keys.request("r")) <= 60_000
    assert 0 < await bench.client.pttl(bench.keys.log("r")) <= 60_000


async def test_submit_refuses_an_id_that_exists(bench: Bench) -> None:
    assert isinstance(await bench.store.submit(bench.job()), Submitted)
    assert await bench.store.submit(bench.job(gateway="g2")) == Conflict("queued", "g")
    assert await bench.num_entries() == 1


async def test_submit_of_a_forgotten_request_goes_on_from_the_snapshot(bench: Bench) -> None:
    await bench.store.submit(bench.job(n=2), [[1, 2], [5]], emax=7, finished={1: "stop"})
    begun = await bench.store.begin(*await bench.read(bench.prefill), "r", "p")
    assert isinstance(begun, Begun)
    assert begun.epoch == 9
    state = await bench.journal(n=2)
    assert [choice.tokens for choice in state.choices] == [[1, 2], [5]]
    assert [choice.finish for choice in state.choices] == [None, "stop"]
    assert await bench.append(begun.lease, tokens([1, 2], [3], finish="length")) == [Appended(done=True)]


async def test_submit_of_a_complete_snapshot_ends_at_once(bench: Bench) -> None:
    assert await bench.store.submit(bench.job(), [[1]], emax=3, finished={0: "stop"}) == Submitted("")
    assert (await bench.journal()).end == End("finished")
    assert await bench.num_entries() == 0


async def test_begin_needs_the_standing_entry_of_a_queued_request(bench: Bench) -> None:
    begun = await bench.begun()
    where = begun.lease.stream, begun.lease.entry
    assert begun.epoch == 2
    assert begun.lease.owner.startswith("p:")
    assert await bench.store.begin(*where, "r", "p2") == Stale()
    assert await bench.num_entries() == 1, "an entry that stands is not removed by somebody else's begin"
    assert await bench.store.begin(where[0], "1-1", "r", "p2") == Stale()
    assert await bench.store.begin(*where, "unknown", "p2") == Stale()
    assert await bench.num_entries() == 0, "an entry that stands for nothing is removed"


async def test_begin_may_be_repeated_with_its_nonce(bench: Bench) -> None:
    await bench.store.submit(bench.job())
    where = await bench.read(bench.prefill)
    first = await bench.store.begin(*where, "r", "p", "aa")
    assert await bench.store.begin(*where, "r", "p", "aa") == first
    assert await bench.store.begin(*where, "r", "p", "bb") == Stale()


async def test_offer_needs_the_owner_and_replaces_a_delivered_offer(bench: Bench) -> None:
    begun, first = await bench.offered()
    assert await bench.store.offer(zombie(begun.lease), b"x") == Refused()
    assert await bench.store.offer(replace(begun.lease, epoch=1), b"x") == Refused()
    second = await bench.store.offer(begun.lease, b"elsewhere")
    assert isinstance(second, str)
    assert await bench.store.take(first.stream, first.entry, "r") == Stale()
    assert await bench.client.xlen(bench.decode) == 1


async def test_take_shows_the_offer_and_changes_nothing(bench: Bench) -> None:
    begun, offer = await bench.offered()
    assert (offer.epoch, offer.nonce, offer.address) == (begun.epoch, begun.lease.nonce, b"address")
    assert offer.job == begun.job
    again = await bench.store.take(offer.stream, offer.entry, "r")
    assert isinstance(again, Offer)
    assert await bench.field("state") == "prefill"


async def test_touch_tells_the_owner_and_whether_the_offer_stands(bench: Bench) -> None:
    begun = await bench.begun()
    assert not (await bench.store.touch(begun.lease)).offer_live
    await bench.store.offer(begun.lease, b"x")
    touched = await bench.store.touch(begun.lease)
    assert (touched.owner, touched.offer_live, touched.remaining_ms) == (True, True, None)
    assert not (await bench.store.touch(zombie(begun.lease))).owner
    stream, entry = await bench.read(bench.decode, "d")
    await bench.client.xdel(stream, entry)
    assert not (await bench.store.touch(begun.lease)).offer_live


async def test_append_compares_epoch_owner_length_and_hash(bench: Bench) -> None:
    begun = await bench.begun()
    lease = begun.lease
    assert await bench.append(lease, tokens([], [1, 2])) == [Appended()]
    assert await bench.append(lease, tokens([], [1, 2])) == [Appended()], "a repeat is the same"
    assert await bench.append(zombie(lease), tokens([1, 2], [3])) == [Refused()]
    assert await bench.append(replace(lease, epoch=1), tokens([1, 2], [3])) == [Refused()]
    assert await bench.append(lease, tokens([1, 9], [3])) == [Behind(2, chain("", [1, 2]))]
    assert await bench.append(lease, tokens([1, 2, 3], [4])) == [Behind(2, chain("", [1, 2]))]
    assert await bench.append(lease, tokens([], [1, 2, 3])) == [Behind(2, chain("", [1, 2]))]
    assert await bench.append(lease, tokens([1, 2], [3], choice=5)) == [Refused()]
    assert (await bench.journal()).choices[0].tokens == [1, 2]


async def test_many_appends_are_one_publication_a_gateway(bench: Bench) -> None:
    leases = [await bench.committed(bench.job(f"r{i}")) for i in range(70)]
    published = int((await bench.client.info("stats")).get("total_commands_processed", 0))
    results = await bench.store.append([Append(lease, tokens([1], [2])) for lease in leases])
    assert results == [Appended()] * 70
    used = int((await bench.client.info("stats"))["total_commands_processed"]) - published
    assert used < 70 * 12
    for i in (0, 69):
        assert (await bench.journal(f"r{i}")).choices[0].tokens == [1, 2]


async def test_one_bad_append_does_not_hurt_its_neighbours(bench: Bench) -> None:
    good, bad = await bench.committed(bench.job("r1")), await bench.committed(bench.job("r2"))
    results = await bench.store.append([Append(zombie(bad), tokens([1], [2])), Append(good, tokens([1], [2]))])
    assert results == [Refused(), Appended()]


async def test_an_append_after_the_scripts_were_flushed_loads_them_again(bench: Bench) -> None:
    lease = await bench.committed()
    await bench.client.script_flush()
    assert await bench.append(lease, tokens([1], [2])) == [Appended()]


async def test_commit_appends_what_prefill_did_not(bench: Bench) -> None:
    begun, offer = await bench.offered()
    answer = await bench.store.commit(offer, "d:1", [tokens([], [1])])
    assert answer == Committed(Lease("r", begun.epoch, "d:1", offer.stream, offer.entry))
    assert (await bench.journal()).choices[0].tokens == [1]
    assert await bench.client.xlen(bench.prefill) == 0, "prefill's entry is gone"
    assert not (await bench.store.touch(begun.lease)).owner
    assert await bench.store.commit(offer, "d:1", [tokens([], [1])]) == answer, "a repeat is the same"
    assert await bench.store.commit(offer, "d:2", [tokens([], [1])]) == Refused()


async def test_commit_takes_tokens_prefill_appended_itself(bench: Bench) -> None:
    begun, offer = await bench.offered()
    await bench.append(begun.lease, tokens([], [1]))
    assert isinstance(await bench.store.commit(offer, "d:1", [tokens([], [1])]), Committed)
    assert (await bench.journal()).choices[0].tokens == [1]


async def test_commit_refuses_other_tokens_than_the_journal_has(bench: Bench) -> None:
    begun, offer = await bench.offered()
    await bench.append(begun.lease, tokens([], [1]))
    assert await bench.store.commit(offer, "d:1", [tokens([], [9])]) == Behind(1, chain("", [1]))
    assert await bench.field("state") == "prefill"


@pytest.mark.parametrize("change", [{"epoch": 1}, {"nonce": "ffff"}, {"entry": "1-1"}])
async def test_commit_compares_epoch_nonce_and_offer(bench: Bench, change: dict[str, object]) -> None:
    _, offer = await bench.offered()
    assert await bench.store.commit(replace(offer, **change), "d:1", []) == Refused()  # type: ignore[arg-type]
    assert await bench.field("state") == "prefill"


async def test_commit_of_a_first_token_that_is_the_last_ends(bench: Bench) -> None:
    _, offer = await bench.offered()
    assert await bench.store.commit(offer, "d:1", [tokens([], [1], finish="stop")]) == Ended()
    assert (await bench.journal()).end == End("finished")


async def test_commit_may_bring_no_tokens(bench: Bench) -> None:
    _, offer = await bench.offered()
    answer = await bench.store.commit(offer, "d:1", [], Usage(path="recompute", reason="digest"))
    assert isinstance(answer, Committed)
    await bench.append(answer.lease, tokens([], [1], finish="stop"))
    end = (await bench.journal()).end
    assert end is not None
    assert end.usage.reason == "digest"


async def test_requeue_needs_the_owner_and_fences_it(bench: Bench) -> None:
    lease = await bench.committed()
    assert not await bench.store.requeue(zombie(lease))
    assert await bench.store.requeue(lease)
    assert not await bench.store.requeue(lease)
    assert await bench.append(lease, tokens([1], [2])) == [Refused()]
    begun = await bench.store.begin(*await bench.read(bench.prefill), "r", "p2")
    assert isinstance(begun, Begun)
    assert begun.deaths == 0
    assert (await bench.journal()).choices[0].tokens == [1]


async def test_fail_ends_with_the_owners_error(bench: Bench) -> None:
    lease = await bench.committed()
    assert not await bench.store.fail(zombie(lease), "engine_error", "x")
    assert await bench.store.fail(lease, "engine_error", "The sequence failed.")
    assert (await bench.journal()).end == End("error", "engine_error", "The sequence failed.")
    assert not await bench.store.fail(lease, "engine_error", "x")


async def test_repair_needs_the_gateway_and_a_live_request(bench: Bench) -> None:
    lease = await bench.committed()
    assert not await bench.store.repair("r", "g2", [[8]], 9)
    assert await bench.store.repair("r", "g", [[8, 9]], 9)
    assert await bench.append(lease, tokens([1], [2])) == [Refused()]
    state = await bench.journal()
    assert (state.choices[0].tokens, state.epoch) == ([8, 9], 10)
    begun = await bench.store.begin(*await bench.read(bench.prefill), "r", "p2")
    assert isinstance(begun, Begun)
    await bench.append(begun.lease, tokens([8, 9], [7], finish="stop"))
    assert not await bench.store.repair("r", "g", [[8]], 99)


async def test_nothing_brings_a_vanished_request_back(bench: Bench) -> None:
    begun, offer = await bench.offered()
    lease = begun.lease
    await bench.client.delete(bench.keys.request("r"), bench.keys.log("r"))
    assert await bench.append(lease, tokens([], [1])) == [Refused()]
    assert await bench.store.offer(lease, b"x") == Refused()
    assert await bench.store.commit(offer, "d:1", []) == Refused()
    assert not (await bench.store.touch(lease)).owner
    assert not await bench.store.requeue(lease)
    assert await bench.store.cancel("r", "x", force=True) == "gone"
    assert await bench.store.poll("r", "g") is None
    assert await bench.store.adopt("r", "g") is None
    assert await bench.client.exists(bench.keys.request("r"), bench.keys.log("r")) == 0


async def test_a_vanished_journal_takes_its_request_along(bench: Bench) -> None:
    lease = await bench.committed()
    await bench.client.delete(bench.keys.log("r"))
    assert await bench.append(lease, tokens([1], [2])) == [Refused()]
    assert await bench.client.exists(bench.keys.request("r"), bench.keys.log("r")) == 0
    assert await bench.num_entries() == 0


async def test_adopt_moves_the_events_to_another_gateway(bench: Bench) -> None:
    lease = await bench.committed()
    found = await bench.store.adopt("r", "g2")
    assert found is not None
    assert found[0] == bench.job()
    await bench.append(lease, tokens([1], [2]))
    polled = await bench.store.poll("r", "g")
    assert polled is not None
    assert polled.gateway == "g2"
    assert await bench.store.cancel("r", "orphaned", force=True, gateway="g") == "not_yours"


async def test_every_live_script_keeps_both_keys_alive(bench: Bench) -> None:
    begun, offer = await bench.offered()
    for call in (bench.store.touch, lambda lease: bench.store.poll("r", "g")):
        await bench.client.pexpire(bench.keys.request("r"), 1000)
        await bench.client.pexpire(bench.keys.log("r"), 1000)
        await call(begun.lease)
        assert await bench.client.pttl(bench.keys.request("r")) > 1000
        assert await bench.client.pttl(bench.keys.log("r")) > 1000
    assert await bench.store.commit(offer, "d:1", []) is not None


async def test_a_cancelled_request_ends_at_its_owners_next_write(bench: Bench) -> None:
    lease = await bench.committed()
    assert await bench.store.cancel("r", "client_gone") == "pending"
    assert await bench.append(lease, tokens([1], [2])) == [Cancelled()]
    assert (await bench.journal()).end == End("cancelled", "client_gone")
    assert await bench.store.cancel("r", "client_gone") == "done"
    assert await bench.num_entries() == await bench.num_pending() == 0
