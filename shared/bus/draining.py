"""Orders to drain: a key per process, which the process looks for as often as it beats. Needs no signal and no host."""

from __future__ import annotations

import asyncio

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.protocol.keys import Keys
from shared.tasks import heed_cancellation

log = structlog.get_logger()

ORDER_TTL_S = 60.0
"""An order to a process that is not there any more goes by itself."""


class DrainOrders:
    """Give, hear and remove orders to drain. Raises redis errors."""

    def __init__(self, client: Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    async def give(self, process_id: str, ttl_s: float = ORDER_TTL_S) -> None:
        await self._client.set(self._keys.drain(process_id), b"1", px=int(ttl_s * 1000))

    async def heard(self, process_id: str) -> bool:
        """Whether this process was told to drain."""
        return bool(await self._client.exists(self._keys.drain(process_id)))

    async def follow(self, process_id: str, stop: asyncio.Event, interval_s: float) -> None:
        """Set `stop` once this process is told to drain, and take the order off."""
        while not stop.is_set():
            try:
                if await self.heard(process_id):
                    log.info("told_to_drain", process_id=process_id)
                    stop.set()
                    await self.forget(process_id)
            except (RedisError, OSError) as error:
                log.warning("drain_order_not_read", error=type(error).__name__)
            heed_cancellation()
            await asyncio.sleep(interval_s)

    async def forget(self, process_id: str) -> None:
        await self._client.delete(self._keys.drain(process_id))
