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


@dataclass(slots=True)
class Bench:
    """What a test holds of one deployment: the bus, its workers' services, and a way to run requests."""

    settings: Settings
    keys: Keys
    store: RequestStore
    registry: Registry
    prefill: list[PrefillService] = field(default_factory=list)
    decode: list[DecodeService] = field(default_factory=list)
    tap: FrameTap | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)

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
    settings = load_settings(
        deployment=deployment,
        model=str(model),
        served_model_name=NAME,
        redis={"url": redis_url},
        cluster_secret="secret of the tests",
        drain_timeout_s=5,
        engine=engine,
        **overrides,
    )
    async with connect(redis_url) as client:
        keys = Keys(deployment)
        bench = Bench(settings, keys, RequestStore(client, keys), Registry(client, keys), tap=tap)
        async with asyncio.TaskGroup() as group:
            for _ in range(prefill):
                group.create_task(Worker("prefill", settings, _prefill(bench), prefill_share=1.0).run(bench.stop))
            for _ in range(decode):
                worker = Worker("decode", settings, _decode(bench), prefill_share=PREFILL_SHARE)
                group.create_task(worker.run(bench.stop))
            try:
                await _all_ready(bench, prefill + decode)
                yield bench
            finally:
                bench.stop.set()


async def _all_ready(bench: Bench, count: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while sum(beat.state == "ready" for beat in await bench.registry.live()) < count:
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
            yield service
        finally:
            await importer.close()

    return make


def unsplit_tokens(model: Path, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    """The same requests in one engine in one process, one after the other: what every other way must equal."""
    from tests.engine_fakes import make_sequence, output_of

    built = build_engine(
        resolve(str(model)),
        EngineSettings(kv_cache_tokens=2048, threads=1),
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
