"""How a request ends: a scenario for each compare of cancels, deadlines and lifetimes."""

from __future__ import annotations

from shared.bus.results import Appended, Cancelled, Committed, Ended, Stale
from shared.protocol.journal import chain
from shared.protocol.messages import End
from tests.integration.bus_helpers import tokens
from tests.integration.script_lab import Lab

OVERDUE = "deadline_exceeded"


async def outcome(lab: Lab, n: int = 1) -> str:
    """Code of the terminal entry, "finished" without one; "live" while there is none."""
    end = (await lab.journal(n=n)).end
    return "live" if end is None else end.code or end.outcome


# ---- deadlines ---------------------------------------------------------------------------------


async def without_a_budget_there_is_no_deadline(lab: Lab) -> None:
    begun, offer = await lab.offered()
    assert begun.remaining_ms is None
    assert offer.remaining_ms is None
    assert (await lab.store.touch(begun.lease)).remaining_ms is None
    assert isinstance(await lab.store.commit(offer, "d:1", []), Committed)


async def with_a_budget_the_rest_is_told(lab: Lab) -> None:
    begun = await lab.begun(lab.job(budget_ms=50_000))
    assert begun.remaining_ms is not None
    assert 0 < begun.remaining_ms <= 50_000
    assert await lab.append(begun.lease, tokens([], [1])) == [Appended()], "it is not over yet"


async def an_overdue_begin_ends(lab: Lab) -> None:
    await lab.store.submit(lab.job())
    where = await lab.read(lab.prefill)
    await lab.overdue()
    assert await lab.store.begin(*where, "r", "p") == Ended()
    assert await outcome(lab) == OVERDUE


async def an_overdue_take_ends(lab: Lab) -> None:
    _, offer = await lab.offered()
    await lab.overdue()
    assert await lab.store.take(offer.stream, offer.entry, "r") == Stale()
    assert await outcome(lab) == OVERDUE
    assert await lab.num_entries() == 0


async def an_overdue_touch_ends(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.overdue()
    touched = await lab.store.touch(lease)
    assert (touched.owner, touched.cancel) == (False, True)
    assert await outcome(lab) == OVERDUE


async def an_overdue_append_ends(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.overdue()
    assert await lab.append(lease, tokens([1], [2])) == [Cancelled()]
    assert (await lab.journal()).choices[0].tokens == [1, 2], "what was computed in time is not withheld"
    assert await outcome(lab) == OVERDUE


async def an_overdue_commit_ends(lab: Lab) -> None:
    _, offer = await lab.offered()
    await lab.overdue()
    assert await lab.store.commit(offer, "d:1", []) == Ended()
    assert await outcome(lab) == OVERDUE


async def an_overdue_sweep_ends(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.overdue()
    assert await lab.store.sweep(lease.stream, lease.entry, "r", True) == "ended"
    assert await outcome(lab) == OVERDUE


async def an_overdue_requeue_ends(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.overdue()
    assert await lab.store.requeue(lease)
    assert await outcome(lab) == OVERDUE
    assert await lab.num_entries() == 0


async def an_overdue_poll_ends(lab: Lab) -> None:
    await lab.committed()
    await lab.overdue()
    polled = await lab.store.poll("r", "g")
    assert polled is not None
    assert isinstance(polled.entries[-1].event, End)
    again = await lab.store.poll("r", "g")
    assert again is not None
    assert again.entries == polled.entries, "one terminal entry"


async def a_strangers_poll_ends_nothing(lab: Lab) -> None:
    await lab.committed()
    await lab.overdue()
    await lab.store.poll("r", "g2")
    assert await outcome(lab) == "live"


# ---- cancels -----------------------------------------------------------------------------------


async def a_cancel_waits_for_the_owner(lab: Lab) -> None:
    lease = await lab.committed()
    assert await lab.store.cancel("r", "client_gone") == "pending"
    assert (await lab.store.poll("r", "g")) is not None
    assert await lab.append(lease, tokens([1], [2])) == [Cancelled()]
    assert await outcome(lab) == "client_gone"
    assert await lab.num_entries() == await lab.num_pending() == 0


async def a_queued_one_is_cancelled_at_once(lab: Lab) -> None:
    await lab.store.submit(lab.job())
    assert await lab.store.cancel("r", "client_gone") == "ended"
    assert await outcome(lab) == "client_gone"


async def force_ends_at_once(lab: Lab) -> None:
    await lab.committed()
    assert await lab.store.cancel("r", "client_gone", force=True) == "ended"
    assert await outcome(lab) == "client_gone"


async def an_ended_one_is_not_cancelled(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.append(lease, tokens([1], [2], finish="stop"))
    assert await lab.store.cancel("r", "client_gone", force=True) == "done"
    assert await outcome(lab) == "finished"


async def a_stop_string_cuts_its_choice(lab: Lab) -> None:
    lease = await lab.committed(lab.job(n=2))
    await lab.append(lease, tokens([1], [2, 3]))
    assert await lab.store.cancel("r", "stop", upto={0: (2, chain("", [1, 2]))}) == "pending"
    assert await lab.append(lease, tokens([1, 2, 3], [4])) == [Cancelled(choice_only=True)]
    assert await lab.append(lease, tokens([1], [2], 1)) == [Appended()]
    assert (await lab.journal(n=2)).choices[0].tokens == [1, 2]


async def the_last_stop_string_ends(lab: Lab) -> None:
    await lab.committed()
    assert await lab.store.cancel("r", "stop", upto={0: (1, chain("", [1]))}) == "ended"
    assert await outcome(lab) == "finished"


async def a_stop_string_beyond_the_journal_waits(lab: Lab) -> None:
    """Redis lost what the gateway has seen: the choice cannot be cut where nothing is."""
    lease = await lab.committed()
    assert await lab.store.cancel("r", "stop", upto={0: (3, chain("", [1, 2, 3]))}) == "pending"
    assert await lab.append(lease, tokens([1], [2])) == [Appended()]


async def a_stop_string_of_no_choice_is_nothing(lab: Lab) -> None:
    await lab.committed()
    assert await lab.store.cancel("r", "stop", upto={7: (0, "")}) == "pending"
    assert await outcome(lab) == "live"


async def a_choice_is_stopped_once(lab: Lab) -> None:
    lease = await lab.committed(lab.job(n=2))
    await lab.append(lease, tokens([1], [2, 3]))
    for length in (2, 1):
        assert await lab.store.cancel("r", "stop", upto={0: (length, chain("", [1, 2][:length]))}) == "pending"
    assert (await lab.journal(n=2)).choices[0].tokens == [1, 2]
    assert await outcome(lab, n=2) == "live"


# ---- lifetimes ---------------------------------------------------------------------------------


async def an_ended_one_is_kept_no_longer(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.append(lease, tokens([1], [2], finish="stop"))
    await lab.nearly_expired()
    assert await lab.store.poll("r", "g") is not None
    assert max(await lab.lifetimes()) <= 10_000
    assert await lab.store.adopt("r", "g2") is not None
    assert max(await lab.lifetimes()) <= 10_000


async def appending_keeps_it_alive(lab: Lab) -> None:
    """Not every append refreshes, but every sixteenth does."""
    lease = await lab.committed()
    await lab.nearly_expired()
    held = [1]
    for token in range(17):
        await lab.append(lease, tokens(held, [token]))
        held.append(token)
    assert min(await lab.lifetimes()) > 10_000
