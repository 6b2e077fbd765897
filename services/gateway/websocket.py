"""Chat completions over a WebSocket: the same URL as for POST, upgraded.

    client → server   a request body of POST /v1/chat/completions; `stream` is implied
                      {"type": "resume", "id": …, "starting_after": …} goes on with a stream, as GET
                      /v1/streams/{id} does; `starting_after` is the last `event_id`, left out for all
                      {"type": "cancel"} stops the one that runs
    server → client   the chunks of the stream, one a frame, with their `event_id`
                      {"type": "done", "id": …, "status": "finished" | "cancelled"} ends a request
                      {"type": "error", "id": …, "error": {…}} ends a request that failed; with
                      "id": null it refuses a frame, and a request that runs goes on

One request runs at a time; the socket stays open for the next. A frame over the size limit closes
it with 1009, the gateway's drain with 1001. aiohttp puts a frame together before it is seen here, so frames count as
bodies under way (`gateway.max_bodies_bytes`) from then on, until they are read into a request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from aiohttp import WSCloseCode, WSMsgType, web

from services.gateway.errors import OriginRefused, RateLimited, error_event, to_api_error
from services.gateway.generation import Generation
from services.gateway.prepare import Plan
from services.gateway.responses import ResponseFormat
from services.gateway.schemas import ChatBody, parse_json, validate
from services.gateway.text import TextService
from shared.errors import InvalidRequest, Overloaded, SlipstreamError

HEARTBEAT_S = 20.0

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ResumeFrame:
    """A client wants to read a stream on, over this socket."""

    response_id: str
    starting_after: str


RunFrame = Callable[[ChatBody | ResumeFrame, "ChatSocket"], Awaitable[None]]
HoldBytes = Callable[[int], AbstractContextManager[None]]
"""Counts bytes of a frame while they are read. Raises Overloaded."""


def check_origin(request: web.Request) -> None:
    """Browsers name the page that connects; only pages of this very server may. Raises OriginRefused."""
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != request.host:
        raise OriginRefused("WebSockets are open to pages of this server only.")


class ChatSocket:
    """One open socket: reads frames, runs one request at a time, writes its chunks."""

    def __init__(
        self, socket: web.WebSocketResponse, text: TextService, hold: HoldBytes, run: RunFrame, stall_timeout_s: float
    ) -> None:
        self._socket = socket
        self._text = text
        self._hold = hold
        self._run = run
        self._stall_timeout_s = stall_timeout_s
        self._running: asyncio.Task[None] | None = None
        self._request_id: str | None = None
        self._generation: Generation | None = None

    async def serve(self) -> None:
        """Until the client closes; whatever runs then is cancelled."""
        try:
            async for message in self._socket:
                if message.type is WSMsgType.TEXT:
                    await self._take(message.data)
                elif message.type is WSMsgType.BINARY:
                    await self._refuse(InvalidRequest("Send text frames; a binary frame is not understood."))
                del message  # else an idle socket keeps its last frame in memory
        finally:
            await self._stop()

    async def stream(self, generation: Generation, plan: Plan, layout: ResponseFormat) -> None:
        """Write a generation's chunks, one a frame, and the end."""
        self._request_id, self._generation = plan.response_id, generation
        if not generation.is_resumed:
            for chunk in layout.opening():
                await self._send(_named(chunk, generation.last_event_id))
        while (deltas := await generation.next(HEARTBEAT_S)) is not None:
            usage = generation.usage() if plan.shown.continuous_usage else None
            for chunk, delta in [(layout.chunk(delta, usage), delta) for delta in deltas]:
                if not delta.known:
                    await self._send(_named(chunk, delta.event_id))
        if plan.shown.include_usage and not generation.is_all_known:
            await self._send(_named(layout.usage_chunk(generation.usage()), generation.last_event_id))
        await self._send_done("finished")

    async def _take(self, frame: str) -> None:
        try:
            raw = frame.encode("utf-8", "surrogatepass")
            with self._hold(len(raw)):
                asked = await self._read(raw)
        except SlipstreamError as exc:
            await self._refuse(exc)
            return
        if asked is None:
            await self._cancel()
            return
        self._request_id = self._generation = None
        self._running = asyncio.create_task(self._answer(asked))

    async def _read(self, raw: bytes) -> ChatBody | ResumeFrame | None:
        """What a frame asks for; None: a cancel. Raises RequestError."""
        body = await self._text.parse(raw, parse_json)
        if body.get("type") == "cancel":
            return None
        if self._running is not None and not self._running.done():
            raise InvalidRequest("A request is running on this socket; cancel it first.", None, "request_running")
        if body.get("type") == "resume":
            return _resume_frame(body)
        return await self._text.run(validate, ChatBody, {**body, "stream": True})

    async def _answer(self, asked: ChatBody | ResumeFrame) -> None:
        try:
            try:
                await self._run(asked, self)
            except SlipstreamError as exc:
                await self._send_error(exc, self._request_id)
            except ConnectionError:
                raise
            except Exception as exc:
                _log.exception("websocket_request_failed", request_id=self._request_id)
                await self._send_error(exc, self._request_id)
        except ConnectionError:
            _log.info("websocket_lost", request_id=self._request_id)

    async def _cancel(self) -> None:
        """Stop the running request and say so; nothing happens when none runs."""
        if await self._stop():
            await self._send_done("cancelled")

    async def _stop(self) -> bool:
        """Whether a request was running and is stopped now."""
        task, self._running = self._running, None
        if task is None:
            return False
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return task.cancelled()

    async def _refuse(self, exc: Exception) -> None:
        await self._send_error(exc, None)

    async def _send_error(self, exc: Exception, request_id: str | None) -> None:
        if request_id is not None and self._generation is not None:
            error = error_event(exc, self._generation.last_event_id)
        else:
            error = json.loads(to_api_error(exc).body())
        await self._send(json.dumps({"type": "error", "id": request_id, **error}, ensure_ascii=False))

    async def _send_done(self, status: str) -> None:
        await self._send(json.dumps({"type": "done", "id": self._request_id, "status": status}))

    async def _send(self, frame: str) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await self._socket.send_str(frame)
        except TimeoutError:
            await self._socket.close(code=WSCloseCode.POLICY_VIOLATION, message=b"the client stopped reading")
            raise ConnectionError("the client stopped reading") from None


def _named(chunk: str, event_id: str) -> str:
    """A chunk's object with the id that its event has in an event stream."""
    return f'{chunk[:-1]},"event_id":"{event_id}"}}'


def _resume_frame(body: Mapping[str, Any]) -> ResumeFrame:
    response_id, after = body.get("id"), body.get("starting_after")
    if not isinstance(response_id, str):
        raise InvalidRequest("id must name the stream to go on with.", "id")
    if after is not None and not isinstance(after, str):
        raise InvalidRequest("starting_after must be the id of an event of this stream.", "starting_after")
    return ResumeFrame(response_id, after or "")


class SocketSet:
    """All open sockets, to bound their number and to close them when the gateway drains."""

    def __init__(self, limit: int, limit_per_key: int, on_change: Callable[[int], Any]) -> None:
        self._limit = limit
        self._limit_per_key = limit_per_key
        self._on_change = on_change
        self._open: dict[web.WebSocketResponse, str] = {}

    @asynccontextmanager
    async def hold(self, request: web.Request, max_bytes: int, key_id: str) -> AsyncIterator[web.WebSocketResponse]:
        """Upgrade and keep count. Raises RateLimited or Overloaded when the key has, or all have, too many already."""
        if sum(holder == key_id for holder in self._open.values()) >= self._limit_per_key:
            raise RateLimited("Too many WebSockets of this key are open; use POST or close one.", retry_after=5)
        if len(self._open) >= self._limit:
            raise Overloaded("Too many WebSockets are open; use POST or try again later.", retry_after=5)
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=max_bytes, compress=False)
        self._open[socket] = key_id
        self._on_change(len(self._open))
        try:
            await socket.prepare(request)
            yield socket
        finally:
            self._open.pop(socket, None)
            self._on_change(len(self._open))

    async def close(self) -> None:
        """Tell every client that the gateway goes away."""
        for socket in list(self._open):
            await socket.close(code=WSCloseCode.GOING_AWAY, message=b"the gateway is draining")
