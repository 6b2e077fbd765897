"""The routes: read a body, plan it, hold a slot, generate, answer as a whole, an event stream or frames."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import structlog
from aiohttp import web

from services.gateway.admission import Admission
from services.gateway.errors import Draining, MethodNotAllowed, RequestTimeout, UnsupportedEncoding
from services.gateway.generation import Generation, JobOpener
from services.gateway.health import ClusterView
from services.gateway.metrics import OUTCOME_REJECTED, GatewayMetrics
from services.gateway.middleware import KEY_ID
from services.gateway.prepare import Plan, Planner
from services.gateway.responses import Answer, ResponseFormat, dumps, make_format
from services.gateway.schemas import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parse_json,
    unknown_fields,
    validate,
)
from services.gateway.sse import EventStream, stream_answer
from services.gateway.text import TextService
from services.gateway.websocket import ChatSocket, SocketSet, check_origin
from shared.config import GatewaySettings
from shared.errors import CapacityError, InvalidRequest, ModelNotFound, RequestError, RequestTooLarge
from shared.observability.metrics import CONTENT_TYPE
from shared.protocol.messages import OUTCOME_CANCELLED, OUTCOME_ERROR, OUTCOME_FINISHED

CHAT_ROUTE = "/v1/chat/completions"
COMPLETION_ROUTE = "/v1/completions"

_INLINE_PARSE_BYTES = 64 * 1024

BodyT = TypeVar("BodyT", bound=Body)

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts the routes work with; each owns its own state."""

    settings: GatewaySettings
    version: str
    planner: Planner
    text: TextService
    opener: JobOpener
    cluster: ClusterView
    admission: Admission
    sockets: SocketSet
    metrics: GatewayMetrics


class Routes:
    """Handlers of all routes."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def table(self) -> list[web.RouteDef]:
        return [
            web.post(CHAT_ROUTE, self.chat),
            web.get(CHAT_ROUTE, self.chat_socket, allow_head=False),
            web.post(COMPLETION_ROUTE, self.completion),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{id:.+}", self.model),
            web.post("/tokenize", self.tokenize),
            web.post("/detokenize", self.detokenize),
            web.get("/live", self.live),
            web.get("/health", self.health),
            web.get("/metrics", self.metrics),
            web.get("/version", self.version),
        ]

    async def chat(self, request: web.Request) -> web.StreamResponse:
        async with self._accounted(CHAT_ROUTE):
            return await self._respond(request, await self._body(request, ChatBody))

    async def completion(self, request: web.Request) -> web.StreamResponse:
        async with self._accounted(COMPLETION_ROUTE):
            return await self._respond(request, await self._body(request, CompletionBody))

    async def chat_socket(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise MethodNotAllowed("GET is not allowed here; use POST, or upgrade to a WebSocket.", frozenset({"POST"}))
        check_origin(request)
        self._refuse_when_draining()
        settings = self._gateway.settings
        key_id = request[KEY_ID]

        async def run(body: ChatBody, out: ChatSocket) -> None:
            async with self._accounted(CHAT_ROUTE), self._generate(body, key_id) as (plan, generation):
                await out.stream(generation, plan, self._format(plan))

        async with self._gateway.sockets.hold(request, settings.max_body_bytes) as socket:
            await ChatSocket(socket, run, settings.stall_timeout_s).serve()
        return socket

    async def models(self, _request: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._model_object()]})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        if name != self._gateway.planner.model.name:
            raise ModelNotFound(f"The model {name[:100]!r} does not exist here.", "model")
        return _json(self._model_object())

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await self._body(request, TokenizeBody)
        text, planner = self._gateway.text, self._gateway.planner
        planner.check_model(body)
        if body.messages is not None:
            planner.check_messages(len(body.messages))
            ids = await text.encode_chat(body, body.messages)
        else:
            ids = await text.encode_prompt(body.prompt or "", body.add_special_tokens is not False)
        strings = [text.codec.token_text(token) for token in ids] if body.return_token_strs else None
        answer = {"count": len(ids), "max_model_len": planner.model.max_model_len, "tokens": list(ids)}
        return _json({**answer, "token_strs": strings})

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await self._body(request, DetokenizeBody)
        text, planner = self._gateway.text, self._gateway.planner
        planner.check_model(body)
        if len(body.tokens) > planner.model.max_model_len:
            raise InvalidRequest(f"tokens may hold at most {planner.model.max_model_len} ids.", "tokens")
        text.check_vocabulary(body.tokens, "tokens")
        return _json({"prompt": await text.decode(body.tokens, skip_special=False)})

    async def live(self, _request: web.Request) -> web.Response:
        return _json({"status": "ok"})

    async def health(self, _request: web.Request) -> web.Response:
        report = self._gateway.cluster.report()
        return _json(report, status=503 if report["reasons"] else 200)

    async def metrics(self, _request: web.Request) -> web.Response:
        gateway = self._gateway
        gateway.metrics.queued.set(gateway.admission.queued)
        return web.Response(body=gateway.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def version(self, _request: web.Request) -> web.Response:
        return _json({"version": self._gateway.version})

    def _model_object(self) -> dict[str, object]:
        model = self._gateway.planner.model
        return {
            **{"id": model.name, "object": "model", "created": model.created, "owned_by": "slipstream"},
            **{"root": model.name, "parent": None, "max_model_len": model.max_model_len},
        }

    async def _body(self, request: web.Request, kind: type[BodyT]) -> BodyT:
        """Read, decode and check a body; large ones off the event loop. Raises RequestError."""
        raw = await self._read(request)
        if len(raw) <= _INLINE_PARSE_BYTES:
            return self._parse(raw, kind)
        return await self._gateway.text.run(self._parse, raw, kind)

    def _parse(self, raw: bytes, kind: type[BodyT]) -> BodyT:
        decoded = parse_json(raw)
        body = validate(kind, decoded)
        unknown = unknown_fields(kind, decoded)
        if unknown:
            self._gateway.metrics.unknown_fields.inc(unknown)
        return body

    async def _read(self, request: web.Request) -> bytes:
        settings = self._gateway.settings
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise UnsupportedEncoding("Compressed bodies are not supported; send the body as it is.")
        if (request.content_length or 0) > settings.max_body_bytes:
            raise RequestTooLarge(f"The request body is over the limit of {settings.max_body_bytes} bytes.")
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                return await request.read()
        except TimeoutError:
            raise RequestTimeout("The request body did not arrive in time.") from None
        except web.RequestPayloadError:
            raise InvalidRequest("The request body is malformed.", None, "invalid_body") from None

    async def _respond(self, request: web.Request, body: ChatBody | CompletionBody) -> web.StreamResponse:
        self._refuse_when_draining()
        settings = self._gateway.settings
        async with self._generate(body, request[KEY_ID]) as (plan, generation):
            layout = self._format(plan)
            if body.stream:
                stream = EventStream(request, settings.stall_timeout_s)
                return await stream_answer(stream, generation, plan, layout, settings.ping_s)
            answers = [Answer() for _ in range(len(plan.jobs) * body.n)]
            while (deltas := await generation.next(settings.ping_s)) is not None:
                for delta in deltas:
                    answers[delta.index].add(delta)
            scores = [generation.prompt_scores(position) for position in range(len(plan.jobs))]
            return _json(layout.whole(answers, scores, generation.usage()))

    @asynccontextmanager
    async def _generate(self, body: ChatBody | CompletionBody, key_id: str) -> AsyncIterator[tuple[Plan, Generation]]:
        """Plan, take slots, submit; leaving cancels what still runs."""
        gateway = self._gateway
        plan = await gateway.planner.plan(body, key_id)
        rules = gateway.text.rules(body)
        async with (
            gateway.admission.slot(key_id, len(plan.jobs)),
            Generation(plan.jobs, gateway.opener, rules, gateway.metrics) as generation,
        ):
            ids = [job.request_id for job in plan.jobs]
            _log.debug("request_submitted", response_id=plan.response_id, jobs=ids, key_id=key_id)
            yield plan, generation

    def _format(self, plan: Plan) -> ResponseFormat:
        return make_format(plan, self._gateway.planner.model.name, self._gateway.text.codec)

    def _refuse_when_draining(self) -> None:
        if self._gateway.cluster.draining:
            raise Draining("This gateway is shutting down; send the request to another or try again.", retry_after=2)

    @asynccontextmanager
    async def _accounted(self, route: str) -> AsyncIterator[None]:
        """Count a generation request once as received and once by its outcome."""
        metrics = self._gateway.metrics
        metrics.received.inc()
        metrics.in_flight.inc()
        started = time.monotonic()
        outcome = OUTCOME_FINISHED
        try:
            yield
            metrics.e2e.observe(time.monotonic() - started)
        except (asyncio.CancelledError, ConnectionError):
            outcome = OUTCOME_CANCELLED
            raise
        except (RequestError, CapacityError) as exc:
            outcome = OUTCOME_REJECTED
            metrics.rejections.labels(exc.code).inc()
            raise
        except BaseException:
            outcome = OUTCOME_ERROR
            raise
        finally:
            metrics.in_flight.dec()
            metrics.outcomes.labels(route, outcome).inc()


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=dumps(body).encode(), content_type="application/json")
