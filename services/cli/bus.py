"""The deployment's Redis as operators' commands reach it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis

from shared.bus.connection import check, connect
from shared.bus.local import find_bus
from shared.config import Settings
from shared.errors import ConfigurationError


@asynccontextmanager
async def deployment_bus(settings: Settings) -> AsyncIterator[Redis]:
    """A client of the Redis that is set, else of the `slipstream serve` of this user on this machine.

    Raises ConfigurationError when there is neither, BusUnavailable when it does not answer.
    """
    url = settings.redis.url or find_bus(settings.deployment)
    if not url:
        raise ConfigurationError(
            f"no `slipstream serve` of yours runs here as deployment {settings.deployment!r}; "
            "for a cluster elsewhere set --redis-url or SLIPSTREAM_REDIS__URL"
        )
    async with connect(url) as client:
        await check(client)
        yield client
