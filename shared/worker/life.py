"""The life of one worker process, the same for both roles: load, prove itself, serve, drain.

loading   heartbeats tell the progress while the model loads
probing   only self-test streams are read; `shared.worker.selftest` runs until it passes
ready     the model's work stream is read too
stalled   the engine hangs in one turn: nothing is claimed until it is through
draining  nothing new is read; requests finish, or go back to the queue when the time is up. By SIGTERM or by order
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import structlog
from redis.exceptions import RedisError

from shared.bus.requests import PRIVATE_TTL_MS, RequestStore
from shared.bus.sweeper import InFlight, Sweeper
from shared.bus.workqueue import WorkItem, WorkQueue
from shared.config import Settings
from shared.lifecycle import flatten, give_up
from shared.model.source import ModelSource, resolve
from shared.protocol.keys import ROLES, Keys
from shared.tasks import end_tasks
from shared.worker.bridge import EngineBridge
from shared.worker.build import BuiltEngine, build_engine
from shared.worker.bus import WorkerBus, open_bus
from shared.worker.context import Service, WorkerContext
from shared.worker.heartbeat import STATE_READY, Heartbeat
from shared.worker.selftest import SelfTest
from shared.worker.watchdog import Watchdog

log = structlog.get_logger()

READ_BLOCK_MS = 500
_NO_ROOM_WAIT_S = 0.05
_REDIS_PAUSE_S = 0.5

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
        self._claimed: set[tuple[str, str]] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._watchdog: Watchdog | None = None
        self._sweeper: Sweeper | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain. An order to drain sets it, too."""
        redis = self._settings.redis
        source = resolve(self._settings.model)
        model = self._settings.served_model_name or source.name
        self._heart = Heartbeat(self.worker_id, self._role, model, self._is_stalled)
        async with AsyncExitStack() as stack:
            bus = await stack.enter_async_context(open_bus(redis, self._keys, self._streams(), self.worker_id))
            async with asyncio.TaskGroup() as group:
                beating = group.create_task(self._beat(bus))
                heeding = group.create_task(bus.orders.follow(self.worker_id, stop, redis.heartbeat_s))
                try:
                    built = await asyncio.to_thread(self._build, source)
                    await self._serve(stack, bus, built, stop)
                finally:
                    await end_tasks([beating, heeding])
            await self._leave(bus)

    def _build(self, source: ModelSource) -> BuiltEngine:
        return build_engine(
            source,
            self._settings.engine,
            prefill_share=self._prefill_share,
            shared_cache="shm" in self._settings.transfer.transports and self._role == "prefill",
            speculation=self._settings.speculation if self._role == "decode" else None,
            progress=self._heart.set_progress,
        )

    def _is_stalled(self) -> bool:
        return self._watchdog is not None and self._watchdog.is_stalled

    def _disturbed(self) -> None:
        """Our own pulse failed or stood still: whoever looks dead now may be as well as we are."""
        if self._sweeper is not None:
            self._sweeper.disturbed()

    async def _serve(self, stack: AsyncExitStack, bus: WorkerBus, built: BuiltEngine, stop: asyncio.Event) -> None:
        bridge = await stack.enter_async_context(EngineBridge(built.engine))
        stack.callback(built.cache.close)
        context = self._context(bus, bridge, built)
        context.log_limits()
        service = await stack.enter_async_context(self._make_service(context))
        watchdog, sweeper = self._make_watchdog(bridge), self._make_sweeper(bus, service)
        self._watchdog, self._sweeper = watchdog, sweeper
        self._heart.serve(context, service, lambda: len(self._claimed), sweeper.counters)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(service.run()),
                group.create_task(sweeper.run()),
                group.create_task(bridge.watch()),
                group.create_task(watchdog.run()),
                group.create_task(self._prove(bus, built)),
            ]
            claiming = group.create_task(self._claim(bus, service, bridge, group))
            try:
                await stop.wait()
                await self._drain(service, claiming)
            finally:  # after a failure too: a group cancels once, and a read that swallows it would go on for ever
                await end_tasks((*tasks, claiming, *self._handlers))

    def _context(self, bus: WorkerBus, bridge: EngineBridge, built: BuiltEngine) -> WorkerContext:
        settings = self._settings
        return WorkerContext(
            self.worker_id,
            self._heart.model,
            bus.store,
            bus.registry,
            bridge,
            built,
            settings.engine,
            settings.transfer,
            settings.cluster_secret.get_secret_value().encode(),
        )

    def _make_watchdog(self, bridge: EngineBridge) -> Watchdog:
        redis = self._settings.redis
        longest_gap_s = redis.heartbeat_ttl_s - redis.heartbeat_s  # longer, and our beat may be gone
        return Watchdog(bridge, self._settings.engine.hang_timeout_s, longest_gap_s, give_up, self._disturbed)

    def _make_sweeper(self, bus: WorkerBus, service: Service) -> Sweeper:
        watched = [stream for role in ROLES for stream in self._users_streams(role)]
        in_flight = InFlight(entries=lambda: self._claimed, requests=service.requests)
        grace = self._settings.redis.orphan_grace_s
        return Sweeper(
            bus.commands, bus.store, bus.queue, bus.registry, in_flight, watched=watched, orphan_grace_s=grace
        )

    async def _prove(self, bus: WorkerBus, built: BuiltEngine) -> None:
        self._heart.state = "probing"
        vocab = built.source.config.vocab_size
        size = built.layout.block_size
        model, store, registry = self._heart.model, bus.store, bus.registry
        await SelfTest(store, registry, self._keys, self._role, model, self.worker_id, size, vocab).run_until_passed()
        if self._heart.state == "probing":
            self._heart.state = STATE_READY
            log.info("worker_ready", worker_id=self.worker_id, equal_tokens=built.invariance.ok)

    async def _claim(self, bus: WorkerBus, service: Service, bridge: EngineBridge, group: asyncio.TaskGroup) -> None:
        """Claim what fits, and only while this worker is to take work."""
        while self._heart.state != "draining":
            try:
                items = await self._read(bus.queue, service, bridge)
            except (RedisError, OSError) as error:
                log.warning("claim_failed", error=type(error).__name__)
                await asyncio.sleep(_REDIS_PAUSE_S)
                continue
            for item in items:
                self._claimed.add(item[:2])
                handler = group.create_task(self._handle(service, bus.store, item))
                self._handlers.add(handler)
                handler.add_done_callback(self._handlers.discard)

    async def _read(self, queue: WorkQueue, service: Service, bridge: EngineBridge) -> list[WorkItem]:
        """Entries there is room for, what goes first before all others; none when a while passed without."""
        is_stalled = self._is_stalled()
        express = 0 if is_stalled or self._heart.state != STATE_READY else service.room(express=True)
        if express and (items := await queue.read(express, 0, self._streams()[:1])):
            return items
        room = 0 if is_stalled else service.room()
        if room:
            return await queue.read(room, READ_BLOCK_MS, self._open_streams())
        await bridge.progress(_NO_ROOM_WAIT_S)
        return []

    async def _handle(self, service: Service, store: RequestStore, item: WorkItem) -> None:
        """Serve one entry. Cut off by Redis, it stays pending and is swept back; any other failure counts as a death.

        A request that fails wherever it goes thus ends with an error after a few tries, and takes no worker with it.
        """
        request_id = item[2].get("id", "")
        try:
            await service.handle(item)
            self._heart.requests_done += 1
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
            await store.strike(stream, entry, fields.get("id", ""))
        except (RedisError, OSError) as error:
            log.warning("handling_interrupted", error=type(error).__name__, request_id=fields.get("id", ""))

    async def _drain(self, service: Service, claiming: asyncio.Task[None]) -> None:
        self._heart.state = "draining"
        await claiming  # a read under way may still bring entries; they are served too
        log.info("worker_draining", worker_id=self.worker_id, requests=len(self._handlers))
        if self._handlers:
            await asyncio.wait(set(self._handlers), timeout=self._settings.drain_timeout_s)
        if self._handlers:
            try:
                await service.hand_back()
            except (RedisError, OSError) as error:
                log.warning("hand_back_failed", error=type(error).__name__)

    async def _leave(self, bus: WorkerBus) -> None:
        """Give back entries that nobody here serves any more, and take our name off every list."""
        try:
            for stream, entry, request_id in await bus.queue.pending_own():
                if request_id is not None:
                    await bus.store.sweep(stream, entry, request_id, counted=False)
            await bus.queue.leave()
            await bus.registry.leave(self.worker_id)
            await bus.queue.remove_private([self._streams()[-1]])
        except (RedisError, OSError) as error:
            log.warning("leaving_failed", error=type(error).__name__, hint="peers sweep what is left")

    async def _beat(self, bus: WorkerBus) -> None:
        while True:
            try:
                await bus.registry.beat(self._heart.now())
                await bus.queue.refresh_private([self._streams()[-1]], PRIVATE_TTL_MS)
            except (RedisError, OSError) as error:
                self._disturbed()
                log.warning("heartbeat_failed", error=type(error).__name__)
            await asyncio.sleep(self._settings.redis.heartbeat_s)

    def _users_streams(self, role: str) -> tuple[str, str]:
        """Users' work of a role, first what goes first."""
        return self._keys.express_work(role, self._heart.model), self._keys.work(role, self._heart.model)

    def _streams(self) -> tuple[str, ...]:
        """Users' work, self-tests of all, and our own ones."""
        model = self._heart.model
        return (
            *self._users_streams(self._role),
            self._keys.probe_work(self._role, model),
            self._keys.private_work(self._role, model, self.worker_id),
        )

    def _open_streams(self) -> tuple[str, ...]:
        """Users' requests are read only once the self-test has passed."""
        return self._streams() if self._heart.state == STATE_READY else self._streams()[2:]
