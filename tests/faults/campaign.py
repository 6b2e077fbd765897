"""One run of the harness: undisturbed, disturbed, recovered; then every invariant."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import invariants
from tests.faults.cluster import FaultCluster, Topology
from tests.faults.invariants import Footprint
from tests.faults.load import Load
from tests.faults.memory import MemoryTrace, memory_flat
from tests.faults.requests import make_specs
from tests.tiny_model import NAME, write_tiny_model

REST_TIMEOUT_S = 20.0
SAMPLE_S = 1.0
KEEP_MS = 130_000
REDIS = "redis"
"""Its memory is noted but not judged here: it keeps answers for minutes, so only a run that outlasts them can tell."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Size of a run. `seed` decides the requests, their order and the faults."""

    seed: int
    topology: Topology
    num_specs: int = 16
    concurrency: int = 8
    max_tokens: tuple[int, int] = (40, 300)
    leaving: bool = False
    standard_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Disturbance:
    """One fault as it happened; times are seconds of the monotonic clock."""

    kind: str
    target: str
    at: float
    healed: float


@dataclass(slots=True)
class Campaign:
    """A cluster under load and all that is written down about it."""

    plan: Plan
    cluster: FaultCluster
    load: Load
    started: float = field(default_factory=time.monotonic)
    disturbances: list[Disturbance] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)
    memory: dict[int, MemoryTrace] = field(default_factory=dict)
    footprints: list[Footprint] = field(default_factory=list)
    leaked_tokens: int = 0
    dead_letters: list[dict[str, str]] = field(default_factory=list)

    async def standard(self) -> None:
        """Learn the answers, run undisturbed for a while, and look at the processes at rest."""
        await self.load.learn()
        with phase(self, "standard"):
            self.load.start(self.plan.concurrency)
            await asyncio.sleep(self.plan.standard_s)
            await self.load.stop()
        await self.rest()
        self.footprints = await self.look()

    async def recovery(self) -> None:
        """The same load once more after the faults, then every invariant."""
        await self.load.stop()
        await self.cluster.ready()
        with phase(self, "recovery"):
            self.load.start(self.plan.concurrency)
            await asyncio.sleep(self.plan.standard_s)
            await self.load.stop()
        await self.check()

    async def rest(self) -> list[str]:
        """Wait until nothing is held anywhere; answers what still is when time is up."""
        await self.load.close_connections()
        deadline = time.monotonic() + REST_TIMEOUT_S
        while (held := await self._held()) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        return held

    async def check(self) -> None:
        """All invariants, on the records and on the cluster at rest."""
        records = self.load.records
        self.violations += await self.rest()
        self.leaked_tokens = sum(beat.kv_tokens_used for beat in await self.cluster.beats())
        self.dead_letters = await self.cluster.dead_letters()
        self.violations += invariants.one_ending(records)
        self.violations += invariants.token_integrity(records, self.load.references)
        self.violations += invariants.event_order(records)
        self.violations += await invariants.keys_expire(self.cluster.redis.client)
        self.violations += invariants.footprints_steady(self.footprints, await self.look())
        self.violations += memory_flat(trace for trace in self.memory.values() if trace.name != REDIS)
        for slot in self.cluster.of_role("gateway"):
            self.violations += invariants.metrics_add_up(await self.cluster.metrics(slot))

    async def look(self) -> list[Footprint]:
        """Descriptors, threads, memory and tasks of every process that runs."""
        ports = [self.cluster.redis.port]
        ports += [slot.back.port for slot in self.cluster.slots if slot.back]
        children = [slot.child for slot in self.cluster.of_role("gateway", "prefill", "decode") if slot.child]
        lengths = [len(child.log_text()) for child in children]
        for child in children:
            child.print_tasks()
        await asyncio.sleep(0.5)
        dumps = [child.log_text()[length:] for child, length in zip(children, lengths, strict=True)]
        return [
            invariants.footprint(child.pid, ports, invariants.tasks_in(dump))
            for child, dump in zip(children, dumps, strict=True)
        ]

    async def sample_memory(self) -> None:
        """Note every process's memory each second, until cancelled."""
        while True:
            children = [(slot.name, slot.child) for slot in self.cluster.of_role("gateway", "prefill", "decode")]
            for name, child in [*children, (REDIS, self.cluster.redis.child)]:
                if child is not None and child.is_alive:
                    trace = self.memory.setdefault(child.pid, MemoryTrace(child.pid, name))
                    with contextlib.suppress(OSError):  # it ended just now
                        trace.samples.append((len(self.load.records), invariants.memory_kib(child.pid)))
            await asyncio.sleep(SAMPLE_S)

    async def _held(self) -> list[str]:
        client = self.cluster.redis.client
        held = invariants.blocks_free(await self.cluster.beats())
        held += await invariants.nothing_pending(client)
        return held + await invariants.requests_ended(client, KEEP_MS)


class phase:
    """Note when a phase began and ended."""

    def __init__(self, campaign: Campaign, name: str) -> None:
        self._campaign, self._name, self._began = campaign, name, 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._campaign.phases[self._name] = (self._began, time.monotonic())


@asynccontextmanager
async def campaign(plan: Plan, folder: Path) -> AsyncIterator[Campaign]:
    """A ready cluster with its load, measured; processes are gone at the end."""
    model = write_tiny_model(folder / "models" / NAME)
    async with FaultCluster(folder / "cluster", str(model), plan.topology) as cluster:
        specs = make_specs(plan.num_specs, plan.seed, plan.max_tokens)

        def urls() -> list[str]:
            return [slot.url for slot in cluster.of_role("gateway")]

        async with Load(urls, specs, plan.seed, leaving=plan.leaving) as load:
            run = Campaign(plan, cluster, load)
            sampler = asyncio.create_task(run.sample_memory())
            try:
                yield run
            finally:
                sampler.cancel()
                await asyncio.gather(sampler, return_exceptions=True)
