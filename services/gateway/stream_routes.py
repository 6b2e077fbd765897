"""Reading an answer on, at any gateway: replayed from the journal after a position, then live."""

from __future__ import annotations

from aiohttp import web

from services.gateway.bodies import json_response
from services.gateway.dispatch import Dispatcher
from services.gateway.errors import StreamNotFound
from services.gateway.gateway import Gateway
from services.gateway.generation_routes import ANSWER_ID_HEADER, client_of, layout_of
from services.gateway.middleware import ANSWER_HEADERS, KEY_ID
from services.gateway.resume import StoredAnswers, place_of
from services.gateway.sse import EventStream, opening_events, stream_answer

STREAM_ROUTE = "/v1/streams/{id}"

_DELETED = "request_cancelled"


class StreamRoutes:
    """GET goes on with a stream, DELETE cancels it."""

    def __init__(self, gateway: Gateway, dispatcher: Dispatcher, stored: StoredAnswers) -> None:
        self._gateway = gateway
        self._dispatcher = dispatcher
        self._stored = stored

    def table(self) -> list[web.RouteDef]:
        return [
            web.get(STREAM_ROUTE, self.resume, allow_head=False),
            web.delete(STREAM_ROUTE, self.cancel),
        ]

    async def resume(self, request: web.Request) -> web.StreamResponse:
        self._dispatcher.refuse_when_draining()
        client = client_of(request)
        found = await self._stored.locate(request.match_info["id"], client.key_id, place_of(request))
        async with self._dispatcher.resume(found.stored, client, found.shown, found.after) as running:
            request[ANSWER_HEADERS] = {ANSWER_ID_HEADER: found.stored.response_id}
            settings, layout = self._gateway.settings, layout_of(self._gateway, running)
            opening = [] if found.after else opening_events(layout, running.generation)
            stream = EventStream(request, settings.stall_timeout_s, opening)
            await stream.open()
            return await stream_answer(stream, running.generation, running.plan, layout, settings.ping_s)

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        stored = await self._stored.find(request.match_info["id"], request[KEY_ID])
        readers = [await self._gateway.streams.attach(request_id) for request_id in stored.request_ids]
        found = [reader for reader in readers if reader is not None]
        if not found:
            raise StreamNotFound("This stream is not known here any more.")
        for reader in found:
            await reader.cancel(_DELETED, force=True)
            reader.leave(_DELETED)
        return json_response({"id": stored.response_id, "object": "stream", "deleted": True})
