"""The short way of an append and the long one agree: same answers, same request, same journal, same publications."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
from redis.asyncio import Redis

from shared.bus.events import EventFeed
from shared.bus.requests import Append
from shared.bus.results import Appended, Lease
from shared.bus.script import Script, parts
from shared.protocol.journal import chain
from shared.protocol.keys import Keys
from shared.protocol.messages import Tokens
from tests.integration.bus_helpers import Bench, tokens
from tests.integration.script_lab import USAGE, source

NUM_CHOICES = 2
CALLS = 40
_OWN = (b"sub", b"t0", b"entry", b"deadline", b"chan", b"ps", b"ds", b"stream", b"job")
"""Fields that name the deployment or the time, and differ."""


@dataclass
class Side:
    """One of two deployments that are told the same; `held` is what the sender believes each choice holds."""

    bench: Bench
    leases: list[Lease]
    held: list[list[list[int]]]

    @classmethod
    async def of(cls, client: Redis, keys: Keys, gateways: tuple[str, ...]) -> Side:
        bench = Bench.of(client, keys)
        jobs = [bench.job(f"r{i}", NUM_CHOICES, gateway=gateway) for i, gateway in enumerate(gateways)]
        leases = [await bench.committed(job) for job in jobs]
        return cls(bench, leases, [[[1] for _ in range(NUM_CHOICES)] for _ in gateways])

    async def state(self) -> list[Any]:
        """Everything that an append may change."""
        client, keys = self.bench.client, self.bench.keys
        return [
            (
                {
                    name: value
                    for name, value in (await client.hgetall(keys.request(request))).items()
                    if name not in _OWN
                },
                await client.xrange(keys.log(request)),
            )
            for request in (lease.request_id for lease in self.leases)
        ]


def event(draw: random.Random, held: list[int], choice: int) -> Tokens:
    """Mostly the next tokens; now and then what a late, repeated or confused sender would say."""
    new = [draw.randrange(1000) for _ in range(draw.choice((1, 1, 1, 2, 5)))]
    way = draw.choice(("next",) * 8 + ("finish", "nothing", "repeat", "ahead", "other"))
    if way == "repeat" and len(held) > 1:
        return tokens(held[:-1], held[-1:], choice)
    if way == "ahead":
        return tokens([*held, 7], new, choice)
    if way == "other":
        return replace(tokens(held, new, choice), h_base=chain("", [999]))
    return tokens(held, [] if way == "nothing" else new, choice, "stop" if way == "finish" else None)


@pytest.mark.parametrize("seed", range(6))
async def test_the_short_way_and_the_long_way_agree(redis_client: Redis, keys: Keys, seed: int) -> None:
    draw = random.Random(seed)
    gateways = ("g", "g2", "g")
    short = await Side.of(redis_client, keys, gateways)
    long = await Side.of(redis_client, Keys(keys.deployment + "-long"), gateways)
    long.bench.store.scripts["append"] = nothing_steady()
    for _ in range(CALLS):
        picked = [(r, c) for r in range(len(gateways)) for c in range(NUM_CHOICES) if draw.random() < 0.7]
        events = [event(draw, short.held[r][c], c) for r, c in picked]
        usages = [USAGE if draw.random() < 0.1 else None for _ in picked]
        answers = []
        for side in (short, long):
            calls = zip(picked, events, usages, strict=True)
            answers.append(await side.bench.store.append([Append(side.leases[r], e, u) for (r, _), e, u in calls]))
        assert answers[0] == answers[1]
        assert await short.state() == await long.state()
        for (r, c), sent, answer in zip(picked, events, answers[0], strict=True):
            if answer == Appended() and sent.base == len(short.held[r][c]):
                short.held[r][c] += sent.tokens


def nothing_steady() -> Script:
    """The script of old: nothing is steady, `append` does all."""
    text = source("steady").replace("and steady(key,", "and false and steady(key,")
    assert text != source("steady")
    return Script("append", "".join([text, *map(source, parts("append")[1:])]))


async def test_one_call_makes_one_publication_a_gateway_though_it_goes_both_ways(
    redis_client: Redis, keys: Keys
) -> None:
    side = await Side.of(redis_client, keys, ("g", "g2", "g"))
    feeds = [EventFeed(redis_client, keys, gateway) for gateway in ("g", "g2")]
    for feed in feeds:
        await feed.subscribe()
    finish = [None, None, "stop"]
    await side.bench.store.append(
        [Append(lease, tokens([1], [2], finish=f)) for lease, f in zip(side.leases, finish, strict=True)]
    )
    received = []
    for feed in feeds:
        message = await anext(batch async for batch in feed if isinstance(batch, list))
        received.append([request_id for request_id, _ in message])
        await feed.aclose()
    assert received == [["r0", "r2"], ["r1"]]
