"""The HTTP listener: aiohttp with every limit set, and our error shape for what never reaches a route."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from services.gateway.connections import ConnectionSet, room_for_connections
from shared.config import GatewaySettings
from shared.errors import ConfigurationError

MAX_HEADER_BYTES = 8190
MAX_HEADERS = 128
SHUTDOWN_S = 1.0
BACKLOG = 512
SEND_BUFFER_BYTES = 256 * 1024
"""What a client that stops reading may hold of the kernel's memory; the kernel allows twice as much."""

_NO_ACCESS_LOG = logging.getLogger("slipstream.access")
_NO_ACCESS_LOG.disabled = True


@asynccontextmanager
async def listen(
    app: web.Application, settings: GatewaySettings, on_connections: Callable[[Callable[[], float]], None]
) -> AsyncIterator[str]:
    """Serve `app` while the context is open; yields the base URL. Raises ConfigurationError when the port is taken.

    `on_connections` is given the function that counts the open connections.
    A handler is cancelled when its client leaves, which is how a lost client's request ends.
    """
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    loop = asyncio.get_running_loop()

    members = ConnectionSet(room_for_connections(settings.max_connections))
    on_connections(lambda: len(members))

    def connection() -> asyncio.Protocol:
        assert runner.server is not None
        return members.accept(
            runner.server,
            settings.header_timeout_s,
            loop=loop,
            auto_decompress=False,
            keepalive_timeout=settings.keepalive_timeout_s,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            max_headers=MAX_HEADERS,
            access_log=_NO_ACCESS_LOG,
        )

    try:
        try:
            server = await loop.create_server(
                connection, settings.host, settings.port, backlog=BACKLOG, start_serving=False
            )
            for listener in server.sockets:  # connections inherit it
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            await server.start_serving()
        except OSError as exc:
            where = f"{settings.host}:{settings.port}"
            raise ConfigurationError(
                f"cannot listen on {where} ({exc.strerror or exc}); set SLIPSTREAM_GATEWAY__PORT to a free port"
            ) from None
        try:
            port = server.sockets[0].getsockname()[1]
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            yield f"http://{host}:{port}"
        finally:
            server.close()
    finally:
        await runner.cleanup()
