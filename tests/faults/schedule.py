"""Every kind of fault the harness knows, and random schedules of them.

A fault acts, lasts, and heals before it returns. Which process or link it hits, and how hard, comes from the
schedule's seed alone, so that a schedule can be run again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from shared import faultpoints
from tests.faults.campaign import Campaign, Disturbance
from tests.faults.cluster import WORKERS, FaultCluster, Slot
from tests.faults.proxy import Behaviour, Direction, Kind, Proxy

FREEZE_S = (0.5, 8.0)
"""Some end before a heartbeat is missed, some make a zombie."""

LONG_FREEZE_S = 30.0
PAUSE_S = (0.5, 3.0)
REDIS_DOWN_S = (0.2, 2.0)
LINK_S = (0.5, 3.0)
DEATH_S = 30.0

Fault = Callable[[FaultCluster, random.Random], Awaitable[str]]
"""Does its harm, undoes what has to be undone, and says what it hit."""


def _pick(cluster: FaultCluster, rng: random.Random, *roles: str) -> Slot:
    """A running process, but never the last of its role."""
    running = cluster.of_role(*roles)
    spare = [slot for slot in running if sum(other.role == slot.role for other in running) > 1]
    return rng.choice(spare or running)


def _pick_mortal(cluster: FaultCluster, rng: random.Random, *roles: str) -> Slot:
    """A process to end: no veteran."""
    if not cluster.topology.veterans:
        return _pick(cluster, rng, *roles)
    return rng.choice([slot for slot in cluster.of_role(*roles) if slot.index])


async def kill_worker(cluster: FaultCluster, rng: random.Random) -> str:
    return await _kill(_pick_mortal(cluster, rng, *WORKERS))


async def kill_gateway(cluster: FaultCluster, rng: random.Random) -> str:
    return await _kill(_pick_mortal(cluster, rng, "gateway"))


async def _kill(slot: Slot) -> str:
    assert slot.child is not None
    slot.child.kill()
    await asyncio.wait({slot.child.ended}, timeout=DEATH_S)
    return slot.name


async def freeze_worker(cluster: FaultCluster, rng: random.Random) -> str:
    return await _freeze(_pick(cluster, rng, *WORKERS), rng.uniform(*FREEZE_S))


async def freeze_worker_long(cluster: FaultCluster, rng: random.Random) -> str:
    return await _freeze(_pick(cluster, rng, *WORKERS), LONG_FREEZE_S)


async def freeze_gateway(cluster: FaultCluster, rng: random.Random) -> str:
    return await _freeze(_pick(cluster, rng, "gateway"), rng.uniform(*FREEZE_S))


async def _freeze(slot: Slot, seconds: float) -> str:
    assert slot.child is not None
    child = slot.child
    child.stop()
    try:
        await asyncio.sleep(seconds)
    finally:
        child.go_on()
    return f"{slot.name} for {seconds:.1f} s"


async def drain_worker(cluster: FaultCluster, rng: random.Random) -> str:
    return await drain_slot(_pick_mortal(cluster, rng, *WORKERS))


async def drain_gateway(cluster: FaultCluster, rng: random.Random) -> str:
    return await drain_slot(_pick_mortal(cluster, rng, "gateway"))


async def drain_slot(slot: Slot) -> str:
    """SIGTERM; the supervisor starts another one when it has left."""
    assert slot.child is not None
    slot.child.terminate()
    await asyncio.wait({slot.child.ended}, timeout=DEATH_S)
    return slot.name


async def die_in_a_state(cluster: FaultCluster, rng: random.Random) -> str:
    """A worker dies at an exact state of the hand-off or of the generation, if it comes to that state soon."""
    point = rng.choice([name for name in faultpoints.POINTS if not name.startswith("gateway.")])
    role = point.partition(".")[0]
    slot = _pick_mortal(cluster, rng, *([role] if role in WORKERS else WORKERS))
    assert slot.child is not None
    cluster.inject(slot, f"{point}:kill:{rng.randint(1, 3)}")
    await asyncio.wait({slot.child.ended}, timeout=5)
    cluster.points_file(slot).write_text("")
    return f"{slot.name} at {point}"


async def pause_redis(cluster: FaultCluster, rng: random.Random) -> str:
    assert cluster.redis.child is not None
    seconds = rng.uniform(*PAUSE_S)
    cluster.redis.child.stop()
    try:
        await asyncio.sleep(seconds)
    finally:
        cluster.redis.child.go_on()
    return f"redis for {seconds:.1f} s"


async def cut_redis(cluster: FaultCluster, rng: random.Random) -> str:
    await cluster.redis.cut_connections()
    return "all connections to redis"


async def restart_redis(cluster: FaultCluster, rng: random.Random) -> str:
    """SIGKILL, and back with all that was acknowledged."""
    seconds = rng.uniform(*REDIS_DOWN_S)
    await cluster.redis.kill()
    await asyncio.sleep(seconds)
    await cluster.redis.start()
    return f"redis down for {seconds:.1f} s"


async def wipe_redis(cluster: FaultCluster, rng: random.Random) -> str:
    await cluster.redis.wipe()
    return "all keys of redis"


async def fill_redis(cluster: FaultCluster, rng: random.Random) -> str:
    """No memory for any further write, for a while."""
    seconds = rng.uniform(*PAUSE_S)
    await cluster.redis.limit_memory(1)
    try:
        await asyncio.sleep(seconds)
    finally:
        await cluster.redis.limit_memory(0)
    return f"redis full for {seconds:.1f} s"


def _link(
    front: tuple[str, ...], back: tuple[str, ...], make: Callable[[random.Random], Behaviour], *, both: bool = True
) -> Fault:
    """A fault of one link: the proxy before a process of role `front`, or between one of role `back` and Redis."""

    async def act(cluster: FaultCluster, rng: random.Random) -> str:
        slot = rng.choice(cluster.of_role(*front, *back))
        proxy = slot.front if slot.role in front else slot.back
        assert proxy is not None, "link faults need a proxied topology"
        behaviour, directions = make(rng), () if both else (rng.choice(tuple(Direction)),)
        proxy.behave(behaviour, *directions)
        try:
            await _last(proxy, behaviour, rng.uniform(*LINK_S))
        finally:
            proxy.heal()
        return f"{'front' if proxy is slot.front else 'redis link'} of {slot.name}"

    return act


async def _last(proxy: Proxy, behaviour: Behaviour, seconds: float) -> None:
    """Until a fault that acts once has acted, or the time is up."""
    once, before = behaviour.kind in (Kind.CUT, Kind.FLIP, Kind.DUPLICATE, Kind.DROP), proxy.counts[behaviour.kind]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not (once and proxy.counts[behaviour.kind] > before):
        await asyncio.sleep(0.02)


def _delay(rng: random.Random) -> Behaviour:
    return Behaviour(Kind.DELAY, seconds=rng.uniform(0.005, 0.1))


def _throttle(rng: random.Random) -> Behaviour:
    return Behaviour(Kind.THROTTLE, rate=rng.choice((20_000, 100_000)))


def _at(kind: Kind, most: int = 4000) -> Callable[[random.Random], Behaviour]:
    return lambda rng: Behaviour(kind, at=rng.randint(0, most))


_TO_REDIS = ((), ("gateway", *WORKERS))
_TO_CLIENT = (("gateway",), ())
_TO_DECODE = (("prefill",), ())

KINDS: Mapping[str, Fault] = {
    "kill-worker": kill_worker,
    "kill-gateway": kill_gateway,
    "freeze-worker": freeze_worker,
    "freeze-worker-long": freeze_worker_long,
    "freeze-gateway": freeze_gateway,
    "drain-worker": drain_worker,
    "drain-gateway": drain_gateway,
    "die-in-a-state": die_in_a_state,
    "redis-pause": pause_redis,
    "redis-cut": cut_redis,
    "redis-restart": restart_redis,
    "redis-wipe": wipe_redis,
    "redis-full": fill_redis,
    "redis-link-delay": _link(*_TO_REDIS, _delay),
    "redis-link-throttle": _link(*_TO_REDIS, _throttle),
    "redis-link-hole": _link(*_TO_REDIS, _at(Kind.HOLE)),
    "redis-link-reset": _link(*_TO_REDIS, _at(Kind.RESET)),
    "redis-link-cut": _link(*_TO_REDIS, _at(Kind.CUT), both=False),
    "client-link-delay": _link(*_TO_CLIENT, _delay),
    "client-link-hole": _link(*_TO_CLIENT, _at(Kind.HOLE)),
    "client-link-reset": _link(*_TO_CLIENT, _at(Kind.RESET)),
    "client-link-cut": _link(*_TO_CLIENT, _at(Kind.CUT), both=False),
    "kv-link-delay": _link(*_TO_DECODE, _delay),
    "kv-link-throttle": _link(*_TO_DECODE, _throttle),
    "kv-link-hole": _link(*_TO_DECODE, _at(Kind.HOLE)),
    "kv-link-reset": _link(*_TO_DECODE, _at(Kind.RESET)),
    "kv-link-cut": _link(*_TO_DECODE, _at(Kind.CUT, 40_000), both=False),
    "kv-link-flip": _link(*_TO_DECODE, _at(Kind.FLIP, 40_000), both=False),
    "kv-link-drop": _link(*_TO_DECODE, _at(Kind.DROP), both=False),
    "kv-link-duplicate": _link(*_TO_DECODE, _at(Kind.DUPLICATE), both=False),
}
"""Faults by name. Bytes are flipped, lost and doubled only where a digest guards them: TCP guards the other links."""


@dataclass(frozen=True, slots=True)
class Step:
    """One fault of a schedule: after `pause_s`, with a seed of its own."""

    kind: str
    pause_s: float
    seed: int


def make_schedule(kinds: Sequence[str], seed: int, count: int) -> list[Step]:
    """`count` random steps; every kind comes once before any comes twice."""
    rng, steps = random.Random(seed), list[Step]()
    while len(steps) < count:
        deck = list(kinds)
        rng.shuffle(deck)
        steps += [Step(kind, rng.uniform(0.2, 2.0), rng.randrange(1 << 30)) for kind in deck]
    return steps[:count]


async def run_step(run: Campaign, step: Step) -> None:
    """Wait until all is well and every request goes on, then do it."""
    await run.cluster.ready()
    await run.cluster.no_suspects()
    await asyncio.sleep(step.pause_s)
    began = time.monotonic()
    target = await KINDS[step.kind](run.cluster, random.Random(step.seed))
    run.disturbances.append(Disturbance(step.kind, target, began, time.monotonic()))
