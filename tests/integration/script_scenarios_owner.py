"""What only the holder of a request, or of its one entry, may do: a scenario for each compare of who calls.

Each takes a `Lab` and asserts what holds with the shipped scripts and breaks without the compare.
"""

from __future__ import annotations

from dataclasses import replace

from shared.bus.results import Appended, Begun, Behind, Committed, Conflict, Lease, Offer, Refused, Stale
from shared.protocol.journal import chain
from tests.integration.bus_helpers import tokens
from tests.integration.script_lab import Lab


def zombie(lease: Lease) -> Lease:
    """The same epoch, another begin."""
    return replace(lease, owner="p:ffff")


async def only_the_owner(lab: Lab) -> None:
    lease = zombie(await lab.committed())
    assert await lab.append(lease, tokens([1], [2])) == [Refused()]
    assert not (await lab.store.touch(lease)).owner
    assert not await lab.store.requeue(lease)
    assert not await lab.store.fail(lease, "engine_error", "x")
    assert await lab.field("state") == "decode"


async def only_the_owners_epoch(lab: Lab) -> None:
    lease = replace(await lab.committed(), epoch=1)
    assert await lab.append(lease, tokens([1], [2])) == [Refused()]
    assert not (await lab.store.touch(lease)).owner


async def nobody_owns_what_has_ended(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.store.fail(lease, "engine_error", "x")
    epoch = int(await lab.field("epoch"))
    assert not await lab.store.fail(replace(lease, epoch=epoch, owner=""), "engine_error", "twice")


async def nothing_is_appended_to_what_has_ended(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.store.fail(lease, "engine_error", "x")
    epoch, ev = int(await lab.field("epoch")), await lab.field("ev")
    assert await lab.append(replace(lease, epoch=epoch, owner=""), tokens([1], [2])) == [Refused()]
    assert await lab.field("ev") == ev


async def nobody_owns_what_is_gone(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.forget(request=True, journal=True)
    assert await lab.append(lease, tokens([1], [2])) == [Refused()]
    assert not (await lab.store.touch(lease)).owner


async def append_is_the_owners(lab: Lab) -> None:
    lease = await lab.committed()
    assert await lab.append(zombie(lease), tokens([1], [2])) == [Refused()]


async def touch_is_the_owners(lab: Lab) -> None:
    assert not (await lab.store.touch(zombie(await lab.committed()))).owner


async def requeue_is_the_owners(lab: Lab) -> None:
    lease = await lab.committed()
    assert not await lab.store.requeue(zombie(lease))
    assert await lab.append(lease, tokens([1], [2])) == [Appended()]


async def fail_is_the_owners(lab: Lab) -> None:
    assert not await lab.store.fail(zombie(await lab.committed()), "engine_error", "x")
    assert await lab.field("state") == "decode"


async def offer_is_the_owners(lab: Lab) -> None:
    begun = await lab.begun()
    assert await lab.store.offer(zombie(begun.lease), b"x") == Refused()
    assert await lab.client.exists(lab.decode) == 0


async def offer_is_for_prefill(lab: Lab) -> None:
    lease = await lab.committed()
    assert await lab.store.offer(lease, b"x") == Refused()


async def begin_needs_the_standing_id(lab: Lab) -> None:
    await lab.store.submit(lab.job())
    await lab.read(lab.prefill)
    assert await lab.store.begin(lab.prefill, "1-1", "r", "p") == Stale()


async def begin_needs_the_standing_stream(lab: Lab) -> None:
    await lab.store.submit(lab.job())
    _, entry = await lab.read(lab.prefill)
    assert await lab.store.begin(lab.decode, entry, "r", "p") == Stale()


async def begin_needs_a_request(lab: Lab) -> None:
    await lab.store.submit(lab.job())
    where = await lab.read(lab.prefill)
    await lab.forget(request=True, journal=True)
    assert await lab.store.begin(*where, "r", "p") == Stale()
    assert await lab.num_entries() == await lab.num_pending() == 0, "what stands for nothing is removed"


async def begin_is_for_the_queue(lab: Lab) -> None:
    begun = await lab.begun()
    assert await lab.store.begin(begun.lease.stream, begun.lease.entry, "r", "p2") == Stale()
    assert (await lab.store.touch(begun.lease)).owner


async def begin_repeats_for_its_nonce(lab: Lab) -> None:
    await lab.store.submit(lab.job())
    where = await lab.read(lab.prefill)
    first = await lab.store.begin(*where, "r", "p", "aa")
    assert isinstance(first, Begun)
    assert await lab.store.begin(*where, "r", "p", "aa") == first
    assert await lab.store.begin(*where, "r", "p2", "bb") == Stale()


async def begin_is_no_repeat_of_a_commit(lab: Lab) -> None:
    lease = await lab.committed()
    worker, _, nonce = lease.owner.partition(":")
    assert await lab.store.begin(lease.stream, lease.entry, "r", worker, nonce) == Stale()


async def take_needs_the_standing_offer(lab: Lab) -> None:
    _, offer = await lab.offered()
    assert await lab.store.take(offer.stream, "1-1", "r") == Stale()
    assert isinstance(await lab.store.take(offer.stream, offer.entry, "r"), Offer)


async def take_needs_the_decode_stream(lab: Lab) -> None:
    _, offer = await lab.offered()
    assert await lab.store.take(lab.prefill, offer.entry, "r") == Stale()


async def take_is_not_for_the_entry(lab: Lab) -> None:
    begun, _ = await lab.offered()
    assert await lab.store.take(begun.lease.stream, begun.lease.entry, "r") == Stale()
    assert await lab.client.xlen(lab.prefill) == 1, "the entry stands all the same"


async def an_offer_that_was_replaced_is_stale(lab: Lab) -> None:
    begun, first = await lab.offered()
    assert isinstance(await lab.store.offer(begun.lease, b"elsewhere"), str)
    assert await lab.store.take(first.stream, first.entry, "r") == Stale()
    assert await lab.client.xlen(lab.decode) == 1


async def an_undelivered_offer_stays(lab: Lab) -> None:
    """Deleting it would falsify the group's lag."""
    begun = await lab.begun()
    await lab.queue("d", lab.decode).ensure()
    await lab.store.offer(begun.lease, b"x")
    await lab.store.offer(begun.lease, b"x")
    assert await lab.client.xlen(lab.decode) == 2


async def touch_sees_the_offer_go(lab: Lab) -> None:
    begun, offer = await lab.offered()
    assert (await lab.store.touch(begun.lease)).offer_live
    await lab.client.xdel(offer.stream, offer.entry)
    assert not (await lab.store.touch(begun.lease)).offer_live


async def touch_sees_no_offer_before_one_is_made(lab: Lab) -> None:
    begun = await lab.begun()
    assert not (await lab.store.touch(begun.lease)).offer_live


async def commit_repeats_for_its_owner(lab: Lab) -> None:
    _, offer = await lab.offered()
    first = await lab.store.commit(offer, "d:1", [tokens([], [1])])
    assert isinstance(first, Committed)
    assert await lab.store.commit(offer, "d:1", [tokens([], [1])]) == first
    assert await lab.store.commit(offer, "d:2", [tokens([], [1])]) == Refused()
    assert await lab.store.commit(replace(offer, entry="1-1"), "d:1", []) == Refused()
    assert (await lab.store.touch(first.lease)).owner


async def commit_is_no_repeat_of_a_begin(lab: Lab) -> None:
    begun, offer = await lab.offered()
    own = replace(offer, stream=begun.lease.stream, entry=begun.lease.entry)
    assert await lab.store.commit(own, begun.lease.owner, []) == Refused()


async def commit_of_what_is_gone(lab: Lab) -> None:
    _, offer = await lab.offered()
    await lab.forget(request=True, journal=True)
    assert await lab.store.commit(offer, "d:1", []) == Refused()


async def commit_needs_the_offer(lab: Lab) -> None:
    begun, offer = await lab.offered()
    own = replace(offer, stream=begun.lease.stream, entry=begun.lease.entry)
    assert await lab.store.commit(own, "d:1", []) == Refused()
    assert await lab.store.commit(replace(offer, entry="1-1"), "d:1", []) == Refused()
    assert await lab.field("state") == "prefill"


async def commit_needs_the_epoch(lab: Lab) -> None:
    _, offer = await lab.offered()
    assert await lab.store.commit(replace(offer, epoch=1), "d:1", []) == Refused()


async def commit_needs_the_nonce(lab: Lab) -> None:
    _, offer = await lab.offered()
    assert await lab.store.commit(replace(offer, nonce="ffff"), "d:1", []) == Refused()


async def commit_tells_the_difference(lab: Lab) -> None:
    """Tokens of another attempt are not taken for the journal's."""
    begun, offer = await lab.offered()
    await lab.append(begun.lease, tokens([], [1]))
    assert await lab.store.commit(offer, "d:1", [tokens([], [9])]) == Behind(1, chain("", [1]))
    assert await lab.field("state") == "prefill"


async def commit_refuses_an_unknown_choice(lab: Lab) -> None:
    _, offer = await lab.offered()
    assert await lab.store.commit(offer, "d:1", [tokens([], [1], choice=3)]) == Refused()
    assert await lab.field("state") == "prefill"


async def sweep_leaves_what_stands_for_nothing(lab: Lab) -> None:
    lease = await lab.committed()
    assert await lab.store.sweep(lab.prefill, "1-1", "r", True) == "stale"
    assert (await lab.store.touch(lease)).owner


async def a_conflict_names_the_holder(lab: Lab) -> None:
    await lab.store.submit(lab.job())
    assert await lab.store.submit(lab.job(gateway="g2")) == Conflict("queued", "g")
    assert await lab.num_entries() == 1


async def repair_is_the_gateways(lab: Lab) -> None:
    lease = await lab.committed()
    assert not await lab.store.repair("r", "g2", [[8]], 9)
    assert (await lab.store.touch(lease)).owner


async def repair_of_what_is_gone(lab: Lab) -> None:
    assert not await lab.store.repair("r", "", [[8]], 9)
    assert await lab.is_gone()


async def cancel_is_the_holding_gateways(lab: Lab) -> None:
    lease = await lab.committed()
    assert await lab.store.cancel("r", "orphaned", force=True, gateway="g2") == "not_yours"
    assert (await lab.store.touch(lease)).owner


async def cancel_without_a_name_is_anybodys(lab: Lab) -> None:
    await lab.committed()
    assert await lab.store.cancel("r", "operator", force=True) == "ended"


async def poll_of_a_stranger_keeps_nothing_alive(lab: Lab) -> None:
    await lab.committed()
    await lab.nearly_expired()
    assert await lab.store.poll("r", "g2") is not None
    assert max(await lab.lifetimes()) <= 10_000


async def poll_reads_past_an_id(lab: Lab) -> None:
    await lab.committed()
    whole = await lab.store.poll("r", "g")
    assert whole is not None
    rest = await lab.store.poll("r", "g", whole.entries[0].id)
    assert rest is not None
    assert rest.entries == whole.entries[1:]


async def a_consumer_that_holds_entries_stays(lab: Lab) -> None:
    await lab.begun()
    forget = lab.script("forget_consumer")
    assert await forget(lab.client, [lab.prefill], ["p"]) == 0
    assert await lab.num_pending() == 1
    await lab.client.xgroup_createconsumer(lab.prefill, "workers", "idle")
    assert await forget(lab.client, [lab.prefill], ["idle"]) == 1


async def adoption_names_who_must_hold_it(lab: Lab) -> None:
    await lab.committed()
    found = await lab.store.adopt("r", "g2", "g3")
    assert found is not None
    assert found[1].gateway == "g", "somebody else had adopted it meanwhile"
    found = await lab.store.adopt("r", "g2", "g")
    assert found is not None
    assert found[1].gateway == "g2"


async def a_gateway_holds_its_own_itself(lab: Lab) -> None:
    await lab.committed()
    await lab.client.set(lab.keys.gateway("g"), b"", px=10_000)
    mine, others = await lab.store.poll("r", "g"), await lab.store.poll("r", "g2")
    assert mine is not None
    assert others is not None
    assert (mine.held_elsewhere, others.held_elsewhere) == (False, True)


async def a_claim_needs_what_was_seen(lab: Lab) -> None:
    claim, key = lab.script("claim"), lab.keys.idempotency("0" * 64)
    assert await claim(lab.client, [key], ["", "first", 10_000]) == b"claimed"
    reply = await claim(lab.client, [key], ["", "second", 10_000])
    assert reply != b"claimed"
    assert reply[0] == b"first"
    assert 0 < reply[1] <= 10_000
    assert await claim(lab.client, [key], ["first", "second", 10_000]) == b"claimed"
    assert await lab.client.get(key) == b"second"


async def a_claim_is_taken_off(lab: Lab) -> None:
    claim, key = lab.script("claim"), lab.keys.idempotency("0" * 64)
    await claim(lab.client, [key], ["", "first", 10_000])
    assert await claim(lab.client, [key], ["first", "", 10_000]) == b"claimed"
    assert await lab.client.exists(key) == 0
