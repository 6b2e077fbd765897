"""Random interleavings and faults on the real scripts; and proof that a broken script would be noticed.

`SLIPSTREAM_TEST_MODEL_RUNS` sets the number of runs of each kind, `SLIPSTREAM_TEST_MODEL_SEED` the first seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from shared.errors import ProtocolError
from shared.protocol.keys import Keys
from tests.integration.protocol_book import Violation
from tests.integration.protocol_model import World
from tests.integration.protocol_parts import NO_FAULTS, Faults

RUNS = int(os.environ.get("SLIPSTREAM_TEST_MODEL_RUNS", "10"))
FIRST_SEED = int(os.environ.get("SLIPSTREAM_TEST_MODEL_SEED", "1"))
SEEDS_OF_BROKEN = 150

QUIET = Faults(crash=0, pause=0, gateway_crash=0, duplicate=0, cancel=0)
"""Only the request itself kills workers, so that each death can be told."""

KINDS: dict[str, tuple[Faults, dict[str, Any]]] = {
    "processes": (Faults(), {}),
    "deadlines": (Faults(overdue=0.004), {}),
    "expiry": (Faults(expire=0.003, overdue=0.001), {}),
    "lost_writes": (Faults(restore=0.02, wipe=0.004, gateway_crash=0, reconnect=0), {}),
    "lost_writes_and_gateways": (Faults(restore=0.02, wipe=0.002), {"from_start": True}),
    "unlike_numerics": (Faults(restore=0.01, gateway_crash=0, reconnect=0, stops=0), {"divergent": True}),
    "poison_in_prefill": (QUIET, {"poison": ("prefill", 0)}),
    "poison_in_decode": (QUIET, {"poison": ("decode", 4)}),
}


ROUGH: tuple[tuple[Faults, dict[str, Any]], ...] = (
    (Faults(crash=0.03, pause=0.05, duplicate=0.1, restore=0.01, gateway_crash=0.01), {"from_start": True}),
    (
        Faults(crash=0.03, pause=0.05, duplicate=0.1, restore=0.01, gateway_crash=0, reconnect=0, stops=0),
        {"divergent": True},
    ),
)
"""Many faults, in which the shipped scripts keep every promise all the same."""


async def one_run(
    client: Redis, deployment: str, seed: int, faults: Faults, *, num_requests: int | None = None, **options: Any
) -> World:
    keys = Keys(f"{deployment}-{seed}")
    world = World(client, keys, seed, faults, **options)
    try:
        await world.run(num_requests or 1 + seed % 3)
    finally:
        names = [key async for key in client.scan_iter(match=f"*{{slipstream:{keys.deployment}:0}}*", count=1000)]
        if names:
            await client.delete(*names)
    return world


async def test_without_faults_every_client_gets_the_reference(redis_client: Redis, deployment: str) -> None:
    for seed in range(3):
        world = await one_run(redis_client, deployment, seed, NO_FAULTS)
        assert all(client.ends[0].outcome == "finished" for client in world.clients.values())


@pytest.mark.timeout(max(60, RUNS))
@pytest.mark.parametrize("kind", sorted(KINDS))
async def test_every_promise_is_kept(redis_client: Redis, deployment: str, kind: str) -> None:
    """Tokens of unlike numerics differ between workers, yet each client's stream is one consistent sequence.

    Redis that loses writes may give a position again, so a client that changes its gateway then reads from the start.
    """
    faults, options = KINDS[kind]
    for seed in range(FIRST_SEED, FIRST_SEED + RUNS):
        try:
            await one_run(redis_client, deployment, seed, faults, **options)
        except Violation as violation:
            raise AssertionError(f"seed {seed}: {violation}") from violation


def without(script: str, *changes: tuple[str, str]) -> Callable[[str, str], str]:
    """Replaces fragments of one script's text ("*": of all of them, in common.lua)."""

    def change(name: str, text: str) -> str:
        if script not in ("*", name):
            return text
        for fragment, instead in changes:
            assert fragment in text, f"{name} has no {fragment!r} any more"
            text = text.replace(fragment, instead)
        return text

    return change


BROKEN = {
    "owner": without("*", ("r.epoch == tonumber(epoch) and r.owner == owner", "true")),
    "state_of_begin": without("begin", ("r.state ~= 'queued'", "false")),
    "index_and_hash": without("*", ("if n ~= base or held[2] ~= h_base then", "if false then")),
    "offer_of_commit": without(
        "commit",
        ("if stale(r, stream, id) then", "if not r or r.state == 'done' then"),
        ("if not is_offer(r, stream, id) or r.state ~= 'prefill' or", "if"),
        ("r.epoch ~= tonumber(ARGV[3]) or nonce ~= ARGV[4]", "false"),
    ),
    "stale_entry_removed": without("*", ("drop(stream, id)\n  return true", "return true")),
    "requeue_adds_an_entry": without(
        "*", ("local id = redis.call('XADD', r.ps, '*', 'id', r.id, 'deaths', r.deaths)", "local id = r.entry")
    ),
    "lifetime": without("*", ("redis.call('PEXPIRE', r.key, r.ttl)", ""), ("redis.call('PEXPIRE', r.key, r.keep)", "")),
    "holder_of_cancel": without("cancel", ("r.gw ~= ARGV[6]", "false")),
    "stop_string_ends_its_choice": without("cancel", ("'fin:' .. c, 'stop', 'left'", "'left'")),
    "offer_dropped_by_requeue": without(
        "*", ("'entry', id, 'offer', '', 'address', '',\n    'bounce'", "'entry', id, 'bounce'")
    ),
}

BROKEN_OF_POISON = {
    "deaths_are_counted": without("sweep", ("r.deaths = r.deaths + 1", "r.deaths = r.deaths")),
    "the_innocent_are_acquitted": without("*", ("if r.deaths > 0 then", "if false then")),
}


@pytest.mark.parametrize("rough", range(len(ROUGH)))
async def test_the_shipped_scripts_pass_where_broken_ones_are_sought(
    redis_client: Redis, deployment: str, rough: int
) -> None:
    faults, options = ROUGH[rough]
    for seed in range(FIRST_SEED, FIRST_SEED + RUNS):
        await one_run(redis_client, deployment, seed, faults, **options)


@pytest.mark.parametrize("name", sorted(BROKEN))
async def test_the_model_notices_a_broken_script(redis_client: Redis, deployment: str, name: str) -> None:
    for seed in range(SEEDS_OF_BROKEN):
        faults, options = ROUGH[seed % 2]
        try:
            await one_run(redis_client, deployment, seed, faults, **options, break_script=BROKEN[name])
        except (Violation, ProtocolError):
            return
    pytest.fail(f"{SEEDS_OF_BROKEN} runs of the broken scripts {name!r} showed nothing")


@pytest.mark.parametrize("name", sorted(BROKEN_OF_POISON))
async def test_the_model_notices_who_is_blamed(redis_client: Redis, deployment: str, name: str) -> None:
    options: dict[str, Any] = {"poison": ("decode", 4), "num_requests": 5, "break_script": BROKEN_OF_POISON[name]}
    for seed in range(SEEDS_OF_BROKEN):
        try:
            await one_run(redis_client, deployment, seed, QUIET, **options)
        except Violation:
            return
    pytest.fail(f"{SEEDS_OF_BROKEN} runs of the broken scripts {name!r} showed nothing")
