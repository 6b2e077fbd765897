"""The two completion routes: an answer as a whole, as server-sent events, or over a WebSocket."""

from __future__ import annotations

from aiohttp import web

from services.gateway.accounting import accounted
from services.gateway.bodies import BodyReader, json_response
from services.gateway.deadline import Deadline
from services.gateway.dispatch import Asked, Client, Dispatcher, Running
from services.gateway.errors import MethodNotAllowed
from services.gateway.gateway import Gateway
from services.gateway.idempotency import REPLAYED_HEADER, ticket_of
from services.gateway.middleware import ANSWER_HEADERS, KEY_ID, request_id_of
from services.gateway.responses import Answer, ResponseFormat, make_format
from services.gateway.resume import STARTING_AFTER, Place, StoredAnswers
from services.gateway.schemas import ChatBody, CompletionBody
from services.gateway.sse import EventStream, opening_events, stream_answer
from services.gateway.websocket import ChatSocket, ResumeFrame, check_origin

CHAT_ROUTE = "/v1/chat/completions"
COMPLETION_ROUTE = "/v1/completions"
ANSWER_ID_HEADER = "x-slipstream-id"
INLINE_SCORES = 256
"""An answer with log-probabilities of more tokens than this is put together in a text thread."""


def client_of(request: web.Request) -> Client:
    return Client(request[KEY_ID], request_id_of(request))


def layout_of(gateway: Gateway, running: Running) -> ResponseFormat:
    return make_format(running.plan, gateway.planner.model.name, gateway.text.codec)


class GenerationRoutes:
    """POST of both completions, and the WebSocket."""

    def __init__(self, gateway: Gateway, dispatcher: Dispatcher, stored: StoredAnswers, bodies: BodyReader) -> None:
        self._gateway = gateway
        self._dispatcher = dispatcher
        self._stored = stored
        self._bodies = bodies

    def table(self) -> list[web.RouteDef]:
        return [
            web.post(CHAT_ROUTE, self.chat),
            web.get(CHAT_ROUTE, self.chat_socket, allow_head=False),
            web.post(COMPLETION_ROUTE, self.completion),
        ]

    async def chat(self, request: web.Request) -> web.StreamResponse:
        async with accounted(self._gateway.metrics, CHAT_ROUTE) as arrived:
            return await self._respond(request, await self._bodies.read(request, ChatBody), arrived)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        async with accounted(self._gateway.metrics, COMPLETION_ROUTE) as arrived:
            return await self._respond(request, await self._bodies.read(request, CompletionBody), arrived)

    async def chat_socket(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise MethodNotAllowed("GET is not allowed here; use POST, or upgrade to a WebSocket.", frozenset({"POST"}))
        check_origin(request)
        self._dispatcher.refuse_when_draining()
        settings, client = self._gateway.settings, client_of(request)

        async def run(frame: ChatBody | ResumeFrame, out: ChatSocket) -> None:
            await (
                self._resume(frame, client, out) if isinstance(frame, ResumeFrame) else self._run(frame, client, out)
            )

        async with self._gateway.sockets.hold(request, settings.max_body_bytes, client.key_id) as socket:
            await ChatSocket(socket, self._gateway.text, self._bodies.held, run, settings.stall_timeout_s).serve()
        return socket

    async def _run(self, body: ChatBody, client: Client, out: ChatSocket) -> None:
        async with accounted(self._gateway.metrics, CHAT_ROUTE) as arrived:
            asked = Asked(body, client, Deadline(arrived, body.timeout))
            async with self._dispatcher.answer(asked) as running:
                await out.stream(running.generation, running.plan, layout_of(self._gateway, running))

    async def _resume(self, frame: ResumeFrame, client: Client, out: ChatSocket) -> None:
        found = await self._stored.locate(frame.response_id, client.key_id, Place(frame.starting_after, STARTING_AFTER))
        async with self._dispatcher.resume(found.stored, client, found.shown, found.after) as running:
            await out.stream(running.generation, running.plan, layout_of(self._gateway, running))

    async def _respond(
        self, request: web.Request, body: ChatBody | CompletionBody, arrived: float
    ) -> web.StreamResponse:
        client = client_of(request)
        ticket = ticket_of(request.headers, client.key_id, body)
        async with self._dispatcher.answer(Asked(body, client, Deadline(arrived, body.timeout), ticket)) as running:
            request[ANSWER_HEADERS] = _headers(running)
            layout = layout_of(self._gateway, running)
            if not body.stream:
                return await self._whole(running, layout)
            settings = self._gateway.settings
            stream = EventStream(request, settings.stall_timeout_s, opening_events(layout, running.generation))
            return await stream_answer(stream, running.generation, running.plan, layout, settings.ping_s)

    async def _whole(self, running: Running, layout: ResponseFormat) -> web.Response:
        generation, plan = running.generation, running.plan
        answers = [Answer() for _ in range(len(plan.jobs) * plan.shown.n)]
        while (deltas := await generation.next(self._gateway.settings.ping_s)) is not None:
            for delta in deltas:
                answers[delta.index].add(delta)
        scores = [generation.prompt_scores(position) for position in range(len(plan.jobs))]

        def build() -> web.Response:
            return json_response(layout.whole(answers, scores, generation.usage()))

        num_scores = sum(map(len, scores)) + sum(len(answer.scores) for answer in answers)
        return build() if num_scores <= INLINE_SCORES else await self._gateway.text.run(build)


def _headers(running: Running) -> dict[str, str]:
    replayed = {REPLAYED_HEADER: "true"} if running.replayed else {}
    return {ANSWER_ID_HEADER: running.plan.response_id, **replayed}
