"""Prefill and decode workers inside the test's event loop, on the real bus: quick to start, easy to disturb."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.decode.main import PREFILL_SHARE
from services.decode.worker import DecodeService
from services.prefill.worker import PrefillService
from shared.bus.connection import connect
from shared.bus.registry import Registry
from shared.bus.requests import RequestStore
from shared.config import EngineSettings, Settings, load_settings
from shared.model.source import resolve
from shared.protocol.journal import JournalState, fold
from shared.protocol.keys import Keys
from shared.protocol.messages import Job
from shared.protocol.sampling import SamplingParams
from shared.transfer.base import FrameTap
from shared.transfer.exporter import Exporter
from shared.transfer.importer import Importer
from shared.worker.build import build_engine
from shared.worker.context import WorkerContext
from shared.worker.life import Worker
from tests.engine_fakes import run_to_end
from tests.tiny_model import NAME

TIMEOUT_S = 30.0


@dataclass(slots=True, eq=False)
class Running:
    """One worker: set `stop` to drain it, cancel `task` to have it gone without a word."""

    worker: Worker
    stop: asyncio.Event
    task: asyncio.Task[None]

    @property
    def worker_id(self) -> str:
        return self.worker.worker_id


@dataclass(slots=True)
class Bench:
    """What a test holds of one deployment: the bus, its workers and their services, and a way to run requests.

    `services` is by worker id; `prefill` and `decode` list the same services in the order they came up.
    """

    settings: Settings
    keys: Keys
    store: RequestStore
    registry: Registry
    group: asyncio.TaskGroup
    prefill: list[PrefillService] = field(default_factory=list)
    decode: list[DecodeService] = field(default_factory=list)
    services: dict[str, PrefillService | DecodeService] = field(default_factory=dict)
    running: list[Running] = field(default_factory=list)
    tap: FrameTap | None = None

    def start(self, role: str) -> Running:
        """Start one more worker; it is drained at the end with the others."""
        make, share = (_prefill(self), 1.0) if role == "prefill" else (_decode(self), PREFILL_SHARE)
        worker, stop = Worker(role, self.settings, make, prefill_share=share), asyncio.Event()
        running = Running(worker, stop, self.group.create_task(worker.run(stop)))
        self.running.append(running)
        return running

    async def states(self) -> dict[str, str]:
        """The state in each live worker's last heartbeat, by worker id."""
        return {beat.worker_id: beat.state for beat in await self.registry.live()}

    def job(self, prompt: list[int], **params: Any) -> Job:
        fields = {"max_tokens": 16, "seed": 11, "temperature": 0.0} | params
        return Job(
            request_id=f"t-{secrets.token_hex(6)}",
            model=NAME,
            prompt_ids=tuple(prompt),
            params=SamplingParams(**fields),
            gateway="test",
            prefill_stream=self.keys.work("prefill", NAME),
            decode_stream=self.keys.work("decode", NAME),
        )

    async def submit(self, prompt: list[int], **params: Any) -> Job:
        job = self.job(prompt, **params)
        await self.store.submit(job)
        return job

    async def journal(self, job: Job) -> JournalState:
        polled = await self.store.poll(job.request_id, job.gateway)
        assert polled is not None, "Redis forgot the request"
        return fold(polled.entries, job.params.n)

    async def ended(self, job: Job) -> JournalState:
        """The whole journal, once its terminal entry is there."""
        async with asyncio.timeout(TIMEOUT_S):
            while (state := await self.journal(job)).end is None:
                await self.registry.beat_gateway("test")
                await asyncio.sleep(0.01)
        return state

    async def generate(self, prompt: list[int], **params: Any) -> JournalState:
        return await self.ended(await self.submit(prompt, **params))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                await asyncio.sleep(0.005)

    async def nothing_leaks(self) -> None:
        """No request in flight, and every block free or cached, on both sides."""
        services: list[PrefillService | DecodeService] = [*self.prefill, *self.decode]
        await self.until(lambda: all(not service.in_flight for service in services))
        for service in services:
            engine = service.engine
            await self.until(lambda engine=engine: engine.blocks.num_free == engine.blocks.num_usable)  # type: ignore[misc]


@asynccontextmanager
async def workers(
    redis_url: str,
    deployment: str,
    model: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    tap: FrameTap | None = None,
    **overrides: Any,
) -> AsyncIterator[Bench]:
    """Ready workers of both roles; drained at the end. `overrides` are settings, nested like `Settings`."""
    engine = {"kv_cache_tokens": 2048, "threads": 1} | overrides.pop("engine", {})
    redis = {"url": redis_url} | overrides.pop("redis", {})
    fixed = {"deployment": deployment, "model": str(model), "served_model_name": NAME, "engine": engine, "redis": redis}
    secret = {"cluster_secret": "secret of the tests", "drain_timeout_s": 5}
    settings = load_settings(**(fixed | secret | overrides))
    async with connect(redis_url) as client:
        keys = Keys(deployment)
        async with asyncio.TaskGroup() as group:
            bench = Bench(settings, keys, RequestStore(client, keys), Registry(client, keys), group, tap=tap)
            for role in ["prefill"] * prefill + ["decode"] * decode:
                bench.start(role)
            try:
                await all_ready(bench, prefill + decode)
                yield bench
            finally:
                for running in bench.running:
                    running.stop.set()


async def all_ready(bench: Bench, count: int) -> None:
    """Until `count` workers' heartbeats say that they are ready. With none to wait for it returns at once."""
    async with asyncio.timeout(TIMEOUT_S):
        while list((await bench.states()).values()).count("ready") < count:
            await asyncio.sleep(0.02)


def _prefill(bench: Bench) -> Any:
    @asynccontextmanager
    async def make(context: WorkerContext) -> AsyncIterator[PrefillService]:
        cache, limits = context.built.cache, context.transfer_limits
        exporter = Exporter(cache, context.identity, context.secret, limits, tap=bench.tap)
        await exporter.start()
        try:
            service = PrefillService(context, exporter)
            bench.prefill.append(service)
            bench.services[context.worker_id] = service
            yield service
        finally:
            await exporter.close()

    return make


def _decode(bench: Bench) -> Any:
    @asynccontextmanager
    async def make(context: WorkerContext) -> AsyncIterator[DecodeService]:
        transports = context.transfer_settings.transports
        cache, limits = context.built.cache, context.transfer_limits
        importer = Importer(cache, context.identity, context.secret, limits, transports)
        try:
            service = DecodeService(context, importer)
            bench.decode.append(service)
            bench.services[context.worker_id] = service
            yield service
        finally:
            await importer.close()

    return make


def unsplit_tokens(
    model: Path, prompts: list[list[int]], *, engine: dict[str, Any] | None = None, **params: Any
) -> list[list[int]]:
    """The same requests in one engine in one process, one after the other: what every other way must equal."""
    from tests.engine_fakes import make_sequence, output_of

    built = build_engine(
        resolve(str(model)),
        EngineSettings(**({"kv_cache_tokens": 2048, "threads": 1} | (engine or {}))),
        prefill_share=1.0,
        shared_cache=False,
    )
    outputs = []
    for prompt in prompts:
        for choice in range(params.get("n", 1)):
            sequence = make_sequence(prompt, choice=choice, **({"max_tokens": 16, "seed": 11} | params))
            built.engine.add(sequence)
            run_to_end(built.engine)
            outputs.append(output_of(sequence))
    return outputs
