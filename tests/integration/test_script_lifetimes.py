"""Times to live and deadlines: who keeps a request alive, that nothing lives for ever, and that nothing comes back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from shared.bus.requests import MAX_BOUNCES, Append
from shared.bus.results import Begun, Committed, Lease, Offer
from shared.protocol.journal import chain
from shared.protocol.keys import Keys
from shared.protocol.messages import End
from tests.integration.bus_helpers import tokens
from tests.integration.script_lab import Lab

SOON_MS = 10_000


@pytest.fixture
def lab(redis_client: Redis, keys: Keys) -> Lab:
    return Lab.with_mutation(redis_client, keys, None)


class Held:
    """A request in one of its states, and what a worker there holds."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.begun: Begun | None = None
        self.offer: Offer | None = None
        self.lease: Lease | None = None

    async def reach(self, state: str) -> Held:
        lab = self.lab
        if state == "queued":
            await lab.store.submit(lab.job())
        elif state == "prefill":
            self.begun, self.offer = await lab.offered()
            self.lease = self.begun.lease
        else:
            self.lease = await lab.committed()
        return self

    @property
    def entry(self) -> tuple[str, str]:
        assert self.lease is not None
        return self.lease.stream, self.lease.entry


async def begin(held: Held) -> None:
    await held.lab.store.begin(*await held.lab.read(held.lab.prefill), "r", "p")


async def touch(held: Held) -> None:
    assert held.lease is not None
    await held.lab.store.touch(held.lease)


async def offer(held: Held) -> None:
    assert held.lease is not None
    await held.lab.store.offer(held.lease, b"x")


async def take(held: Held) -> None:
    assert held.offer is not None
    await held.lab.store.take(held.offer.stream, held.offer.entry, "r")


async def commit(held: Held) -> None:
    assert held.offer is not None
    assert isinstance(await held.lab.store.commit(held.offer, "d:1", []), Committed)


async def append(held: Held) -> None:
    assert held.lease is not None
    known: list[int] = [1]
    for token in range(17):
        await held.lab.store.append([Append(held.lease, tokens(known, [token]))])
        known.append(token)


async def requeue(held: Held) -> None:
    assert held.lease is not None
    assert await held.lab.store.requeue(held.lease)


async def sweep(held: Held) -> None:
    await held.lab.store.sweep(*held.entry, "r", True)


async def sweep_the_offer(held: Held) -> None:
    assert held.offer is not None
    await held.lab.store.sweep(held.offer.stream, held.offer.entry, "r", False)


async def sweep_the_last_bounce(held: Held) -> None:
    await held.lab.set("bounce", MAX_BOUNCES)
    await sweep_the_offer(held)


async def poll(held: Held) -> None:
    await held.lab.store.poll("r", "g")


async def adopt(held: Held) -> None:
    await held.lab.store.adopt("r", "g2")


async def repair(held: Held) -> None:
    assert await held.lab.store.repair("r", "g", [[8]], 9)


Step = Callable[[Held], Awaitable[None]]
KEEPERS: list[tuple[str, Step]] = [
    *[("queued", step) for step in (begin, poll, adopt, repair)],
    *[("prefill", step) for step in (touch, offer, take, commit, requeue, sweep, sweep_the_offer)],
    *[("prefill", step) for step in (sweep_the_last_bounce, poll, adopt, repair)],
    *[("decode", step) for step in (touch, append, requeue, sweep, poll, adopt, repair)],
]


@pytest.mark.parametrize(("state", "step"), KEEPERS, ids=lambda value: getattr(value, "__name__", value))
async def test_whoever_works_on_a_request_keeps_both_keys_alive(lab: Lab, state: str, step: Step) -> None:
    held = await Held(lab).reach(state)
    await lab.nearly_expired()
    await step(held)
    assert min(await lab.lifetimes()) > SOON_MS


async def poll_elsewhere(held: Held) -> None:
    await held.lab.store.poll("r", "g2")


async def stop_elsewhere(held: Held) -> None:
    await held.lab.store.cancel("r", "stop", upto={0: (0, "")}, gateway="g2")


async def touch_as_a_zombie(held: Held) -> None:
    assert held.lease is not None
    await held.lab.store.touch(Lease("r", held.lease.epoch, "p:ffff", *held.entry))


async def begin_again(held: Held) -> None:
    await held.lab.store.begin(*held.entry, "r", "p2")


@pytest.mark.parametrize("step", [poll_elsewhere, stop_elsewhere, touch_as_a_zombie, begin_again])
@pytest.mark.parametrize("state", ["prefill", "decode"])
async def test_whoever_has_no_part_in_it_does_not(lab: Lab, state: str, step: Step) -> None:
    held = await Held(lab).reach(state)
    await lab.nearly_expired()
    await step(held)
    assert max(await lab.lifetimes()) <= SOON_MS


ENDINGS: dict[str, Callable[[Lab, Lease], Awaitable[Any]]] = {
    "last token": lambda lab, lease: lab.append(lease, tokens([1], [2], finish="stop")),
    "stop string": lambda lab, lease: lab.store.cancel("r", "stop", upto={0: (1, chain("", [1]))}),
    "cancel": lambda lab, lease: lab.store.cancel("r", "client_gone", force=True),
    "error": lambda lab, lease: lab.store.fail(lease, "engine_error", "x"),
    "repair": lambda lab, lease: lab.store.repair("r", "g", [[8]], 9, {0: "stop"}),
}


@pytest.mark.parametrize("how", sorted(ENDINGS))
async def test_an_ended_request_goes_soon_whoever_asks_for_it(lab: Lab, how: str) -> None:
    lease = await lab.committed()
    await ENDINGS[how](lab, lease)
    assert await lab.field("state") == "done"
    assert 0 < max(await lab.lifetimes()) <= 60_000
    await lab.nearly_expired()
    for call in (
        lab.store.poll("r", "g"),
        lab.store.adopt("r", "g2"),
        lab.store.touch(lease),
        lab.store.requeue(lease),
        lab.store.cancel("r", "client_gone", force=True),
        lab.store.sweep(lease.stream, lease.entry, "r", True),
        lab.store.repair("r", "g", [[8]], 99),
        lab.append(lease, tokens([1, 2], [3])),
    ):
        await call
    assert 0 < max(await lab.lifetimes()) <= SOON_MS
    assert await lab.num_entries() == await lab.num_pending() == 0


NEEDS_IT = (commit, requeue, repair, sweep_the_last_bounce)
"""Steps that expect the request to be there, or write into it themselves."""


@pytest.mark.parametrize("what", [{"request": True, "journal": True}, {"journal": True}])
@pytest.mark.parametrize(
    ("state", "step"),
    [
        *[(state, step) for state, step in KEEPERS if step not in NEEDS_IT],
        *[
            (state, lambda held: held.lab.store.cancel("r", "x", force=True))
            for state in ("queued", "prefill", "decode")
        ],
        *[(state, lambda held: held.lab.store.cancel("r", "x")) for state in ("queued", "prefill", "decode")],
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_nothing_comes_back_and_nothing_lives_for_ever(
    lab: Lab, state: str, step: Step, what: dict[str, bool]
) -> None:
    """Whatever a script does with a request or a journal that expired: neither is there without a time to live."""
    held = await Held(lab).reach(state)
    await lab.forget(**what)
    await step(held)
    request_ms, journal_ms = await lab.lifetimes()
    assert journal_ms == -2
    assert request_ms == -2 or (request_ms > 0 and not what.get("request"))


@pytest.mark.parametrize("state", ["queued", "prefill", "decode"])
async def test_a_deadline_ends_a_request_in_each_state(lab: Lab, state: str) -> None:
    """Its gateway's next poll is enough, whatever the worker does; the clock is that of Redis."""
    await Held(lab).reach(state)
    await lab.overdue()
    polled = await lab.store.poll("r", "g")
    assert polled is not None
    end = polled.entries[-1].event
    assert isinstance(end, End)
    assert (end.outcome, end.code) == ("error", "deadline_exceeded")
    if state != "queued":
        assert await lab.num_entries() == await lab.num_pending() == 0


async def test_a_budget_counts_from_submission_and_not_from_a_return_to_the_queue(lab: Lab) -> None:
    begun = await lab.begun(lab.job(budget_ms=50_000))
    before = await lab.field("deadline")
    assert await lab.store.requeue(begun.lease)
    assert await lab.store.repair("r", "g", [[8]], 9)
    assert await lab.field("deadline") == before


async def test_the_streams_of_dead_work_are_bounded(lab: Lab) -> None:
    """The one key of the protocol that has no time to live has a bound on its length."""
    lease = await lab.committed()
    await lab.set("deaths", 1)
    assert await lab.store.sweep(lease.stream, lease.entry, "r", True) == "dead"
    assert await lab.client.pttl(lab.keys.dead) == -1
    assert await lab.client.xlen(lab.keys.dead) == 1


async def test_a_whole_life_leaves_only_keys_that_expire_or_are_shared(lab: Lab) -> None:
    lease = await lab.committed()
    await lab.append(lease, tokens([1], [2], finish="stop"))
    left = [key.decode() async for key in lab.client.scan_iter(match=f"*{lab.keys.deployment}*", count=1000)]
    lasting = {key for key in left if await lab.client.pttl(key) == -1}
    assert lasting == {lab.prefill, lab.decode}
