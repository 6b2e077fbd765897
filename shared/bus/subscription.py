"""The messages of one pub/sub channel, read as they come off the socket.

The client library connects, authenticates and speaks TLS. From then on the connection is read here, because the
library goes through a retry, a timeout and a stream reader for every message: five times the cost of the message, and
there is one for every step of every worker.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection

PING_S = 15.0
_PING = hiredis.pack_command(("PING",))


class Subscription(asyncio.Protocol):
    """One connection with one channel. Make it with `open`; `close` it whatever happens."""

    def __init__(self, client: Redis, connection: AbstractConnection) -> None:
        self._client = client
        self._connection = connection
        self._parser = hiredis.Reader()
        self._loop = asyncio.get_running_loop()
        self._confirmed: asyncio.Future[None] = self._loop.create_future()
        self._waiter: asyncio.Future[None] | None = None
        self._messages: list[bytes] = []
        self._lost: Exception | None = None
        # The one thing the library does not offer: its transport, to be read by somebody else.
        self._transport = cast(asyncio.Transport, connection._writer.transport)  # type: ignore[union-attr]
        self._transport.set_protocol(self)
        self._pinging = self._loop.call_later(PING_S, self._ping)

    @classmethod
    async def open(cls, client: Redis, channel: str) -> Subscription:
        """Subscribe and wait for the server's confirmation. Raises redis errors and OSError."""
        subscription = cls(client, await client.connection_pool.get_connection())  # type: ignore[no-untyped-call]
        try:
            subscription._transport.write(hiredis.pack_command(("SUBSCRIBE", channel)))  # type: ignore[arg-type]
            await subscription._confirmed
        except BaseException:
            await subscription.close()
            raise
        return subscription

    async def messages(self) -> list[bytes]:
        """What was published since the last call, at least one message. Raises OSError once the connection is lost."""
        while not self._messages:
            if self._lost is not None:
                raise self._lost
            self._waiter = self._loop.create_future()
            await self._waiter
        taken, self._messages = self._messages, []
        return taken

    async def close(self) -> None:
        self._pinging.cancel()
        self._transport.abort()
        await self._connection.disconnect(nowait=True)
        await self._client.connection_pool.release(self._connection)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
            while (reply := self._parser.gets()) is not False:
                self._take(reply)
        except hiredis.HiredisError as error:
            self._fail(ConnectionError(f"the server's reply cannot be read: {error}"))
        if self._messages:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ConnectionError(f"the server closed the connection: {exc}"))

    def _take(self, reply: Any) -> None:
        match reply:
            case [b"message", _, data]:
                self._messages.append(data)
            case [b"subscribe", *_] if not self._confirmed.done():
                self._confirmed.set_result(None)
            case Exception():
                self._fail(ConnectionError(f"the server refused the subscription: {reply}"))

    def _fail(self, error: Exception) -> None:
        self._pinging.cancel()
        self._transport.abort()
        self._lost = self._lost or error
        if not self._confirmed.done():
            self._confirmed.set_exception(self._lost)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _ping(self) -> None:
        """Something has to be sent now and then: a connection that is cut without a word is noticed by that only."""
        self._transport.write(_PING)
        self._pinging = self._loop.call_later(PING_S, self._ping)
