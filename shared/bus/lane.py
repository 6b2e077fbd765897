"""A connection that one script has to itself: for the call that is made at every step.

The library's way to a reply (a pool, a retry, statistics, a task and timers for each command) costs several times what
the call itself does. A lane keeps one of its connections, packs the command in C and waits with one timer. It is a
short cut only: where it is cut, the caller makes the same call once more by the ordinary client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection

from shared.bus.connection import connect_lane

Arg = str | bytes | int

_pack: Callable[[tuple[Arg, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]  # its types want one item


class Lane:
    """Calls of one task at a time; connects by itself, again after whatever cut it."""

    def __init__(self, connection: AbstractConnection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()

    async def call(self, sha: str, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """The reply of the script `sha`.

        Raises redis errors, OSError and, after the lane's time, TimeoutError; the script may then have run or not.
        """
        command = _pack(("EVALSHA", sha, len(keys), *keys, *args))
        async with self._lock, asyncio.timeout(self._timeout_s):
            await self._connection.send_packed_command(command, check_health=False)
            return await self._connection.read_response()


@asynccontextmanager
async def open_lane(url: str, timeout_s: float) -> AsyncIterator[Lane]:
    """A lane to the server at `url`; it connects at its first call."""
    async with connect_lane(url) as client:
        connection = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            yield Lane(connection, timeout_s)
        finally:
            await connection.disconnect()
