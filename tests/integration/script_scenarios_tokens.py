"""What may be journaled: a scenario for each compare of tokens, and for each that keeps vanished keys vanished."""

from __future__ import annotations

from shared.bus.requests import Append
from shared.bus.results import Appended, Begun, Behind, Cancelled, Committed, Ended, Offer, Refused, Stale, Submitted
from shared.protocol.journal import chain
from shared.protocol.messages import End, Tokens
from tests.integration.bus_helpers import tokens
from tests.integration.script_lab import USAGE, Lab


async def append_needs_the_length(lab: Lab) -> None:
    lease = await lab.committed()
    shorter = tokens([1], [2])
    assert await lab.append(lease, shorter, tokens([1, 2], [3])) == [Appended(), Appended()]
    twice = tokens([1, 2, 3], [4])
    assert await lab.append(lease, twice) == [Appended()]
    assert await lab.append(lease, tokens([1, 2, 3], [4, 5])) == [Behind(4, chain("", [1, 2, 3, 4]))]
    assert (await lab.journal()).choices[0].tokens == [1, 2, 3, 4]


async def events_of_a_request_keep_their_order(lab: Lab) -> None:
    """One of them ends its choice, which is no ordinary step, and the other goes on."""
    lease = await lab.committed(lab.job(n=2))
    await lab.append(lease, tokens([1], [2], finish="stop"), tokens([1], [2], 1))
    polled = await lab.store.poll("r", "")
    assert polled is not None
    events = [entry.event for entry in polled.entries if isinstance(entry.event, Tokens)]
    assert [event.choice for event in events[-2:]] == [0, 1]


async def append_compares_the_length_itself(lab: Lab) -> None:
    """A length that does not belong to its hash is refused, whoever sends it."""
    lease = await lab.committed()
    forged = tokens([1], [2])
    wrong = type(forged)(0, 5, forged.h_base, forged.h, forged.tokens)
    assert await lab.append(lease, wrong) == [Behind(1, chain("", [1]))]


async def append_needs_the_hash(lab: Lab) -> None:
    lease = await lab.committed()
    assert await lab.append(lease, tokens([9], [2])) == [Behind(1, chain("", [1]))]


async def a_repeat_is_known_by_length(lab: Lab) -> None:
    lease = await lab.committed()
    sent = tokens([1], [2])
    await lab.append(lease, sent)
    longer = type(sent)(0, 1, sent.h_base, sent.h, (2, 3))
    assert await lab.append(lease, longer) == [Behind(2, chain("", [1, 2]))]


async def a_repeat_is_known_by_hash(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.append(lease, tokens([1], [2]))
    assert await lab.append(lease, tokens([1], [3])) == [Behind(2, chain("", [1, 2]))]


async def a_repeat_adds_nothing(lab: Lab) -> None:
    lease = await lab.committed()
    assert await lab.append(lease, tokens([1], [2])) == [Appended()]
    assert await lab.append(lease, tokens([1], [2])) == [Appended()]
    assert (await lab.journal()).choices[0].tokens == [1, 2]


async def a_finish_is_no_repeat_of_its_tokens(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.append(lease, tokens([1], [2]))
    assert await lab.append(lease, tokens([1], [2], finish="stop")) == [Behind(2, chain("", [1, 2]))]
    assert await lab.append(lease, tokens([1, 2], [], finish="stop")) == [Appended(done=True)]


async def nothing_new_is_not_journaled(lab: Lab) -> None:
    lease = await lab.committed()
    before = (await lab.journal()).ev
    assert await lab.append(lease, tokens([1], [])) == [Appended()]
    assert (await lab.journal()).ev == before
    assert await lab.append(lease, tokens([1], [2])) == [Appended()]
    assert (await lab.journal()).ev == before + 1


async def a_finish_without_tokens_counts(lab: Lab) -> None:
    lease = await lab.committed()
    assert await lab.append(lease, tokens([1], [], finish="length")) == [Appended(done=True)]


async def an_unknown_choice_is_refused(lab: Lab) -> None:
    lease = await lab.committed()
    assert await lab.append(lease, tokens([], [1], choice=5)) == [Refused()]


async def a_finished_choice_takes_no_more(lab: Lab) -> None:
    lease = await lab.committed(lab.job(n=2))
    assert await lab.append(lease, tokens([1], [2], finish="stop")) == [Appended()]
    assert await lab.append(lease, tokens([1, 2], [3])) == [Cancelled(choice_only=True)]
    assert await lab.append(lease, tokens([1], [9], finish="stop")) == [Cancelled(choice_only=True)]
    assert await lab.append(lease, tokens([1], [2])) == [Cancelled(choice_only=True)]
    assert await lab.append(lease, tokens([1], [2], finish="stop")) == [Appended()], "a repeat is the same"


async def the_last_choice_ends_the_request(lab: Lab) -> None:
    lease = await lab.committed(lab.job(n=2))
    assert await lab.append(lease, tokens([1], [2], finish="stop")) == [Appended()]
    assert (await lab.journal(n=2)).end is None
    assert await lab.append(lease, tokens([1], [2], 1, finish="stop")) == [Appended(done=True)]
    assert (await lab.journal(n=2)).end == End("finished")
    assert await lab.num_entries() == await lab.num_pending() == 0


async def usage_is_kept(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.store.append([Append(lease, tokens([1], [2]), USAGE)])
    await lab.append(lease, tokens([1, 2], [3], finish="stop"))
    end = (await lab.journal()).end
    assert end is not None
    assert end.usage == USAGE


async def commit_keeps_its_usage(lab: Lab) -> None:
    begun, offer = await lab.offered()
    await lab.store.append([Append(begun.lease, tokens([], [1]), USAGE)])
    answer = await lab.store.commit(offer, "d:1", [])
    assert isinstance(answer, Committed)
    await lab.append(answer.lease, tokens([1], [], finish="stop"))
    end = (await lab.journal()).end
    assert end is not None
    assert end.usage == USAGE


async def commit_of_the_last_token_ends(lab: Lab) -> None:
    _, offer = await lab.offered()
    assert await lab.store.commit(offer, "d:1", [tokens([], [1], finish="stop")]) == Ended()
    assert (await lab.journal()).end == End("finished")


async def commit_goes_on_while_a_choice_is_open(lab: Lab) -> None:
    _, offer = await lab.offered(lab.job(n=2))
    answer = await lab.store.commit(offer, "d:1", [tokens([], [1], finish="stop")])
    assert isinstance(answer, Committed)


# ---- contents a gateway brings -----------------------------------------------------------------


async def submit_of_a_part_goes_on(lab: Lab) -> None:
    await lab.store.submit(lab.job(n=2), [[1, 2], [5]], emax=7, finished={1: "stop"})
    begun = await lab.store.begin(*await lab.read(lab.prefill), "r", "p")
    assert isinstance(begun, Begun)
    state = await lab.journal(n=2)
    assert [choice.tokens for choice in state.choices] == [[1, 2], [5]]
    assert [choice.finish for choice in state.choices] == [None, "stop"]
    assert await lab.append(begun.lease, tokens([1, 2], [3], finish="length")) == [Appended(done=True)]


async def submit_of_the_whole_ends(lab: Lab) -> None:
    assert await lab.store.submit(lab.job(), [[1]], emax=3, finished={0: "stop"}) == Submitted("")
    assert (await lab.journal()).end == End("finished")


async def repair_of_a_part_goes_on(lab: Lab) -> None:
    await lab.committed()
    assert await lab.store.repair("r", "g", [[8, 9]], 9)
    begun = await lab.store.begin(*await lab.read(lab.prefill), "r", "p")
    assert isinstance(begun, Begun)
    assert (await lab.journal()).choices[0].tokens == [8, 9]


async def repair_of_the_whole_ends(lab: Lab) -> None:
    await lab.committed()
    assert await lab.store.repair("r", "g", [[8]], 9, {0: "stop"})
    assert (await lab.journal()).end == End("finished")
    assert await lab.num_entries() == 0


async def repair_of_an_ended_one_is_refused(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.append(lease, tokens([1], [2], finish="stop"))
    assert not await lab.store.repair("r", "g", [[8]], 9)
    assert await lab.num_entries() == 0


# ---- what vanished stays vanished --------------------------------------------------------------


async def an_append_revives_no_journal(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.forget(journal=True)
    assert await lab.append(lease, tokens([1], [2])) == [Refused()]
    assert await lab.is_gone()
    assert await lab.num_entries() == await lab.num_pending() == 0, "the request is forgotten whole"


async def a_commit_revives_no_journal(lab: Lab) -> None:
    _, offer = await lab.offered()
    await lab.forget(journal=True)
    assert await lab.store.commit(offer, "d:1", [tokens([], [1])]) == Refused()
    assert await lab.is_gone()


async def a_begin_revives_no_journal(lab: Lab) -> None:
    await lab.store.submit(lab.job())
    where = await lab.read(lab.prefill)
    await lab.forget(journal=True)
    assert await lab.store.begin(*where, "r", "p") == Stale()
    assert await lab.is_gone()


async def a_requeue_revives_no_journal(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.forget(journal=True)
    assert not await lab.store.requeue(lease)
    assert await lab.is_gone()
    assert await lab.num_entries() == 0


async def a_sweep_revives_no_journal(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.forget(journal=True)
    assert await lab.store.sweep(lease.stream, lease.entry, "r", False) == "stale"
    assert await lab.is_gone()
    assert await lab.num_entries() == 0


async def an_end_revives_no_journal(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.forget(journal=True)
    await lab.store.fail(lease, "engine_error", "x")
    assert await lab.is_gone()
    assert await lab.num_entries() == 0


async def a_repair_revives_no_journal(lab: Lab) -> None:
    await lab.committed()
    await lab.forget(journal=True)
    assert not await lab.store.repair("r", "g", [[8]], 9)
    assert await lab.is_gone()


async def a_stop_string_revives_no_journal(lab: Lab) -> None:
    await lab.committed()
    await lab.forget(journal=True)
    assert await lab.store.cancel("r", "stop", upto={0: (1, chain("", [1]))}) == "gone"
    assert await lab.is_gone()


async def a_cancel_revives_no_journal(lab: Lab) -> None:
    await lab.committed()
    await lab.forget(journal=True)
    await lab.store.cancel("r", "client_gone", force=True)
    assert await lab.is_gone()


async def nothing_revives_a_request(lab: Lab) -> None:
    await lab.committed()
    await lab.forget(request=True, journal=True)
    assert await lab.store.cancel("r", "client_gone") == "gone"
    assert await lab.store.poll("r", "") is None
    assert await lab.store.adopt("r", "g2") is None
    assert await lab.is_gone()


async def a_take_of_what_is_gone(lab: Lab) -> None:
    _, offer = await lab.offered()
    assert isinstance(offer, Offer)
    await lab.forget(request=True, journal=True)
    assert await lab.store.take(offer.stream, offer.entry, "r") == Stale()
