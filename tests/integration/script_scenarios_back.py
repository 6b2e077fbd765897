"""How a request comes back to the queue, and what its workers' deaths are charged: a scenario for each compare."""

from __future__ import annotations

from shared.bus.requests import MAX_BOUNCES, MAX_KILLS
from shared.bus.results import Begun, Committed, Offer
from tests.integration.bus_helpers import tokens
from tests.integration.script_lab import Lab
from tests.integration.script_scenarios_ends import outcome


async def charges(lab: Lab) -> tuple[str, str]:
    """(deaths since it last came further, deaths in its whole life)"""
    return await lab.field("deaths"), await lab.field("kills")


async def a_swept_entry_comes_back(lab: Lab) -> None:
    lease = await lab.committed()
    assert await lab.store.sweep(lease.stream, lease.entry, "r", False) == "requeued"
    begun = await lab.store.begin(*await lab.read(lab.prefill), "r", "p2")
    assert isinstance(begun, Begun)
    assert begun.deaths == 0
    assert not (await lab.store.touch(lease)).owner


async def a_swept_offer_is_offered_again(lab: Lab) -> None:
    begun, offer = await lab.offered()
    assert await lab.store.sweep(offer.stream, offer.entry, "r", False) == "offered"
    again = await lab.store.take(*await lab.read(lab.decode, "d2"), "r")
    assert isinstance(again, Offer)
    assert (again.nonce, again.address) == (offer.nonce, offer.address)
    assert (await lab.store.touch(begun.lease)).owner, "the prefill worker has lost nothing"


async def an_offer_bounces_so_often(lab: Lab) -> None:
    await lab.offered()
    entry = await lab.field("offer")
    for _ in range(MAX_BOUNCES):
        assert await lab.store.sweep(lab.decode, entry, "r", False) == "offered"
        _, entry = await lab.read(lab.decode, "d2")
    assert await lab.store.sweep(lab.decode, entry, "r", False) == "requeued"


async def a_swept_entry_of_prefill_is_no_offer(lab: Lab) -> None:
    begun, _ = await lab.offered()
    assert await lab.store.sweep(begun.lease.stream, begun.lease.entry, "r", False) == "requeued"


async def letting_go_is_no_death(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.store.sweep(lease.stream, lease.entry, "r", False)
    assert await charges(lab) == ("0", "0")


async def dying_with_what_is_queued_is_no_death(lab: Lab) -> None:
    await lab.store.submit(lab.job())
    assert await lab.store.sweep(*await lab.read(lab.prefill), "r", True) == "requeued"
    assert await charges(lab) == ("0", "0")


async def dying_with_an_offer_is_no_death(lab: Lab) -> None:
    _, offer = await lab.offered()
    await lab.set("bounce", MAX_BOUNCES)
    assert await lab.store.sweep(offer.stream, offer.entry, "r", True) == "requeued"
    assert await charges(lab) == ("0", "1")


async def dying_with_an_offer_that_bounces_is_a_kill(lab: Lab) -> None:
    """Whoever pulls it may die of it: such a request must not use up workers for ever."""
    _, offer = await lab.offered()
    assert await lab.store.sweep(offer.stream, offer.entry, "r", True) == "offered"
    assert await charges(lab) == ("0", "1")


async def failing_that_bounces_is_free(lab: Lab) -> None:
    """One decode worker cannot read the offer; another may."""
    _, offer = await lab.offered()
    assert await lab.store.strike(offer.stream, offer.entry, "r") == "offered"
    assert await charges(lab) == ("0", "0")


async def failing_is_charged_though_nobody_died(lab: Lab) -> None:
    _, offer = await lab.offered()
    await lab.set("bounce", MAX_BOUNCES)
    assert await lab.store.strike(offer.stream, offer.entry, "r") == "requeued"
    assert await charges(lab) == ("1", "1")
    assert await lab.field("died") == "decode"


async def dying_in_prefill_is_charged(lab: Lab) -> None:
    begun = await lab.begun()
    await lab.store.sweep(begun.lease.stream, begun.lease.entry, "r", True)
    assert await charges(lab) == ("1", "1")
    assert await lab.field("died") == "prefill"


async def dying_after_the_prompt_is_not_its_doing(lab: Lab) -> None:
    begun = await lab.begun()
    await lab.store.touch(begun.lease, computed=True)
    await lab.store.sweep(begun.lease.stream, begun.lease.entry, "r", True)
    assert await charges(lab) == ("0", "1")


async def a_first_token_shows_the_prompt_computed(lab: Lab) -> None:
    begun = await lab.begun()
    await lab.append(begun.lease, tokens([], [1]))
    await lab.store.sweep(begun.lease.stream, begun.lease.entry, "r", True)
    assert await charges(lab) == ("0", "1")


async def only_the_worker_says_that_the_prompt_is_computed(lab: Lab) -> None:
    begun = await lab.begun()
    await lab.store.touch(begun.lease)
    await lab.append(begun.lease, tokens([], []))
    await lab.append(begun.lease, tokens([7], [8]))
    assert await lab.field("computed") == ""


async def decode_computes_no_prompt(lab: Lab) -> None:
    _, offer = await lab.offered()
    answer = await lab.store.commit(offer, "d:1", [])
    assert isinstance(answer, Committed)
    await lab.store.touch(answer.lease, computed=True)
    assert await lab.field("computed") == ""


async def failing_is_charged_after_the_prompt_too(lab: Lab) -> None:
    begun = await lab.begun()
    await lab.store.touch(begun.lease, computed=True)
    await lab.store.strike(begun.lease.stream, begun.lease.entry, "r")
    assert await charges(lab) == ("1", "1")


async def dying_in_decode_is_charged(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.set("computed", "1")
    await lab.store.sweep(lease.stream, lease.entry, "r", True)
    assert await charges(lab) == ("1", "1")


async def two_deaths_end_it(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.set("deaths", 1)
    assert await lab.store.sweep(lease.stream, lease.entry, "r", True) == "dead"
    assert await outcome(lab) == "request_quarantined"
    assert await lab.client.xlen(lab.keys.dead) == 1
    assert await lab.num_entries() == await lab.num_pending() == 0


async def many_kills_end_it(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.set("kills", MAX_KILLS - 1)
    assert await lab.store.sweep(lease.stream, lease.entry, "r", True) == "dead"


async def a_suspect_that_decodes_is_acquitted(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.set("deaths", 1)
    await lab.append(lease, tokens([1], []))
    assert await lab.field("deaths") == "1", "nothing new was computed"
    await lab.append(lease, tokens([9], [2]))
    assert await lab.field("deaths") == "1", "nothing was journaled"
    await lab.append(lease, tokens([1], [2]))
    assert await charges(lab) == ("0", "0")


async def a_repeat_acquits_nobody(lab: Lab) -> None:
    """A worker that computes the prompt again may send what prefill journaled meanwhile: it came no further."""
    begun, offer = await lab.offered()
    await lab.set("deaths", 1)
    await lab.append(begun.lease, tokens([], [1]))
    answer = await lab.store.commit(offer, "d:1", [])
    assert isinstance(answer, Committed)
    await lab.append(answer.lease, tokens([], [1]))
    assert await lab.field("deaths") == "1"
    await lab.append(answer.lease, tokens([1], [2]))
    assert await lab.field("deaths") == "0"


async def an_end_without_tokens_acquits_nobody(lab: Lab) -> None:
    lease = await lab.committed(lab.job(n=2))
    await lab.set("deaths", 1)
    await lab.append(lease, tokens([1], [], finish="length"))
    assert await lab.field("deaths") == "1"


async def prefills_own_token_acquits_nobody(lab: Lab) -> None:
    begun = await lab.begun()
    await lab.set("deaths", 1)
    await lab.append(begun.lease, tokens([], [1]))
    assert await lab.field("deaths") == "1"


async def reaching_decode_acquits_who_died_in_prefill(lab: Lab) -> None:
    _, offer = await lab.offered()
    await lab.set("deaths", 1)
    await lab.set("died", "prefill")
    await lab.store.commit(offer, "d:1", [])
    assert await lab.field("deaths") == "0"


async def reaching_decode_acquits_nobody_else(lab: Lab) -> None:
    _, offer = await lab.offered()
    await lab.set("deaths", 1)
    await lab.set("died", "decode")
    await lab.store.commit(offer, "d:1", [])
    assert await lab.field("deaths") == "1"


async def a_given_back_one_comes_back(lab: Lab) -> None:
    lease = await lab.committed()
    assert await lab.store.requeue(lease)
    begun = await lab.store.begin(*await lab.read(lab.prefill), "r", "p2")
    assert isinstance(begun, Begun)
    assert (await lab.journal()).choices[0].tokens == [1]
