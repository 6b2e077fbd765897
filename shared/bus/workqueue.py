"""Reading work entries as one consumer of a group.

Entries are never acknowledged here: only the scripts do that, together with the change of the
request's state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.protocol.keys import GROUP

PENDING_PAGE = 200

WorkItem = tuple[str, str, dict[str, str]]
"""(stream, entry id, fields)"""


class WorkQueue:
    """The work streams one worker reads, as consumer `consumer` (a new name for each process start).

    `reader` is a client for blocking reads: its socket timeout is longer than any block.
    """

    def __init__(
        self, reader: Redis, commands: Redis, streams: Sequence[str], consumer: str, group: str = GROUP
    ) -> None:
        self.consumer = consumer
        self.streams = tuple(streams)
        self._reader = reader
        self._commands = commands
        self._group = group
        self._ready = False

    async def ensure(self) -> None:
        """Create the missing groups from the start of their stream, so that no queued work is skipped."""
        for stream in self.streams:
            try:
                await self._commands.xgroup_create(stream, self._group, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise
        self._ready = True

    async def read(self, count: int, block_ms: int, streams: Sequence[str] | None = None) -> list[WorkItem]:
        """Up to `count` new entries a stream, waiting at most `block_ms`; [] when there are none.

        `streams` narrows the read to some of the queue's streams. Groups lost with a Redis are made again.
        """
        raise NotImplementedError

    async def pending_own(self) -> list[tuple[str, str, str | None]]:
        """(stream, entry id, request id) of every entry delivered to this consumer and not yet gone.

        The request id is None when the entry's payload is gone.
        """
        raise NotImplementedError

    async def refresh_private(self, streams: Sequence[str], ttl_ms: int) -> None:
        """Let streams only this worker reads expire soon after its death."""
        raise NotImplementedError
