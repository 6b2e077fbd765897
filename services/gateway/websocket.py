"""Chat completions over a WebSocket: the same URL as for POST, upgraded.

    client → server   a request body of POST /v1/chat/completions; `stream` is implied
                      {"type": "cancel"} stops the one that runs
    server → client   the chunks of the stream, one a frame
                      {"type": "done", "id": …, "status": "finished" | "cancelled"} ends a request
                      {"type": "error", "id": …, "error": {…}} ends a request that failed; with
                      "id": null it refuses a frame, and a request that runs goes on

One request runs at a time; the socket stays open for the next. A frame over the size limit closes
it with 1009, the gateway's drain with 1001.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import structlog
from aiohttp import WSCloseCode, WSMsgType, web

from services.gateway.errors import OriginRefused, to_api_error
from services.gateway.generation import Generation
from services.gateway.prepare import Plan
from services.gateway.responses import ResponseFormat
from services.gateway.schemas import ChatBody, parse_json, validate
from shared.errors import InvalidRequest, Overloaded, SlipstreamError

HEARTBEAT_S = 20.0

_log = structlog.get_logger()

RunChat = Callable[[ChatBody, "ChatSocket"], Awaitable[None]]


def check_origin(request: web.Request) -> None:
    """Browsers name the page that connects; only pages of this very server may. Raises OriginRefused."""
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != request.host:
        raise OriginRefused("WebSockets are open to pages of this server only.")


class ChatSocket:
    """One open socket: reads frames, runs one request at a time, writes its chunks."""

    def __init__(self, socket: web.WebSocketResponse, run: RunChat, stall_timeout_s: float) -> None:
        self._socket = socket
        self._run = run
        self._stall_timeout_s = stall_timeout_s
        self._running: asyncio.Task[None] | None = None
        self._request_id: str | None = None

    async def serve(self) -> None:
        """Until the client closes; whatever runs then is cancelled."""
        try:
            async for message in self._socket:
                if message.type is WSMsgType.TEXT:
                    await self._take(message.data)
                elif message.type is WSMsgType.BINARY:
                    await self._refuse(InvalidRequest("Send text frames; a binary frame is not understood."))
        finally:
            await self._stop()

    async def stream(self, generation: Generation, plan: Plan, layout: ResponseFormat) -> None:
        """Write a generation's chunks, one a frame, and the end."""
        self._request_id = plan.response_id
        for chunk in layout.opening():
            await self._send(chunk)
        while (deltas := await generation.next(HEARTBEAT_S)) is not None:
            usage = generation.usage() if plan.body.continuous_usage else None
            for delta in deltas:
                await self._send(layout.chunk(delta, usage))
        if plan.body.include_usage:
            await self._send(layout.usage_chunk(generation.usage()))
        await self._send_done("finished")

    async def _take(self, frame: str) -> None:
        try:
            body = parse_json(frame.encode("utf-8", "surrogatepass"))
            if body.get("type") == "cancel":
                await self._cancel()
                return
            if self._running is not None and not self._running.done():
                raise InvalidRequest("A request is running on this socket; cancel it first.", None, "request_running")
            chat = validate(ChatBody, {**body, "stream": True})
        except SlipstreamError as exc:
            await self._refuse(exc)
            return
        self._request_id = None
        self._running = asyncio.create_task(self._answer(chat))

    async def _answer(self, chat: ChatBody) -> None:
        try:
            try:
                await self._run(chat, self)
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


class SocketSet:
    """All open sockets, to bound their number and to close them when the gateway drains."""

    def __init__(self, limit: int, on_change: Callable[[int], Any]) -> None:
        self._limit = limit
        self._on_change = on_change
        self._open: set[web.WebSocketResponse] = set()

    @asynccontextmanager
    async def hold(self, request: web.Request, max_bytes: int) -> AsyncIterator[web.WebSocketResponse]:
        """Upgrade and keep count. Raises Overloaded when there are too many sockets already."""
        if len(self._open) >= self._limit:
            raise Overloaded("Too many WebSockets are open; use POST or try again later.", retry_after=5)
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=max_bytes, compress=False)
        self._open.add(socket)
        self._on_change(len(self._open))
        try:
            await socket.prepare(request)
            yield socket
        finally:
            self._open.discard(socket)
            self._on_change(len(self._open))

    async def close(self) -> None:
        """Tell every client that the gateway goes away."""
        for socket in list(self._open):
            await socket.close(code=WSCloseCode.GOING_AWAY, message=b"the gateway is draining")
