"""JSON bodies in and out; requests' are bounded in bytes and time, and large ones are decoded off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from aiohttp import web

from services.gateway.errors import RequestTimeout, UnsupportedEncoding
from services.gateway.gateway import Gateway
from services.gateway.responses import dumps
from services.gateway.schemas import Body, parse_json, unknown_fields, validate
from shared.errors import InvalidRequest, Overloaded, RequestTooLarge

BodyT = TypeVar("BodyT", bound=Body)


def json_response(body: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=dumps(body).encode(), content_type="application/json")


class BodyReader:
    """Turns requests into validated bodies, and owns the count of bytes that those under way hold together."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._held = 0

    async def read(self, request: web.Request, kind: type[BodyT]) -> BodyT:
        """The body of a request. Raises RequestError, and Overloaded when bodies hold all the memory meant for them."""
        raw = bytearray()
        try:
            await self._fill(raw, request)
            return await self._gateway.text.parse(bytes(raw), lambda body: self._parse(body, kind))
        finally:
            self._held -= len(raw)

    @contextmanager
    def held(self, num_bytes: int) -> Iterator[None]:
        """Count a body that came by another way than `read`, for as long as it is read. Raises Overloaded."""
        self._hold(num_bytes)
        try:
            yield
        finally:
            self._held -= num_bytes

    def _parse(self, raw: bytes, kind: type[BodyT]) -> BodyT:
        decoded = parse_json(raw)
        body = validate(kind, decoded)
        unknown = unknown_fields(kind, decoded)
        if unknown:
            self._gateway.metrics.unknown_fields.inc(unknown)
        return body

    async def _fill(self, raw: bytearray, request: web.Request) -> None:
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise UnsupportedEncoding("Compressed bodies are not supported; send the body as it is.")
        self._check_size(request.content_length or 0)
        try:
            async with asyncio.timeout(self._gateway.settings.body_timeout_s):
                async for chunk in request.content.iter_any():
                    self._check_size(len(raw) + len(chunk))
                    self._hold(len(chunk))
                    raw += chunk
        except TimeoutError:
            raise RequestTimeout("The request body did not arrive in time.") from None
        except web.RequestPayloadError:
            raise InvalidRequest("The request body is malformed.", None, "invalid_body") from None

    def _check_size(self, num_bytes: int) -> None:
        limit = self._gateway.settings.max_body_bytes
        if num_bytes > limit:
            raise RequestTooLarge(f"The request body is over the limit of {limit} bytes.")

    def _hold(self, num_bytes: int) -> None:
        if self._held + num_bytes > self._gateway.settings.max_bodies_bytes:
            raise Overloaded("Too many large requests are being read; try again in a moment.", retry_after=2)
        self._held += num_bytes
