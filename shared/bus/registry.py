"""Heartbeats of workers and gateways: keys that expire unless their process keeps writing them."""

from __future__ import annotations

from collections.abc import Iterable

import structlog
from redis.asyncio import Redis

from shared.bus.connection import as_text
from shared.errors import ProtocolError
from shared.protocol.codec import decode, encode
from shared.protocol.keys import Keys
from shared.protocol.messages import WorkerBeat

BEAT_TTL_MS = 3000
BEAT_INTERVAL_S = 1.0

_log = structlog.get_logger()


class Registry:
    """Who is alive. Beat every `BEAT_INTERVAL_S`; a process without beat for `beat_ttl_ms` counts as gone."""

    def __init__(self, client: Redis, keys: Keys, beat_ttl_ms: int = BEAT_TTL_MS) -> None:
        self._client = client
        self._keys = keys
        self.beat_ttl_ms = beat_ttl_ms

    async def beat(self, beat: WorkerBeat) -> None:
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.set(self._keys.worker(beat.worker_id), encode(beat), px=self.beat_ttl_ms)
            pipe.sadd(self._keys.workers, beat.worker_id)
            await pipe.execute()

    async def leave(self, worker_id: str) -> None:
        """Take a worker off the list at the end of its drain."""
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.delete(self._keys.worker(worker_id))
            pipe.srem(self._keys.workers, worker_id)
            await pipe.execute()

    async def live(self) -> list[WorkerBeat]:
        """Beats of all live workers, by role and id. A beat that cannot be read is logged and left out."""
        ids = sorted(as_text(member) for member in await self._client.smembers(self._keys.workers))
        if not ids:
            return []
        values = await self._client.mget([self._keys.worker(worker_id) for worker_id in ids])
        expired = [worker_id for worker_id, value in zip(ids, values, strict=True) if value is None]
        if expired:
            await self._client.srem(self._keys.workers, *expired)
        return sorted(_decoded(value for value in values if value is not None), key=lambda b: (b.role, b.worker_id))

    async def beat_gateway(self, gateway_id: str) -> None:
        await self._client.set(self._keys.gateway(gateway_id), b"1", px=self.beat_ttl_ms)

    async def leave_gateway(self, gateway_id: str) -> None:
        await self._client.delete(self._keys.gateway(gateway_id))

    async def dead_workers(self, worker_ids: Iterable[str]) -> set[str]:
        """Those of `worker_ids` that have no heartbeat."""
        return await self._missing({worker_id: self._keys.worker(worker_id) for worker_id in worker_ids})

    async def dead_gateways(self, gateway_ids: Iterable[str]) -> set[str]:
        return await self._missing({gateway_id: self._keys.gateway(gateway_id) for gateway_id in gateway_ids})

    async def _missing(self, names: dict[str, str]) -> set[str]:
        if not names:
            return set()
        values = await self._client.mget(list(names.values()))
        return {name for name, value in zip(names, values, strict=True) if value is None}


def _decoded(values: Iterable[bytes | str]) -> list[WorkerBeat]:
    beats = []
    for value in values:
        try:
            beats.append(decode(WorkerBeat, value if isinstance(value, bytes) else value.encode()))
        except ProtocolError as error:
            _log.warning("worker_beat_unreadable", error=str(error))
    return beats
