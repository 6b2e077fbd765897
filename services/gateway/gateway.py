"""The parts a gateway is made of, wired in `app.py` and handed to the routes."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.admission import Admission
from services.gateway.generation import Streams
from services.gateway.health import ClusterView
from services.gateway.metrics import GatewayMetrics
from services.gateway.prepare import Planner
from services.gateway.text import TextService
from services.gateway.websocket import SocketSet
from shared.bus.stored import ResponseStore
from shared.config import GatewaySettings


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts the routes work with; each owns its own state."""

    settings: GatewaySettings
    version: str
    planner: Planner
    text: TextService
    streams: Streams
    responses: ResponseStore
    cluster: ClusterView
    admission: Admission
    sockets: SocketSet
    metrics: GatewayMetrics
