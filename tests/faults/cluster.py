"""A cluster of real processes that can be hurt: gateways, workers of both roles, a Redis of its own, links by proxies.

Every process lives in a slot with ports of its own, which stay the same when the process is started again. While
`supervised`, a process that ends is started again at once, as `slipstream serve` or a container runtime would.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

from shared import faultpoints
from shared.bus.connection import as_text
from shared.bus.registry import Registry
from shared.protocol.keys import Keys
from shared.protocol.messages import WorkerBeat
from tests.faults.ports import free_port
from tests.faults.proxy import Proxy
from tests.faults.redis_server import FaultRedis
from tests.faults.spawner import Child, Spawner, ended

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
DEPLOYMENT = "faults"
WORKERS = ("prefill", "decode")
KEYS = "SLIPSTREAM_API_KEYS"


@dataclass(frozen=True, slots=True)
class Topology:
    """How many of each; `proxied` puts a proxy on every link, `settings` are environment variables of all processes.

    With `veterans` the first process of each role is never made to end, so that its memory can be watched.
    """

    gateways: int = 1
    prefill: int = 1
    decode: int = 1
    proxied: bool = False
    veterans: bool = False
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Slot:
    """A place for one process. `front` and `back` are proxies: before what it listens on, and before its Redis."""

    role: str
    index: int
    port: int
    front: Proxy | None = None
    back: Proxy | None = None
    child: Child | None = None
    starts: int = 0

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"

    @property
    def is_running(self) -> bool:
        return self.child is not None and self.child.is_running

    @property
    def pid(self) -> int:
        """Of the process in it; 0 without one."""
        return self.child.pid if self.child else 0

    @property
    def url(self) -> str:
        """Where clients reach a gateway."""
        return f"http://127.0.0.1:{self.front.port if self.front else self.port}"


class FaultCluster:
    """`async with FaultCluster(folder, model, topology) as cluster:` starts everything and waits until it is ready."""

    def __init__(self, folder: Path, model_path: str, topology: Topology) -> None:
        self.slots: list[Slot] = []
        self.supervised = True
        self.topology = topology
        self.respawns = 0
        self._folder = folder
        self._model_path = model_path
        self._stack = AsyncExitStack()
        self._watching: asyncio.Task[None] | None = None
        self._closing = False

    async def __aenter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self.spawner = await self._stack.enter_async_context(Spawner())
            self.redis = FaultRedis(self.spawner, self._folder / "redis")
            await self.redis.start()
            self._stack.push_async_callback(self.redis.close)
            self.registry = Registry(self.redis.client, Keys(DEPLOYMENT))
            self.http = await self._stack.enter_async_context(
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5))
            )
            counts = (("prefill", self.topology.prefill), ("decode", self.topology.decode))
            for role, count in (*counts, ("gateway", self.topology.gateways)):
                for _ in range(count):
                    await self.add(role)
            await self.ready()
            self._watching = asyncio.create_task(self._supervise())
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        try:
            if kind is None:
                await self._drain()
        finally:
            await self._stack.aclose()

    async def add(self, role: str, **settings: str) -> Slot:
        """A new slot and its first process; `settings` only count for that process."""
        slot = Slot(role, sum(other.role == role for other in self.slots), free_port())
        if self.topology.proxied:
            slot.back = await self._stack.enter_async_context(Proxy(self.redis.port))
            if role != "decode":
                slot.front = await self._stack.enter_async_context(Proxy(slot.port))
        self.slots.append(slot)
        await self.start(slot, **settings)
        return slot

    async def start(self, slot: Slot, **settings: str) -> Child:
        """Put a new process into a slot whose process has ended, or is to be left alone."""
        slot.starts += 1
        log = self._folder / f"{slot.name}.{slot.starts}.log"
        self.points_file(slot).write_text("")
        slot.child = await self.spawner.start([slot.role], self._environment(slot) | settings, log)
        return slot.child

    def of_role(self, *roles: str) -> list[Slot]:
        """Slots whose process runs now."""
        return [slot for slot in self.slots if slot.role in roles and slot.is_running]

    def inject(self, slot: Slot, points: str) -> None:
        """Arm fault points of a running process: `name:action[:count],...`, counted from now."""
        faultpoints.parse(points)
        self.points_file(slot).write_text(points)

    def points_file(self, slot: Slot) -> Path:
        return self._folder / f"{slot.name}.points"

    async def beats(self) -> list[WorkerBeat]:
        return await self.registry.live()

    async def beat_of(self, slot: Slot) -> WorkerBeat | None:
        return next((beat for beat in await self.beats() if beat.pid == slot.pid), None)

    async def owners(self, state: str) -> set[str]:
        """Ids of the workers that own a request in `state` now; a heartbeat tells of it up to its interval later."""
        owners: set[str] = set()
        async for key in self.redis.client.scan_iter(match="*:req:*"):
            held, owner = (as_text(value or b"") for value in await self.redis.client.hmget(key, "state", "owner"))
            if held == state and owner:
                owners.add(owner.partition(":")[0])
        return owners

    async def ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until every running process is ready and every gateway says so."""
        await self.until(self._is_ready, "the cluster to be ready", timeout_s)

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not await condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"gave up after {timeout_s:.0f} s waiting for {what}\n{self.last_words()}")
            await asyncio.sleep(0.05)

    async def is_healthy(self, slot: Slot) -> bool:
        try:
            async with self.http.get(f"http://127.0.0.1:{slot.port}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def metrics(self, slot: Slot) -> str:
        async with self.http.get(f"http://127.0.0.1:{slot.port}/metrics") as response:
            return await response.text()

    async def no_suspects(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until every request whose worker died has made progress on another one."""

        async def look() -> bool:
            pids = {slot.pid for slot in self.of_role(*WORKERS)}
            alive = {beat.worker_id for beat in await self.beats() if beat.pid in pids}
            async for key in self.redis.client.scan_iter(match="*:req:*"):
                fields = await self.redis.client.hmget(key, "state", "deaths", "owner")
                state, deaths, owner = (as_text(value or b"") for value in fields)
                is_held_by_the_dead = owner and owner.partition(":")[0] not in alive
                if state not in ("", "done") and (deaths not in ("", "0") or is_held_by_the_dead):
                    return False
            return True

        await self.until(look, "requests of dead workers to go on", timeout_s)

    async def dead_letters(self) -> list[dict[str, str]]:
        """The requests that were given up because their workers kept dying, as `slipstream dlq` shows them."""
        entries = await self.redis.client.xrange(Keys(DEPLOYMENT).dead) or []
        return [{as_text(name): as_text(value) for name, value in (fields or {}).items()} for _, fields in entries]

    def last_words(self, length: int = 1500) -> str:
        children = [(slot.name, slot.child) for slot in self.slots if slot.child]
        return "\n".join(f"== {name} {child.pid}\n{child.log_text()[-length:]}" for name, child in children)

    async def _is_ready(self) -> bool:
        if not all(slot.is_running for slot in self.slots):
            return False
        ready = {beat.pid for beat in await self.beats() if beat.state == "ready"}
        workers = {slot.pid for slot in self.of_role(*WORKERS)}
        return workers <= ready and all([await self.is_healthy(slot) for slot in self.of_role("gateway")])

    async def _supervise(self) -> None:
        while True:
            for slot in self.slots:
                if self.supervised and slot.child is not None and not slot.child.is_alive:
                    self.respawns += 1
                    await self.start(slot)
            await asyncio.sleep(0.05)

    async def _drain(self) -> None:
        """SIGTERM to all; one that does not end by itself is a failure."""
        for slot in self.slots:
            for proxy in (slot.front, slot.back):
                if proxy:
                    proxy.heal()
        for roles in (("gateway",), WORKERS):
            children = [slot.child for slot in self.slots if slot.role in roles and slot.child and slot.child.is_alive]
            for child in children:
                child.go_on()
                child.terminate()
            stubborn = [child for child in children if await ended(child, STOP_TIMEOUT_S) is None]
            if stubborn:
                raise AssertionError(f"these processes did not end by themselves:\n{self.last_words()}")

    def _environment(self, slot: Slot) -> dict[str, str]:
        redis_url = self.redis.url_at(slot.back.port) if slot.back else self.redis.url
        own = {"SLIPSTREAM_GATEWAY__PORT": str(slot.port)} if slot.role == "gateway" else {}
        if slot.role == "prefill":
            own = {"SLIPSTREAM_TRANSFER__PORT": str(slot.port)}
            own["SLIPSTREAM_TRANSFER__ADVERTISE_PORT"] = str(slot.front.port if slot.front else 0)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
        ours = {
            "SLIPSTREAM_DEPLOYMENT": DEPLOYMENT,
            "SLIPSTREAM_REDIS__URL": redis_url,
            "SLIPSTREAM_REDIS__HEARTBEAT_S": "0.5",
            "SLIPSTREAM_MODEL": self._model_path,
            "SLIPSTREAM_CLUSTER_SECRET": "secret of the tests",
            "SLIPSTREAM_ENGINE__THREADS": "1",
            "SLIPSTREAM_ENGINE__KV_CACHE_TOKENS": "8192",
            "SLIPSTREAM_ENGINE__MAX_NUM_BATCHED_TOKENS": "128",
            "SLIPSTREAM_GATEWAY__PING_S": "1",
            "SLIPSTREAM_DRAIN_TIMEOUT_S": "5",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if KEYS not in self.topology.settings:  # no server that asks for keys can be made to fail by a variable
            ours[faultpoints.VARIABLE] = f"@{self.points_file(slot)}"
        return inherited | ours | own | self.topology.settings
