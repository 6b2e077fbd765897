"""One gateway's pub/sub channel: the fast path of the journal's entries, which may lose any of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.bus.subscription import Subscription
from shared.errors import BusUnavailable, ProtocolError
from shared.protocol.codec import decode_event, unpack
from shared.protocol.keys import Keys
from shared.protocol.messages import JournalEntry

CONFIRM_TIMEOUT_S = 5.0
RECONNECT_S = 0.2

Published = tuple[str, JournalEntry]
"""(request id, entry)"""

_log = structlog.get_logger()


class Resubscribed:
    """In the feed after a cut connection: messages may have been lost, read the journals."""


class EventFeed:
    """Subscribe with `subscribe`, then iterate: lists of entries, or `Resubscribed`.

    `client` is a blocking client of its own; iterating never ends and reconnects by itself.
    """

    def __init__(self, client: Redis, keys: Keys, gateway_id: str) -> None:
        self._client = client
        self._channel = keys.tokens(gateway_id)
        self._subscription: Subscription | None = None

    async def subscribe(self) -> None:
        """Subscribe and wait for the server's confirmation; only then may requests be submitted."""
        await self.aclose()
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                self._subscription = await Subscription.open(self._client, self._channel)
        except (RedisError, OSError, TimeoutError) as error:
            raise BusUnavailable(f"the token channel cannot be subscribed: {type(error).__name__}") from error

    async def aclose(self) -> None:
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            await subscription.close()

    async def __aiter__(self) -> AsyncIterator[list[Published] | Resubscribed]:
        while True:
            try:
                if self._subscription is None:
                    await self.subscribe()
                    yield Resubscribed()
                    continue
                messages = await self._subscription.messages()
            except (RedisError, OSError, BusUnavailable) as error:
                _log.warning("token_channel_lost", error=type(error).__name__)
                await self._drop()
                await asyncio.sleep(RECONNECT_S)
                continue
            for data in messages:
                yield _decoded(data)

    async def _drop(self) -> None:
        try:
            await self.aclose()
        except (RedisError, OSError) as error:
            _log.debug("token_channel_close_failed", error=type(error).__name__)


def _decoded(data: bytes) -> list[Published]:
    """Entries of one publication; what cannot be read is logged and left to the journal."""
    try:
        return [_published(item) for item in unpack(data)]
    except (ProtocolError, ValueError, TypeError) as error:
        _log.warning("publication_unreadable", error=str(error)[:200])
        return []


def _published(item: Any) -> Published:
    request_id, epoch, ev, kind, blob = item
    if type(request_id) is not bytes or type(epoch) is not int or type(ev) is not int:
        raise ProtocolError("a publication does not begin with a request id and two integers")
    return request_id.decode(), JournalEntry(epoch, ev, decode_event(kind, blob))
