"""A worker's ends of the bus: everything it says to Redis and hears from it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis

from shared.bus.connection import check, connect, connect_blocking
from shared.bus.draining import DrainOrders
from shared.bus.lane import open_lane
from shared.bus.registry import Registry
from shared.bus.requests import RequestStore
from shared.bus.workqueue import WorkQueue
from shared.config import RedisSettings
from shared.protocol.keys import Keys

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class WorkerBus:
    """`commands` is the connection that none of the others blocks."""

    commands: Redis
    store: RequestStore
    queue: WorkQueue
    registry: Registry
    orders: DrainOrders


@asynccontextmanager
async def open_bus(
    settings: RedisSettings, keys: Keys, streams: Sequence[str], worker_id: str
) -> AsyncIterator[WorkerBus]:
    """Connect and look at the server; `streams` are those that the worker reads. Raises BusUnavailable."""
    async with (
        connect(settings.url, settings.command_timeout_s) as commands,
        connect_blocking(settings.url) as reader,
        open_lane(settings.url, settings.command_timeout_s) as lane,
    ):
        log.info("bus_connected", server=await check(commands), worker_id=worker_id)
        yield WorkerBus(
            commands,
            RequestStore(commands, keys, lane=lane),
            WorkQueue(reader, commands, streams, worker_id),
            Registry(commands, keys, int(settings.heartbeat_ttl_s * 1000)),
            DrainOrders(commands, keys),
        )
