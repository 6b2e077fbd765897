"""All routes of a gateway, and the handlers of those that operators and probes use."""

from __future__ import annotations

from aiohttp import web

from services.gateway.bodies import BodyReader, json_response
from services.gateway.dispatch import Dispatcher
from services.gateway.gateway import Gateway
from services.gateway.generation_routes import GenerationRoutes
from services.gateway.model_routes import ModelRoutes
from services.gateway.resume import StoredAnswers
from services.gateway.stream_routes import StreamRoutes
from shared.observability.metrics import CONTENT_TYPE

__all__ = ["Gateway", "Routes"]


class Routes:
    """Handlers for liveness, readiness, metrics and version; `table` has all routes of the application."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def table(self) -> list[web.RouteDef]:
        dispatcher, stored = Dispatcher(self._gateway), StoredAnswers(self._gateway)
        bodies = BodyReader(self._gateway)
        return [
            *GenerationRoutes(self._gateway, dispatcher, stored, bodies).table(),
            *StreamRoutes(self._gateway, dispatcher, stored).table(),
            *ModelRoutes(self._gateway, bodies).table(),
            web.get("/live", self.live),
            web.get("/health", self.health),
            web.get("/metrics", self.metrics),
            web.get("/version", self.version),
        ]

    async def live(self, _request: web.Request) -> web.Response:
        return json_response({"status": "ok"})

    async def health(self, _request: web.Request) -> web.Response:
        report = self._gateway.cluster.report()
        return json_response(report, status=503 if report["reasons"] else 200)

    async def metrics(self, _request: web.Request) -> web.Response:
        gateway = self._gateway
        gateway.metrics.queued.set(gateway.admission.queued)
        return web.Response(body=gateway.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def version(self, _request: web.Request) -> web.Response:
        return json_response({"version": self._gateway.version})
