"""Bringing back work whose holder is gone: dead peers' entries, our own forgotten ones, orphans.

Wrong suspicion is harmless, the scripts fence the suspect; it only costs a recomputation. So the
sweep errs on the patient side: it judges only after one heartbeat TTL of healthy round trips of
its own (else a pause of ours or of Redis looks like everybody's death) and after two misses. A round trip
proves little: a Redis out of memory answers every PING and refuses every heartbeat. So whoever writes
our heartbeat calls `disturbed` when that fails.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from shared.bus.registry import Registry
from shared.bus.requests import RequestStore
from shared.bus.results import SWEPT_STALE
from shared.bus.script import Script
from shared.bus.workqueue import WorkQueue, pending
from shared.protocol.keys import GROUP

INTERVAL_S = 1.0
OWN_EVERY_S = 5.0
ORPHAN_GRACE_S = 10.0
SLOW_S = 1.0

_log = structlog.get_logger()


@dataclass(slots=True)
class SweepCounters:
    """Plain counts since the start; the heartbeat tells them."""

    dead_workers: int = 0
    requests: int = 0
    own: int = 0
    orphans: int = 0


@dataclass(frozen=True, slots=True)
class InFlight:
    """What this worker works on now: its work entries, and its requests as (request id, gateway)."""

    entries: Callable[[], Collection[tuple[str, str]]]
    requests: Callable[[], Iterable[tuple[str, str]]]


class Sweeper:
    """Run `run` beside a worker's loops. `tick` is one round; it may be called at any time.

    Dead consumers are looked for on the queue's own streams and on `watched`: with the other role's streams there, the
    last decode worker's requests go back to prefill at once instead of waiting for another decode worker.
    """

    def __init__(
        self,
        client: Redis,
        store: RequestStore,
        queue: WorkQueue,
        registry: Registry,
        in_flight: InFlight,
        clock: Callable[[], float] = time.monotonic,
        watched: Sequence[str] = (),
        orphan_grace_s: float = ORPHAN_GRACE_S,
    ) -> None:
        self.counters = SweepCounters()
        self._client = client
        self._store = store
        self._queue = queue
        self._registry = registry
        self._in_flight = in_flight
        self._clock = clock
        self._orphan_grace_s = orphan_grace_s
        self._watched = tuple(dict.fromkeys((*queue.streams, *watched)))
        self._healthy_since: float | None = None
        self._own_checked = -OWN_EVERY_S
        self._suspects: set[tuple[str, str]] = set()
        self._strays: set[tuple[str, str]] = set()
        self._lonely: dict[str, float] = {}
        self._forget = Script("forget_consumer")

    async def run(self) -> None:
        """Tick until cancelled; errors of Redis only restart the healthy time."""
        while True:
            try:
                await self.tick()
            except (RedisError, OSError) as error:
                self.disturbed()
                _log.warning("sweep_failed", error=type(error).__name__)
            await asyncio.sleep(INTERVAL_S)

    def disturbed(self) -> None:
        """After a failure or a standstill of ours: judge nobody until healthy again, look at our own entries soon."""
        self._healthy_since = None
        self._suspects.clear()
        self._own_checked = -OWN_EVERY_S

    async def tick(self) -> None:
        start = self._clock()
        await self._client.ping()
        now = self._clock()
        if now - start > SLOW_S:
            self.disturbed()
        if self._healthy_since is None:
            self._healthy_since = now
        if now - self._own_checked >= OWN_EVERY_S or self._strays:
            self._own_checked = now
            await self._sweep_own()
        if self._is_healthy(now):
            await self._sweep_dead()
        if self._is_healthy(now):
            await self._cancel_orphans(now)

    def _is_healthy(self, now: float) -> bool:
        """Whether we were undisturbed for as long as a heartbeat lives. A wait for Redis may have ended that."""
        since = self._healthy_since
        return since is not None and now - since >= self._registry.beat_ttl_ms / 1000

    async def _sweep_own(self) -> None:
        """Entries delivered to us that we do not work on, seen twice: a reply that was lost."""
        held = await self._queue.pending_own()
        busy = set(self._in_flight.entries())
        strays = {
            (stream, entry_id): request_id for stream, entry_id, request_id in held if (stream, entry_id) not in busy
        }
        for (stream, entry_id), request_id in strays.items():
            if (stream, entry_id) in self._strays:
                self.counters.own += 1
                await self._sweep(stream, entry_id, request_id, counted=False)
        self._strays = set(strays) - self._strays

    async def _sweep_dead(self) -> None:
        dead: set[tuple[str, str]] = set()
        for stream in self._watched:
            names = await self._consumers(stream)
            dead |= {(stream, name) for name in await self._registry.dead_workers(names - {self._queue.consumer})}
        for stream, name in dead & self._suspects:
            await self._sweep_consumer(stream, name)
        self._suspects = dead if self._healthy_since is not None else set()

    async def _consumers(self, stream: str) -> set[str]:
        try:
            rows = await self._client.xinfo_consumers(stream, GROUP)
        except ResponseError as error:
            if str(error).startswith(("NOGROUP", "no such key")):
                return set()
            raise
        return {row["name"].decode() for row in rows}

    async def _sweep_consumer(self, stream: str, name: str) -> None:
        held = await pending(self._client, stream, name)
        if held:
            self.counters.dead_workers += 1
            _log.warning("worker_swept", worker_id=name, entries=len(held))
        for entry_id, request_id in held:
            await self._sweep(stream, entry_id, request_id, counted=True)
        await self._forget(self._client, [stream], [name])

    async def _sweep(self, stream: str, entry_id: str, request_id: str | None, counted: bool) -> None:
        if request_id is None:
            await self._client.xack(stream, GROUP, entry_id)
            return
        outcome = await self._store.sweep(stream, entry_id, request_id, counted)
        if outcome != SWEPT_STALE:
            self.counters.requests += 1
        _log.info("entry_swept", request_id=request_id, outcome=outcome, counted=counted)

    async def _cancel_orphans(self, now: float) -> None:
        """End requests whose gateway has had no heartbeat for the grace time, unless they were adopted."""
        held = list(self._in_flight.requests())
        dead = await self._registry.dead_gateways({gateway for _, gateway in held})
        self._lonely = {gateway: self._lonely.get(gateway, now) for gateway in dead}
        for request_id, gateway in held:
            if gateway in dead and now - self._lonely[gateway] >= self._orphan_grace_s:
                self.counters.orphans += 1
                await self._store.cancel(request_id, "orphaned", force=True, gateway=gateway)
