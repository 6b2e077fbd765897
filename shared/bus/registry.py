"""Heartbeats of workers and gateways: keys that expire unless their process keeps writing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

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
        values = (await self._members(self._keys.workers, self._keys.worker)).values()
        return sorted(_decoded(values), key=lambda b: (b.role, b.worker_id))

    async def beat_gateway(self, gateway_id: str) -> None:
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.set(self._keys.gateway(gateway_id), b"1", px=self.beat_ttl_ms)
            pipe.sadd(self._keys.gateways, gateway_id)
            await pipe.execute()

    async def leave_gateway(self, gateway_id: str) -> None:
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.delete(self._keys.gateway(gateway_id))
            pipe.srem(self._keys.gateways, gateway_id)
            await pipe.execute()

    async def live_gateways(self) -> set[str]:
        """Ids of the gateways that share the workers now."""
        return set(await self._members(self._keys.gateways, self._keys.gateway))

    async def dead_workers(self, worker_ids: Iterable[str]) -> set[str]:
        """Those of `worker_ids` that have no heartbeat."""
        return await self._missing({worker_id: self._keys.worker(worker_id) for worker_id in worker_ids})

    async def dead_gateways(self, gateway_ids: Iterable[str]) -> set[str]:
        return await self._missing({gateway_id: self._keys.gateway(gateway_id) for gateway_id in gateway_ids})

    async def _members(self, list_key: str, beat_key: Callable[[str], str]) -> dict[str, bytes | str]:
        """Heartbeats of the ids in a set; an id whose heartbeat expired is taken off, unless writes are refused."""
        ids = sorted(as_text(member) for member in await self._client.smembers(list_key))
        if not ids:
            return {}
        values = dict(zip(ids, await self._client.mget([beat_key(member) for member in ids]), strict=True))
        expired = [member for member, value in values.items() if value is None]
        if expired:
            with suppress(ResponseError):
                await self._client.srem(list_key, *expired)
        return {member: value for member, value in values.items() if value is not None}

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
