"""Every check of the protocol model fires when what it looks for is really there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from shared.bus.results import Begun, Polled
from shared.protocol.journal import chain
from shared.protocol.keys import Keys
from shared.protocol.messages import End, JournalEntry, Marker, Tokens
from shared.protocol.position import Position
from tests.integration.protocol_book import ORPHANED, Violation
from tests.integration.protocol_gateways import moved
from tests.integration.protocol_model import World
from tests.integration.protocol_parts import NO_FAULTS, Client, next_token


@pytest_asyncio.fixture
async def world(redis_client: Redis, keys: Keys) -> AsyncIterator[World]:
    """A world with two gateways and one request that nobody has begun."""
    world = World(redis_client, keys, 1, NO_FAULTS)
    for role in ("gateway", "gateway", "prefill"):
        world.start(role)
    world.arrive("r0", None)
    client = world.clients["r0"]
    client.lengths = (3,)
    await world.book.submit(client.job, [[]], 0, {})
    yield world


def new_tokens(count: int, held: int = 0, *, finish: str | None = None) -> Tokens:
    """The next tokens of the one sequence that every worker of equal numerics samples."""
    sequence: list[int] = []
    for _ in range(held + count):
        sequence.append(next_token(chain("", sequence), 0))
    h = chain("", sequence[:held])
    return Tokens(0, held, h, chain(h, sequence[held:]), tuple(sequence[held:]), finish=finish)


def journal(*events: Tokens | End) -> Polled:
    entries = [JournalEntry(1, 0, Marker((0,)))]
    entries += [JournalEntry(1, number, event) for number, event in enumerate(events, 1)]
    return Polled("decode", 1, "g", tuple(entries))


def give(client: Client, *events: Tokens | End) -> None:
    client.delivery.history += [(Position(1, number), event) for number, event in enumerate(events, 1)]
    client.drain()


async def begun(world: World) -> Begun:
    queued: Any = await world.client.xrange(world.prefill_stream)
    answer = await world.book.begin("p2", world.prefill_stream, queued[0][0].decode(), "r0", "p2_1")
    assert isinstance(answer, Begun)
    return answer


# ---- what a client gets ------------------------------------------------------------------------


def test_a_lost_token(world: World) -> None:
    with pytest.raises(Violation, match="an event at 1 follows 0 tokens"):
        give(world.clients["r0"], new_tokens(1, held=1))


def test_a_doubled_token(world: World) -> None:
    with pytest.raises(Violation, match="an event at 0 follows 1 tokens"):
        give(world.clients["r0"], new_tokens(1), new_tokens(1))


def test_another_token_after_a_restart(world: World) -> None:
    client = world.clients["r0"]
    give(client, new_tokens(2))
    client.restart()
    with pytest.raises(Violation, match="other tokens than before"):
        give(client, new_tokens(2), replace(new_tokens(2), tokens=(1, 2)))


def test_a_choice_that_finished_too_soon(world: World) -> None:
    client = world.clients["r0"]
    give(client, new_tokens(2, finish="length"), End("finished"))
    with pytest.raises(Violation, match="finished with 2 of 3"):
        world.check_client(client)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ((new_tokens(3),), "0 terminal events"),
        ((new_tokens(3), End("finished"), End("finished")), "2 terminal events"),
        ((End("cancelled", "client_gone"),), "nobody asked"),
        ((End("cancelled", ORPHANED),), "nobody asked"),
        ((End("error", "deadline_exceeded"),), "ended in deadline_exceeded"),
        ((End("error", "request_quarantined"),), "ended in request_quarantined"),
        ((End("error", "stream_conflict"),), "ended in stream_conflict"),
    ],
)
def test_an_end_that_nothing_explains(world: World, events: tuple[Tokens | End, ...], message: str) -> None:
    client = world.clients["r0"]
    give(client, *events)
    with pytest.raises(Violation, match=message):
        world.check_client(client)


def test_a_poison_request_that_finished(world: World) -> None:
    client = world.clients["r0"]
    client.poison = ("decode", 1)
    give(client, new_tokens(3, finish="length"), End("finished"))
    with pytest.raises(Violation, match="killed"):
        world.check_client(client)


def test_tokens_that_no_worker_samples(world: World) -> None:
    client = world.clients["r0"]
    client.got = [[1, 2, 3]]
    client.ends = [End("finished")]
    with pytest.raises(Violation, match="token 0 does not follow"):
        world.check_client(client)


def test_a_position_that_is_unknown_though_nothing_was_lost(world: World) -> None:
    client = world.clients["r0"]
    give(client, new_tokens(1), new_tokens(1, held=1))
    moved(client, "g1")
    with pytest.raises(Violation, match="the position 1-2 is unknown"):
        client.resume(journal(new_tokens(1)).entries, may_be_lost=False)


# ---- what the journal says ---------------------------------------------------------------------


def test_a_journal_that_does_not_fold(world: World) -> None:
    with pytest.raises(Violation, match="does not fold"):
        world.check_journal(world.clients["r0"], journal(new_tokens(1, held=1)))


def test_a_second_terminal_entry(world: World) -> None:
    with pytest.raises(Violation, match="terminal entries at"):
        world.check_journal(world.clients["r0"], journal(new_tokens(3), End("finished"), End("finished")))


def test_an_entry_after_the_terminal_one(world: World) -> None:
    with pytest.raises(Violation, match="terminal entries at"):
        world.check_journal(world.clients["r0"], journal(End("cancelled"), new_tokens(1)))


# ---- what Redis holds --------------------------------------------------------------------------


async def test_a_request_without_an_entry(world: World) -> None:
    await world.client.xtrim(world.prefill_stream, maxlen=0)
    with pytest.raises(Violation, match="no entry stands"):
        await world.check_standing()


async def test_an_offer_outside_prefill(world: World) -> None:
    await world.client.hset(world.keys.request("r0"), "offer", "1-1")
    with pytest.raises(Violation, match="an offer stands in state queued"):
        await world.check_standing()


@pytest.mark.parametrize("which", ["request", "log"])
async def test_a_key_without_a_time_to_live(world: World, which: str) -> None:
    await world.client.persist(getattr(world.keys, which)("r0"))
    with pytest.raises(Violation, match="no time to live"):
        await world.check_standing()


async def test_an_entry_left_at_the_end(world: World) -> None:
    client = world.clients["r0"]
    give(client, new_tokens(3, finish="length"), End("finished"))
    with pytest.raises(Violation, match="work entries are left"):
        await world.check_end()


# ---- who may do what ---------------------------------------------------------------------------


async def test_a_command_of_somebody_else(world: World) -> None:
    lease = (await begun(world)).lease
    world.book.owners["r0"] = "p9:p9_1"
    for command in (world.book.touch, world.book.offer, world.book.requeue):
        with pytest.raises(Violation, match="was accepted"):
            await command(lease)


async def test_a_begin_of_what_is_owned(world: World) -> None:
    world.book.owners["r0"] = "p9:p9_1"
    with pytest.raises(Violation, match="was begun"):
        await begun(world)


async def test_an_orphan_that_somebody_holds(world: World) -> None:
    holder = world.clients["r0"].gateway
    with pytest.raises(Violation, match="holds it"):
        await world.book.orphan("r0", holder, [holder])


async def test_an_orphan_that_nobody_holds(world: World) -> None:
    """The control of the check above: what is right raises nothing."""
    holder = world.clients["r0"].gateway
    await world.book.orphan("r0", holder, [])
    assert await world.client.hget(world.keys.request("r0"), "state") == b"done"
