"""Random interleavings and faults on the real scripts; and proof that the checks would notice."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
from redis.asyncio import Redis

from shared.errors import ProtocolError
from shared.protocol.keys import Keys
from tests.integration.protocol_book import Violation
from tests.integration.protocol_model import World
from tests.integration.protocol_parts import NO_FAULTS, Faults

SECONDS = float(os.environ.get("SLIPSTREAM_TEST_MODEL_SECONDS", "4"))
FIRST_SEED = int(os.environ.get("SLIPSTREAM_TEST_MODEL_SEED", "1"))
MIN_RUNS = 5


async def one_run(client: Redis, deployment: str, seed: int, faults: Faults, **options: object) -> World:
    keys = Keys(f"{deployment}-{seed}")
    world = World(client, keys, seed, faults, **options)  # type: ignore[arg-type]
    try:
        await world.run(num_requests=1 + seed % 3)
    finally:
        names = [key async for key in client.scan_iter(match=f"*{{slipstream:{keys.deployment}:0}}*", count=1000)]
        if names:
            await client.delete(*names)
    return world


async def many_runs(client: Redis, deployment: str, faults: Faults, **options: object) -> int:
    """Run seeds for `SECONDS`; answers how many."""
    started, seed = time.monotonic(), FIRST_SEED
    while time.monotonic() - started < SECONDS or seed < FIRST_SEED + MIN_RUNS:
        try:
            await one_run(client, deployment, seed, faults, **options)
        except Violation as violation:
            raise AssertionError(f"seed {seed}: {violation}") from violation
        seed += 1
    return seed - FIRST_SEED


@pytest.mark.timeout(max(60, SECONDS * 3))
async def test_without_faults_every_client_gets_the_reference(redis_client: Redis, deployment: str) -> None:
    for seed in range(3):
        world = await one_run(redis_client, deployment, seed, NO_FAULTS)
        assert all(client.ends[0].outcome == "finished" for client in world.clients.values())


@pytest.mark.timeout(max(60, SECONDS * 3))
async def test_crashes_pauses_and_lost_messages(redis_client: Redis, deployment: str) -> None:
    assert await many_runs(redis_client, deployment, Faults(restore=0, wipe=0)) >= MIN_RUNS


@pytest.mark.timeout(max(60, SECONDS * 3))
async def test_lost_writes_and_a_wiped_redis(redis_client: Redis, deployment: str) -> None:
    assert await many_runs(redis_client, deployment, Faults(restore=0.02, wipe=0.004)) >= MIN_RUNS


@pytest.mark.timeout(max(60, SECONDS * 3))
async def test_workers_that_sample_differently(redis_client: Redis, deployment: str) -> None:
    """Unlike numerics: tokens differ between workers, yet each client's stream is one consistent sequence.

    Lost writes together with a dead gateway are the documented limit: nobody has the lost tokens then.
    """
    assert await many_runs(redis_client, deployment, Faults(restore=0.01, gateway_crash=0), divergent=True) >= MIN_RUNS


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
        "*", ("local id = redis.call('XADD', r.ps, '*', 'id', r.id)", "local id = r.entry")
    ),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
async def test_the_model_notices_a_broken_compare(redis_client: Redis, deployment: str, name: str) -> None:
    faults = Faults(crash=0.03, pause=0.05, duplicate=0.1, restore=0.01)
    for seed in range(80):
        try:
            await one_run(redis_client, deployment, seed, faults, divergent=seed % 2 == 1, break_script=BROKEN[name])
        except (Violation, ProtocolError):
            return
    pytest.fail(f"80 runs without the compare {name!r} showed nothing")
