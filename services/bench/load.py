"""When requests start, and the run around them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

import aiohttp

from services.bench.client import Sample, stream_one
from services.bench.events import MAX_LINE
from services.bench.observe import ProcessWatch, RedisCounter, find_processes
from services.bench.options import BenchOptions
from services.bench.prompts import make_prompts
from services.bench.report import BenchReport, summarise
from shared.errors import ConfigurationError

MEMORY_PERIOD_S = 0.5


async def run_bench(options: BenchOptions) -> BenchReport:
    """Warm up, run, and summarise. Raises ConfigurationError when the server or Redis cannot be used at all."""
    timeout = aiohttp.ClientTimeout(total=options.timeout_s)
    # A fresh connection for each request: some servers close theirs after a stream, and a reused one would then fail.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, headers=options.headers, read_bufsize=MAX_LINE
    ) as session:
        try:
            model = options.model or await _first_model(session, options)
            prompts = await make_prompts(session, options, model, options.warmup + options.requests)
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise ConfigurationError(f"no server at {options.base_url}: {exc}; start one or set --base-url") from exc
        for index in range(options.warmup):
            sample = await stream_one(session, options, model, prompts.items[index], index)
            if sample.error:
                raise ConfigurationError(f"the warm-up request failed, so nothing was measured: {sample.error}")
        async with RedisCounter(options.redis_url) as redis:
            watch = ProcessWatch(find_processes(options.pids))
            start = time.perf_counter()
            samples = await _load(session, options, model, prompts.items[options.warmup :], watch)
            wall = time.perf_counter() - start
            calls = await redis.delta()
    return summarise(options, model, prompts.exact, samples, wall, calls, watch.finish())


async def _load(
    session: aiohttp.ClientSession,
    options: BenchOptions,
    model: str,
    prompts: Sequence[list[int] | str],
    watch: ProcessWatch,
) -> list[Sample]:
    slots = asyncio.Semaphore(options.concurrency if options.rate == 0 else len(prompts))
    starts = start_times(len(prompts), options.rate, options.seed)
    begin = time.perf_counter()

    async def one(index: int) -> Sample:
        await asyncio.sleep(max(0.0, begin + starts[index] - time.perf_counter()))
        async with slots:
            return await stream_one(session, options, model, prompts[index], options.seed + index)

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(_watch(watch))
        tasks = [group.create_task(one(index)) for index in range(len(prompts))]
        await asyncio.wait(tasks)
        watching.cancel()
    return [task.result() for task in tasks]


async def _watch(watch: ProcessWatch) -> None:
    while True:
        watch.sample()
        await asyncio.sleep(MEMORY_PERIOD_S)


def start_times(count: int, rate: float, seed: int) -> list[float]:
    """Seconds after the beginning at which each request may start; all 0 in a closed loop.

    With a rate the gaps are exponential, so the starts form a Poisson process of `rate` a second.
    """
    if rate == 0:
        return [0.0] * count
    rng, now, starts = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        starts.append(now)
    return starts


async def _first_model(session: aiohttp.ClientSession, options: BenchOptions) -> str:
    async with session.get(options.url("/v1/models")) as response:
        if response.status != 200:
            raise ConfigurationError(
                f"{options.url('/v1/models')} answers HTTP {response.status}: set --model, and --api-key if it asks"
            )
        models = (await response.json(content_type=None)).get("data") or []
    if not models:
        raise ConfigurationError(f"{options.base_url} lists no model: set --model")
    return str(models[0]["id"])
