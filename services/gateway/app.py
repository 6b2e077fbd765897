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
import resource
import secrets
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import structlog
from aiohttp import web

from services.gateway.admission import Admission, AdmissionLimits, Share
from services.gateway.auth import KeyRing
from services.gateway.connections import raise_open_files
from services.gateway.errors import Draining
from services.gateway.health import ClusterView
from services.gateway.keyfile import KeyFile
from services.gateway.metrics import GatewayMetrics
from services.gateway.middleware import add_request_id, make_auth_middleware, make_error_middleware
from services.gateway.params import SamplingDefaults
from services.gateway.prepare import PlanLimits, Planner, ServedModel
from services.gateway.routes import Gateway, Routes
from services.gateway.server import MAX_HEADER_BYTES, MAX_HEADERS, listen
from services.gateway.text import TextService
from services.gateway.websocket import SocketSet
from shared.bus.connection import check, connect, connect_blocking
from shared.bus.draining import DrainOrders
from shared.bus.events import EventFeed
from shared.bus.registry import Registry
from shared.bus.requests import RequestStore
from shared.bus.stored import ResponseStore
from shared.bus.stream import Patience, RequestStreams
from shared.config import GatewaySettings, Settings
from shared.errors import ConfigurationError
from shared.model.source import ModelSource, resolve
from shared.protocol.keys import Keys
from shared.tasks import end_tasks
from shared.tokenizer.codec import TextCodec
from shared.tokenizer.loader import load_tokenizer

SWITCH_INTERVAL_S = 0.0005
"""After this long a text thread hands the interpreter back to the event loop; Python's default is ten times that."""

_MAX_TEMPLATE_BYTES = 1 << 20
_FAREWELL_S = 2.0
"""How long the clients of requests that a drain let go may take to be told."""

BUS_COUNTERS = {
    "journal_replays_total": "Journals read to fill a gap or after silence.",
    "resubmits_total": "Requests submitted again because Redis forgot them.",
    "repairs_total": "Requests whose journal had to be set back to what the client has.",
    "resubscribes_total": "Times the token channel was subscribed again.",
}

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the gateway needs of a model: its text side and its limits."""

    name: str
    codec: TextCodec
    vocab_size: int
    max_model_len: int
    defaults: SamplingDefaults


@dataclass(frozen=True, slots=True)
class Bus:
    """The gateway's end of the bus."""

    keys: Keys
    gateway_id: str
    streams: RequestStreams
    responses: ResponseStore


def load_model(settings: Settings) -> LoadedModel:
    """Read tokenizer, template and defaults; no weights. Raises ConfigurationError."""
    source = resolve(settings.model)
    codec = load_tokenizer(source, chat_template=_read_template(settings.chat_template))
    longest = source.config.max_position
    return LoadedModel(
        name=settings.served_model_name or source.name,
        codec=codec,
        vocab_size=source.config.vocab_size,
        max_model_len=min(settings.engine.max_model_len or longest, longest),
        defaults=_defaults(source) if settings.gateway.generation_defaults else SamplingDefaults(),
    )


async def run_gateway(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain. Raises ConfigurationError and BusUnavailable at start."""
    raise_open_files()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    model = await asyncio.to_thread(load_model, settings)
    async with serve(settings, model, stop) as (gateway, url):
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
        cluster = ClusterView(
            registry, gateway_id, model.name, settings.redis.heartbeat_s, settings.redis.heartbeat_ttl_s
        )
        await cluster.refresh()
        stack.push_async_callback(cluster.leave)
        await stack.enter_async_context(_background(cluster.run(), "cluster-view"))
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
    metrics.watch_counters(BUS_COUNTERS, lambda: _bus_counts(bus.streams))
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


def log_limits(settings: Settings, admission_limit: int, num_keys: int) -> None:
    """One line with every limit in force, so that what a client runs into can be looked up in the log."""
    edge = settings.gateway
    limits = {
        name: value for name, value in edge.model_dump().items() if name.startswith("max_") or name.endswith("_s")
    }
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    _log.info(
        "gateway_limits",
        **limits,
        admission_limit=admission_limit,
        num_keys=num_keys,
        open_files=open_files,
        header_bytes=MAX_HEADER_BYTES,
        header_lines=MAX_HEADERS,
        drain_timeout_s=settings.drain_timeout_s,
    )


async def drain(gateway: Gateway, timeout_s: float) -> None:
    """Refuse new requests and wait for the running ones, at most `timeout_s`; then let go of the rest.

    What was let go runs on: its clients are told to resume at another gateway, which has the orphan grace to adopt it.
    """
    gateway.cluster.draining = True
    _log.info("gateway_draining", in_flight=gateway.admission.in_flight, queued=gateway.admission.queued)
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await gateway.admission.wait_idle()
    gateway.admission.refuse_waiting(Draining("This gateway is shutting down; send the request to another.", 2))
    num_let_go = gateway.streams.let_go()
    if num_let_go:
        _log.warning("requests_let_go", count=num_let_go)
    with suppress(TimeoutError):
        async with asyncio.timeout(_FAREWELL_S):
            await gateway.admission.wait_idle()
    await gateway.sockets.close()


def version() -> str:
    """Version of the installed distribution; a checkout that was never installed has none."""
    try:
        return importlib.metadata.version("slipstream")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


@asynccontextmanager
async def _background(loop: Coroutine[None, None, None], name: str) -> AsyncIterator[None]:
    task = asyncio.create_task(loop, name=name)
    try:
        yield
    finally:
        await end_tasks([task])


def _read_template(setting: str) -> str | None:
    """The operator's template: a file's content, or the setting itself when it is a template's text."""
    if not setting or "{%" in setting or "{{" in setting:
        return setting or None
    try:
        with open(setting, encoding="utf-8") as file:
            return file.read(_MAX_TEMPLATE_BYTES)
    except (OSError, UnicodeError) as exc:
        raise ConfigurationError(f"SLIPSTREAM_CHAT_TEMPLATE {setting!r} cannot be read: {exc}") from None


def _defaults(source: ModelSource) -> SamplingDefaults:
    given = source.generation
    return SamplingDefaults(given.temperature, given.top_p, given.top_k, given.min_p, given.repetition_penalty)


def _bus_counts(streams: RequestStreams) -> dict[str, int]:
    counters = streams.counters
    return {
        "journal_replays_total": counters.replays,
        "resubmits_total": counters.resubmits,
        "repairs_total": counters.repairs,
        "resubscribes_total": counters.resubscribes,
    }
