"""Server-sent events: one socket write per stream and step, comments while idle, an end that is always said.

A stream that fails after its headers says so in an error event before `[DONE]`, because clients
take a silent end for success.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from aiohttp import web

from services.gateway.errors import RESUME_AFTER_MS, error_event
from services.gateway.generation import Generation
from services.gateway.prepare import Plan
from services.gateway.responses import ResponseFormat, dumps

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

SMALL_WRITE_BYTES = 16 * 1024
"""The transport takes this much with nothing buffered, whatever the client does: it pauses us at 64 KiB only."""

_PING = b": ping\n\n"
_RETRY = f"retry: {RESUME_AFTER_MS}\n\n".encode()
_DONE = b"data: [DONE]\n\n"

STREAM_KEY = web.RequestKey("sse_stream", web.StreamResponse)
"""Where a request holds its response once the headers are out, for the error middleware."""


class ClientStalled(ConnectionError):
    """The client reads nothing any more; its request is cancelled as if it had left."""


def event(data: str, event_id: str = "") -> bytes:
    """One event; `data` has no line break because it is JSON."""
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}data: {data}\n\n".encode()


def opening_events(layout: ResponseFormat, generation: Generation) -> list[bytes]:
    """The events before any token; the last one has an id, so that a client that comes back does not get them again."""
    chunks = layout.opening()
    ids = [""] * (len(chunks) - 1) + [generation.last_event_id]
    return [event(chunk, event_id) for chunk, event_id in zip(chunks, ids, strict=False)]


class EventStream:
    """The response side of one stream; headers go out with the first write, and `opening` right after them."""

    def __init__(self, request: web.Request, stall_timeout_s: float, opening: Iterable[bytes] = ()) -> None:
        self._request = request
        self._stall_timeout_s = stall_timeout_s
        self._opening = b"".join(opening)
        self._response = web.StreamResponse(headers=HEADERS)

    @property
    def is_open(self) -> bool:
        return self._response.prepared

    async def write(self, parts: Sequence[bytes]) -> None:
        """Write all parts at once. Raises ClientStalled when the client takes nothing for too long."""
        if not parts:
            return
        data = b"".join(parts)
        if self._never_waits(len(data)):
            await self._response.write(data)
            return
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                if not self._response.prepared:
                    await self._response.prepare(self._request)
                    self._request[STREAM_KEY] = self._response
                opening, self._opening = self._opening, b""
                await self._response.write(opening + data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ClientStalled("the client stopped reading") from None

    def _never_waits(self, size: int) -> bool:
        """Whether so many bytes can be written at once: then no stall is to be watched for, which costs a timer."""
        transport = self._request.transport
        if not self.is_open or size > SMALL_WRITE_BYTES or transport is None:
            return False
        buffered: int = transport.get_write_buffer_size()
        return buffered == 0

    async def open(self) -> None:
        """Send the headers now, with how soon to come back when the connection breaks."""
        await self.write([_RETRY])

    async def ping(self) -> None:
        await self.write([_PING])

    async def close(self, *parts: bytes) -> web.StreamResponse:
        """Write the last events and `[DONE]`."""
        await self.write([*parts, _DONE])
        await self._response.write_eof()
        return self._response


async def stream_answer(
    stream: EventStream, generation: Generation, plan: Plan, layout: ResponseFormat, ping_s: float
) -> web.StreamResponse:
    """Write a generation's deltas as events until it ends; what the client had before it resumed is left out.

    An error before the first event is raised and becomes an ordinary error response; a later one is
    written into the stream and then raised, so that it is counted and logged all the same.
    """
    try:
        while (deltas := await generation.next(ping_s)) is not None:
            if not deltas:
                await stream.ping()
                continue
            usage = generation.usage() if plan.shown.continuous_usage else None
            events = [(layout.chunk(delta, usage), delta) for delta in deltas]
            await stream.write([event(chunk, delta.event_id) for chunk, delta in events if not delta.known])
    except Exception as exc:
        if stream.is_open and not isinstance(exc, ConnectionError):
            await stream.close(event(dumps(error_event(exc, generation.last_event_id))))
        raise
    wants_usage = plan.shown.include_usage and not generation.is_all_known
    tail = [event(layout.usage_chunk(generation.usage()), generation.last_event_id)] if wants_usage else []
    return await stream.close(*tail)
