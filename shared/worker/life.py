"""The life of one worker process, the same for both roles: load, prove itself, serve, drain.

loading   heartbeats tell the progress while the model loads
probing   only self-test streams are read; `shared.worker.selftest` runs until it passes
ready     the model's work stream is read too
draining  nothing new is read; requests finish, or go back to the queue when the time is up
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from importlib.metadata import version

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.bus.connection import check, connect, connect_blocking
from shared.bus.registry import Registry
from shared.bus.requests import RequestStore
from shared.bus.sweeper import InFlight, Sweeper
from shared.bus.workqueue import WorkItem, WorkQueue
from shared.config import Settings
from shared.errors import EngineError
from shared.lifecycle import flatten
from shared.model.source import ModelSource, resolve
from shared.protocol.keys import ROLES, Keys
from shared.protocol.messages import WorkerBeat
from shared.tasks import end_tasks
from shared.worker.bridge import EngineBridge
from shared.worker.build import BuiltEngine, build_engine
from shared.worker.context import Service, WorkerContext
from shared.worker.selftest import SelfTest

log = structlog.get_logger()

READ_BLOCK_MS = 500
PRIVATE_TTL_MS = 30_000
_NO_ROOM_WAIT_S = 0.05
_REDIS_PAUSE_S = 0.5
_HUNG_ENGINE_S = 60.0

ServiceFactory = Callable[[WorkerContext], AbstractAsyncContextManager[Service]]


class Worker:
    """One worker of `role`; `run` returns after a drain and raises on a fault that ends the process."""

    def __init__(self, role: str, settings: Settings, make_service: ServiceFactory, *, prefill_share: float) -> None:
        self.worker_id = f"{role}-{secrets.token_hex(6)}"
        self._role = role
        self._settings = settings
        self._make_service = make_service
        self._prefill_share = prefill_share
        self._keys = Keys(settings.deployment)
        self._state = "loading"
        self._progress = 0.0
        self._service: Service | None = None
        self._context: WorkerContext | None = None
        self._claimed: set[tuple[str, str]] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._rate = _Rate()
        self._requests_done = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain."""
        redis = self._settings.redis
        source = resolve(self._settings.model)
        model = self._settings.served_model_name or source.name
        async with AsyncExitStack() as stack:
            commands = await stack.enter_async_context(connect(redis.url, redis.command_timeout_s))
            reader = await stack.enter_async_context(connect_blocking(redis.url))
            log.info("bus_connected", server=await check(commands), worker_id=self.worker_id)
            registry = Registry(commands, self._keys, int(redis.heartbeat_ttl_s * 1000))
            store = RequestStore(commands, self._keys)
            queue = WorkQueue(reader, commands, self._streams(model), self.worker_id)
            async with asyncio.TaskGroup() as group:
                beating = group.create_task(self._beat(registry, queue, model))
                try:
                    built = await asyncio.to_thread(self._build, source)
                    await self._serve(stack, stop, store, queue, commands, registry, model, built)
                finally:
                    await end_tasks([beating])
            await registry.leave(self.worker_id)
            await queue.remove_private([self._private(model)])

    def _build(self, source: ModelSource) -> BuiltEngine:
        return build_engine(
            source,
            self._settings.engine,
            prefill_share=self._prefill_share,
            shared_cache="shm" in self._settings.transfer.transports and self._role == "prefill",
            progress=self._set_progress,
        )

    def _set_progress(self, fraction: float) -> None:
        self._progress = fraction

    async def _serve(
        self,
        stack: AsyncExitStack,
        stop: asyncio.Event,
        store: RequestStore,
        queue: WorkQueue,
        commands: Redis,
        registry: Registry,
        model: str,
        built: BuiltEngine,
    ) -> None:
        bridge = await stack.enter_async_context(EngineBridge(built.engine))
        stack.callback(built.cache.close)
        settings = self._settings
        secret = settings.cluster_secret.get_secret_value().encode()
        self._context = WorkerContext(
            self.worker_id, model, store, registry, bridge, built, settings.engine, settings.transfer, secret
        )
        self._service = service = await stack.enter_async_context(self._make_service(self._context))
        watched = [self._keys.work(role, model) for role in ROLES]
        in_flight = InFlight(entries=lambda: self._claimed, requests=service.requests)
        grace = settings.redis.orphan_grace_s
        sweeper = Sweeper(commands, store, queue, registry, in_flight, watched=watched, orphan_grace_s=grace)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(service.run()),
                group.create_task(sweeper.run()),
                group.create_task(bridge.watch()),
                group.create_task(self._watch_engine(bridge)),
                group.create_task(self._prove(store, registry, model, built)),
            ]
            claiming = group.create_task(self._claim(queue, store, service, bridge, model, group))
            try:
                await stop.wait()
                await self._drain(service, claiming)
            finally:  # after a failure too: a group cancels once, and a read that swallows it would go on for ever
                await end_tasks((*tasks, claiming, *self._handlers))

    async def _prove(self, store: RequestStore, registry: Registry, model: str, built: BuiltEngine) -> None:
        self._state = "probing"
        vocab = built.source.config.vocab_size
        size = built.layout.block_size
        await SelfTest(store, registry, self._keys, self._role, model, self.worker_id, size, vocab).run_until_passed()
        if self._state == "probing":
            self._state = "ready"
            log.info("worker_ready", worker_id=self.worker_id, equal_tokens=built.invariance.ok)

    async def _claim(
        self,
        queue: WorkQueue,
        store: RequestStore,
        service: Service,
        bridge: EngineBridge,
        model: str,
        group: asyncio.TaskGroup,
    ) -> None:
        """Claim what fits, and only while this worker is to take work."""
        while self._state != "draining":
            room = service.room()
            if not room:
                await bridge.progress(_NO_ROOM_WAIT_S)
                continue
            try:
                items = await queue.read(room, READ_BLOCK_MS, self._open_streams(model))
            except (RedisError, OSError) as error:
                log.warning("claim_failed", error=type(error).__name__)
                await asyncio.sleep(_REDIS_PAUSE_S)
                continue
            for item in items:
                self._claimed.add(item[:2])
                handler = group.create_task(self._handle(service, store, item))
                self._handlers.add(handler)
                handler.add_done_callback(self._handlers.discard)

    async def _handle(self, service: Service, store: RequestStore, item: WorkItem) -> None:
        """Serve one entry. Cut off by Redis, it stays pending and is swept back; any other failure counts as a death.

        A request that fails wherever it goes thus ends with an error after a few tries, and takes no worker with it.
        """
        request_id = item[2].get("id", "")
        try:
            await service.handle(item)
            self._requests_done += 1
        except* (RedisError, OSError) as group:
            log.warning("handling_interrupted", error=type(flatten(group)[0]).__name__, request_id=request_id)
        except* Exception as group:
            log.error("handling_failed", request_id=request_id, exc_info=flatten(group)[0])
            await self._strike(store, item)
        finally:
            self._claimed.discard(item[:2])

    async def _strike(self, store: RequestStore, item: WorkItem) -> None:
        stream, entry, fields = item
        try:
            await store.sweep(stream, entry, fields.get("id", ""), counted=True)
        except (RedisError, OSError) as error:
            log.warning("handling_interrupted", error=type(error).__name__, request_id=fields.get("id", ""))

    async def _drain(self, service: Service, claiming: asyncio.Task[None]) -> None:
        self._state = "draining"
        await claiming  # a read under way may still bring entries; they are served too
        log.info("worker_draining", worker_id=self.worker_id, requests=len(self._handlers))
        if self._handlers:
            await asyncio.wait(set(self._handlers), timeout=self._settings.drain_timeout_s)
        if self._handlers:
            await service.hand_back()

    async def _watch_engine(self, bridge: EngineBridge) -> None:
        """A step that never ends must not look healthy: end the process, its requests move on."""
        while True:
            await asyncio.sleep(1.0)
            if time.monotonic() - bridge.last_turn > _HUNG_ENGINE_S:
                raise EngineError(f"the engine made no turn for {_HUNG_ENGINE_S:.0f} s")

    async def _beat(self, registry: Registry, queue: WorkQueue, model: str) -> None:
        while True:
            try:
                await registry.beat(self._heartbeat(model))
                await queue.refresh_private([self._private(model)], PRIVATE_TTL_MS)
            except (RedisError, OSError) as error:
                log.warning("heartbeat_failed", error=type(error).__name__)
            await asyncio.sleep(self._settings.redis.heartbeat_s)

    def _heartbeat(self, model: str) -> WorkerBeat:
        beat = WorkerBeat(
            worker_id=self.worker_id,
            role=self._role,
            state=self._state,
            model=model,
            numerics="",
            layout="",
            progress=self._progress,
            pid=os.getpid(),
            version=version("slipstream"),
            host=socket.gethostname(),
        )
        context, service = self._context, self._service
        if context is None or service is None:
            return beat
        load = context.built.engine.load()
        produced = load.computed_tokens if self._role == "prefill" else load.generated_tokens
        return replace(
            beat,
            numerics=context.built.numerics,
            layout=context.built.layout.fingerprint(),
            addresses=service.addresses,
            progress=1.0,
            running=load.running,
            waiting=max(load.waiting, len(self._claimed) - load.running - load.held),
            kv_tokens=load.kv_tokens,
            kv_tokens_used=load.kv_tokens_used,
            max_request_tokens=context.built.max_request_tokens,
            tokens_per_second=self._rate.update(produced),
            requests_done=self._requests_done,
            equal_tokens=context.built.invariance.ok,
        )

    def _private(self, model: str) -> str:
        return self._keys.private_work(self._role, model, self.worker_id)

    def _streams(self, model: str) -> tuple[str, ...]:
        return (
            self._keys.work(self._role, model),
            self._keys.probe_work(self._role, model),
            self._private(model),
        )

    def _open_streams(self, model: str) -> tuple[str, ...]:
        """Users' requests are read only once the self-test has passed."""
        streams = self._streams(model)
        return streams if self._state == "ready" else streams[1:]


class _Rate:
    """Tokens per second over the last few heartbeats."""

    def __init__(self) -> None:
        self._last = (time.monotonic(), 0)
        self._value = 0.0

    def update(self, total: int) -> float:
        now = time.monotonic()
        elapsed, produced = now - self._last[0], total - self._last[1]
        self._last = (now, total)
        if elapsed > 0:
            self._value += 0.5 * (produced / elapsed - self._value)
        return round(self._value, 2)
