"""Putting the gateway together: parts, application, the process's life.

The life of a gateway:
1. Read the model's tokenizer (no weights, no torch), connect to Redis, look at the cluster once.
2. Subscribe to this gateway's token channel, then listen.
3. Serve until told to stop. Drain: /health answers 503, new requests get 503, running ones finish.
4. Close sockets, cancel what is left over after the drain timeout, take the heartbeat off.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import secrets
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog
from aiohttp import web

from services.gateway.admission import Admission, AdmissionLimits, Share
from services.gateway.auth import KeyRing
from services.gateway.connections import raise_open_files
from services.gateway.drain import drain
from services.gateway.health import ClusterView
from services.gateway.keyfile import KeyFile
from services.gateway.limits import log_limits
from services.gateway.metrics import GatewayMetrics
from services.gateway.middleware import add_request_id, make_auth_middleware, make_error_middleware
from services.gateway.model import LoadedModel, load_model
from services.gateway.prepare import PlanLimits, Planner, ServedModel
from services.gateway.routes import Gateway, Routes
from services.gateway.server import listen
from services.gateway.text import TextService
from services.gateway.websocket import SocketSet
from shared.bus.connection import check, connect, connect_blocking
from shared.bus.draining import DrainOrders
from shared.bus.events import EventFeed
from shared.bus.registry import Registry
from shared.bus.requests import RequestStore
from shared.bus.stored import ResponseStore
from shared.bus.stream import Patience, RequestStreams
from shared.config import GatewaySettings, RedisSettings, Settings
from shared.garbage import collect_garbage_rarely
from shared.protocol.keys import Keys
from shared.tasks import end_tasks

SWITCH_INTERVAL_S = 0.0005
"""After this long a text thread hands the interpreter back to the event loop; Python's default is ten times that."""

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Bus:
    """The gateway's end of the bus."""

    keys: Keys
    gateway_id: str
    streams: RequestStreams
    responses: ResponseStore


async def run_gateway(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain. Raises ConfigurationError and BusUnavailable at start."""
    raise_open_files()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    model = await asyncio.to_thread(load_model, settings)
    async with serve(settings, model, stop) as (gateway, url):
        collect_garbage_rarely()
        _log.info("gateway_ready", url=url, model=model.name)
        if not settings.asks_for_keys:
            _log.warning(
                "gateway_open_to_all", hint="set SLIPSTREAM_API_KEYS or SLIPSTREAM_API_KEYS_FILE to ask for a key"
            )
        await stop.wait()
        await drain(gateway, settings.drain_timeout_s)
    _log.info("gateway_stopped")


@asynccontextmanager
async def serve(
    settings: Settings, model: LoadedModel, stop: asyncio.Event | None = None
) -> AsyncIterator[tuple[Gateway, str]]:
    """A listening gateway and its URL. `stop` is set when somebody orders this gateway to drain."""
    keys = Keys(settings.deployment)
    gateway_id = f"gw-{secrets.token_hex(6)}"
    async with AsyncExitStack() as stack:
        commands = await stack.enter_async_context(connect(settings.redis.url, settings.redis.command_timeout_s))
        reader = await stack.enter_async_context(connect_blocking(settings.redis.url))
        _log.info("bus_connected", server=await check(commands), gateway_id=gateway_id)
        registry = Registry(commands, keys, int(settings.redis.heartbeat_ttl_s * 1000))
        cluster = await stack.enter_async_context(_watching(registry, settings.redis, gateway_id, model.name))
        orders = DrainOrders(commands, keys).follow(gateway_id, stop or asyncio.Event(), settings.redis.heartbeat_s)
        await stack.enter_async_context(_background(orders, "drain-orders"))
        feed = EventFeed(reader, keys, gateway_id)
        edge = settings.gateway
        store = RequestStore(commands, keys, done_ttl_ms=int(edge.resume_ttl_s * 1000))
        patience = Patience(resume_grace_s=edge.resume_grace_s)
        streams = await stack.enter_async_context(RequestStreams(store, feed, gateway_id, patience))
        ring = KeyRing(settings.key_values, KeyFile(settings.api_keys_file) if settings.api_keys_file else None)
        cluster.on_refresh(ring.reload)
        gateway = make_gateway(
            settings, model, cluster, Bus(keys, gateway_id, streams, ResponseStore(commands, keys)), ring
        )
        stack.callback(gateway.text.close)
        url = await stack.enter_async_context(
            listen(build_app(gateway, ring), settings.gateway, gateway.metrics.connections.set_function)
        )
        log_limits(settings, gateway.admission.limit, len(ring))
        yield gateway, url


def make_gateway(
    settings: Settings,
    model: LoadedModel,
    cluster: ClusterView,
    bus: Bus,
    ring: KeyRing,
) -> Gateway:
    """The parts behind the routes, wired."""
    edge = settings.gateway
    metrics = GatewayMetrics(model.name)
    metrics.watch_workers(lambda: cluster.beats)
    metrics.watch_streams(bus.streams.counters)
    text = TextService(model.codec, model.vocab_size, model.max_model_len, edge.text_threads, edge.text_timeout_s)
    served = ServedModel(model.name, model.max_model_len, model.defaults, int(time.time()))
    admission = make_admission(edge, metrics, ring)
    cluster.on_refresh(lambda: follow_workers(admission, cluster, metrics))
    follow_workers(admission, cluster, metrics)
    limits = PlanLimits(edge.max_prompts, edge.max_messages, int(edge.request_timeout_s * 1000))
    return Gateway(
        settings=edge,
        version=version(),
        planner=Planner(served, text, cluster, bus.keys, bus.gateway_id, limits),
        text=text,
        streams=bus.streams,
        responses=bus.responses,
        cluster=cluster,
        admission=admission,
        sockets=SocketSet(edge.max_websockets, edge.max_websockets_per_key, metrics.websockets.set),
        metrics=metrics,
    )


def make_admission(edge: GatewaySettings, metrics: GatewayMetrics, ring: KeyRing) -> Admission:
    """Admission within the settings' bounds; each key has the share its line in the keys file gives it."""

    def share_of(key_id: str) -> Share:
        key = ring.key(key_id)
        return Share() if key is None else Share(key.weight, key.max_in_flight)

    limits = AdmissionLimits(
        edge.max_in_flight,
        edge.max_in_flight_per_key,
        edge.max_queued,
        edge.max_queued_per_key,
        edge.request_timeout_s,
    )
    return Admission(limits, share_of, metrics.admission_wait.observe)


def follow_workers(admission: Admission, cluster: ClusterView, metrics: GatewayMetrics) -> None:
    """Let in what the decode workers can run; while none is ready, whatever was right for the last ones."""
    if cluster.ready("decode"):
        admission.resize(cluster.room())
    metrics.admission_limit.set(admission.limit)


def build_app(gateway: Gateway, keys: KeyRing) -> web.Application:
    """The aiohttp application: errors outermost, then the key check, then the routes."""
    app = web.Application(
        client_max_size=gateway.settings.max_body_bytes,
        middlewares=[make_error_middleware(gateway.metrics), make_auth_middleware(keys)],
    )
    app.on_response_prepare.append(add_request_id)
    app.add_routes(Routes(gateway).table())
    return app


def version() -> str:
    """Version of the installed distribution; a checkout that was never installed has none."""
    try:
        return importlib.metadata.version("slipstream")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


@asynccontextmanager
async def _watching(
    registry: Registry, redis: RedisSettings, gateway_id: str, model: str
) -> AsyncIterator[ClusterView]:
    """A view of the cluster that follows it and keeps this gateway on the list. Raises redis errors at start."""
    cluster = ClusterView(registry, gateway_id, model, redis.heartbeat_s, redis.heartbeat_ttl_s)
    await cluster.refresh()
    try:
        async with _background(cluster.run(), "cluster-view"):
            yield cluster
    finally:
        await cluster.leave()


@asynccontextmanager
async def _background(loop: Coroutine[None, None, None], name: str) -> AsyncIterator[None]:
    task = asyncio.create_task(loop, name=name)
    try:
        yield
    finally:
        await end_tasks([task])
