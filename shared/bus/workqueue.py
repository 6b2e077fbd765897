"""Reading work entries as one consumer of a group.

Entries are never acknowledged here: only the scripts do that, together with the change of the
request's state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus.connection import as_text
from shared.bus.script import Script
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
        self._forget = Script("forget_consumer")
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
        """Up to `count` new entries a stream, waiting at most `block_ms` (0: not at all).

        `streams` narrows the read to some of the queue's streams. Groups that a Redis lost are made again.
        """
        if not self._ready:
            await self.ensure()
        wanted: dict[Any, Any] = dict.fromkeys(streams if streams is not None else self.streams, ">")
        try:
            reply = await self._reader.xreadgroup(
                self._group, self.consumer, wanted, count=count, block=block_ms or None
            )
        except ResponseError as error:
            if not _is_group_lost(error):
                raise
            self._ready = False
            return []
        return [
            (stream.decode(), entry_id.decode(), _text(fields))
            for stream, entries in _items(reply)
            for entry_id, fields in entries
        ]

    async def pending_own(self) -> list[tuple[str, str, str | None]]:
        """(stream, entry id, request id) of entries delivered to this consumer and not yet gone.

        At most `PENDING_PAGE` a stream. The request id is None when the entry's payload is gone.
        """
        found: list[tuple[str, str, str | None]] = []
        for stream in self.streams:
            found += [(stream, *item) for item in await pending(self._commands, stream, self.consumer, self._group)]
        return found

    async def leave(self) -> None:
        """Take this consumer off the groups where it holds nothing any more."""
        for stream in self.streams:
            try:
                await self._forget(self._commands, [stream], [self.consumer])
            except ResponseError as error:
                if not _is_group_lost(error):
                    raise

    async def refresh_private(self, streams: Sequence[str], ttl_ms: int) -> None:
        """Let streams that only this worker reads expire soon after its death."""
        async with self._commands.pipeline(transaction=False) as pipe:
            for stream in streams:
                pipe.pexpire(stream, ttl_ms)
            await pipe.execute()

    async def remove_private(self, streams: Sequence[str]) -> None:
        """Delete streams that only this worker reads, when it leaves."""
        if streams:
            await self._commands.delete(*streams)


async def pending(client: Redis, stream: str, consumer: str, group: str = GROUP) -> list[tuple[str, str | None]]:
    """(entry id, request id or None) of what a consumer holds; reading them changes neither idle time nor count."""
    try:
        rows = await client.xpending_range(stream, group, "-", "+", PENDING_PAGE, consumername=consumer)
    except ResponseError as error:
        if _is_group_lost(error):
            return []
        raise
    ids = [as_text(row["message_id"]) for row in rows]
    if not ids:
        return []
    async with client.pipeline(transaction=False) as pipe:
        for entry_id in ids:
            pipe.xrange(stream, entry_id, entry_id)
        replies = await pipe.execute()
    return [
        (entry_id, _text(reply[0][1]).get("id") if reply else None)
        for entry_id, reply in zip(ids, replies, strict=True)
    ]


def _is_group_lost(error: ResponseError) -> bool:
    return "NOGROUP" in str(error) or str(error).startswith("UNBLOCKED")


def _items(reply: Any) -> list[tuple[bytes, list[Any]]]:
    return list(reply.items()) if isinstance(reply, Mapping) else [tuple(item) for item in reply or []]


def _text(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    return {key.decode(): value.decode("utf-8", "surrogateescape") for key, value in fields.items()}
