"""A Redis of the harness's own: it can die, come back with its journal, forget, stand still and be full."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.bus.connection import connect
from shared.bus.embedded import find_binary
from tests.faults.ports import free_port
from tests.faults.spawner import Child, Spawner, ended

START_TIMEOUT_S = 20.0
_CONFIG = """
port {port}
bind 127.0.0.1
requirepass "{password}"
save ""
appendonly yes
appendfsync always
maxmemory-policy noeviction
dir "{folder}"
loglevel warning
"""


class FaultRedis:
    """Every write is on disk before its reply, so that a restart loses nothing; `wipe` loses everything."""

    def __init__(self, spawner: Spawner, folder: Path) -> None:
        self.port = free_port()
        self.password = secrets.token_urlsafe(16)
        self.child: Child | None = None
        self._spawner = spawner
        self._folder = folder
        self._client: Redis | None = None

    @property
    def url(self) -> str:
        return self.url_at(self.port)

    def url_at(self, port: int) -> str:
        """The URL by way of another port, a proxy's."""
        return f"redis://:{self.password}@127.0.0.1:{port}/0"

    @property
    def client(self) -> Redis:
        """For the harness to look and to disturb; not by way of any proxy."""
        if self._client is None:
            self._client = connect(self.url)
        return self._client

    async def start(self) -> None:
        """Start, or start again with what is on disk; returns once it answers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "conf"
        config.write_text(_CONFIG.format(port=self.port, password=self.password, folder=self._folder))
        command = [str(find_binary()), str(config)]
        self.child = await self._spawner.start(command, {"PATH": "/usr/bin:/bin"}, self._folder / "log")
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await self.answers():
                if not self.child.is_alive:
                    raise RuntimeError(f"the Redis of the harness ended at once: {self.child.log_text()[-500:]}")
                await asyncio.sleep(0.01)

    async def answers(self) -> bool:
        try:
            return bool(await self.client.ping())
        except (RedisError, OSError):
            return False

    async def kill(self) -> None:
        """SIGKILL; `start` brings it back with all that was acknowledged."""
        assert self.child is not None
        self.child.kill()
        await ended(self.child, START_TIMEOUT_S)

    async def wipe(self) -> None:
        """All keys are gone, as after a restart without persistence."""
        await self.client.flushall()

    async def limit_memory(self, num_bytes: int) -> None:
        """Refuse writes that need memory above `num_bytes`; 0 lifts the limit."""
        await self.client.config_set("maxmemory", num_bytes)

    async def used_memory(self) -> int:
        return int((await self.client.info("memory"))["used_memory"])

    async def cut_connections(self) -> None:
        """Close every client's connection but this one's."""
        for kind in ("normal", "pubsub"):
            await self.client.client_kill_filter(_type=kind, skipme=True)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
