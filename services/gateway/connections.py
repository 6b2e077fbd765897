"""Client connections and their bounds: how many, how long a request head may take, who goes when all are taken.

When `max_connections` are open, the one that has been idle longest (no request under way) makes room for the new
one, so that thousands of silent connections do not lock anybody out. Only when every connection is being served,
a new one is told 503 and closed.
"""

from __future__ import annotations

import asyncio
import resource
import uuid
from typing import Any, cast

import structlog
from aiohttp import web

from services.gateway.errors import ApiError, to_api_error
from shared.errors import Overloaded

OWN_FILES = 256
"""Open files kept back for the process itself: Redis, the model's files, logs."""
LINGER_S = 1.0
MAX_REFUSALS = 256

_log = structlog.get_logger()


def raise_open_files() -> int:
    """Raise the limit on open files to what the system allows; answers the limit then in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def room_for_connections(wanted: int) -> int:
    """How many of `wanted` connections the limit on open files leaves room for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    room = max(1, min(wanted, soft - OWN_FILES))
    if room < wanted:
        _log.warning("fewer_connections_than_set", room=room, wanted=wanted, open_files=soft)
    return room


class ConnectionSet:
    """All client connections of one listener; the owner of the idle order."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}
        self._refusals = 0

    def __len__(self) -> int:
        return len(self._open)

    def accept(self, server: web.Server, header_timeout_s: float, **options: Any) -> asyncio.Protocol:
        """The protocol of a connection that was just accepted."""
        if len(self._open) >= self._limit and not self._make_room():
            return Refusal(self)
        connection = Connection(self, server, header_timeout_s, **options)
        self._open.add(connection)
        return connection

    def busy(self, connection: Connection) -> None:
        """A request of the connection is being served."""
        self._idle.pop(connection, None)

    def idle(self, connection: Connection) -> None:
        """The connection waits for its next request."""
        if connection in self._open:
            self._idle[connection] = None

    def gone(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def refuse(self) -> bool:
        """Whether there is room to say so to one more client; to be given back by `refused`."""
        if self._refusals >= MAX_REFUSALS:
            return False
        self._refusals += 1
        return True

    def refused(self) -> None:
        self._refusals -= 1

    def _make_room(self) -> bool:
        if not self._idle:
            return False
        oldest = next(iter(self._idle))
        self.gone(oldest)
        oldest.force_close()
        return True


class Connection(web.RequestHandler):
    """One client connection; answers requests that cannot be parsed in OpenAI's error shape."""

    def __init__(self, members: ConnectionSet, server: web.Server, header_timeout_s: float, **options: Any) -> None:
        super().__init__(server, **options)
        self._members = members
        self._header_timeout_s = header_timeout_s
        self._head_deadline: asyncio.TimerHandle | None = None
        self._is_serving = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._members.idle(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._members.gone(self)
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes while no request is served begin a request's head, which has to be complete in time."""
        super().data_received(data)
        if not self._is_serving and self._head_deadline is None:
            self._head_deadline = asyncio.get_running_loop().call_later(self._header_timeout_s, self.force_close)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun already")
        if status < 500:
            error = ApiError(status, "invalid_request_error", "bad_request", "The HTTP request is malformed.")
        else:
            _log.error("connection_failed", exc_info=exc)
            error = ApiError(status, "server_error", "internal_error", "The server failed.")
        response = error.response()
        response.headers["x-request-id"] = uuid.uuid4().hex
        response.force_close()
        return response

    async def _handle_request(self, *args: Any) -> tuple[web.StreamResponse, bool]:
        """From a complete head to the end of the response; aiohttp calls it once for each request."""
        self._stop_clock()
        self._is_serving = True
        self._members.busy(self)
        try:
            return await super()._handle_request(*args)
        finally:
            self._is_serving = False
            self._members.idle(self)

    def _stop_clock(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None


class Refusal(asyncio.Protocol):
    """Says 503 to a connection there is no room for, and closes it when the client has, or shortly after.

    Closing at once would reset the connection while the client still sends, and the answer would be lost.
    """

    def __init__(self, members: ConnectionSet) -> None:
        self._members = members
        self._counted = False
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.Transport, transport)  # uvloop's is one without being derived from it
        self._counted = self._members.refuse()
        if not self._counted:
            stream.abort()
            return
        stream.write(_refusal())
        stream.write_eof()
        self._deadline = asyncio.get_running_loop().call_later(LINGER_S, stream.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self._counted:
            self._members.refused()


def _refusal() -> bytes:
    error = to_api_error(Overloaded("Too many connections are open; try again in a moment.", retry_after=1))
    body = error.body()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Retry-After: {error.headers['Retry-After']}\r\nx-request-id: {uuid.uuid4().hex}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
