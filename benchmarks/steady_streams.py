"""Streams that run while something else is measured beside them."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from types import TracebackType

import aiohttp

from services.bench.client import Sample, stream_one
from services.bench.events import MAX_LINE
from services.bench.options import BenchOptions
from services.bench.prompts import make_prompts


class SteadyStreams:
    """`options.concurrency` streams from entering to leaving, then cut off. They have to be long enough for that."""

    def __init__(self, options: BenchOptions) -> None:
        self._options = options
        self._samples = [Sample() for _ in range(options.concurrency)]
        self._tasks: list[asyncio.Task[Sample]] = []

    async def __aenter__(self) -> SteadyStreams:
        timeout = aiohttp.ClientTimeout(total=self._options.timeout_s)
        self._session = aiohttp.ClientSession(timeout=timeout, read_bufsize=MAX_LINE)
        model = self._options.model or (await self._models())[0]
        prompts = await make_prompts(self._session, self._options, model, len(self._samples))
        for index, (sample, prompt) in enumerate(zip(self._samples, prompts.items, strict=True)):
            stream = stream_one(self._session, self._options, model, prompt, index, sample)
            self._tasks.append(asyncio.create_task(stream))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds between neighbouring chunks of a stream, both within the span (as `time.perf_counter` counts).

        Raises RuntimeError when a stream has ended: what is measured beside fewer streams would look better than it is.
        """
        if any(task.done() for task in self._tasks):
            failed = next((sample.error for sample in self._samples if sample.error), "")
            raise RuntimeError(failed or "a stream ended before what was measured beside it: make the streams longer")
        inside = [[at for at in sample.times if begin <= at <= end] for sample in self._samples]
        return [later - earlier for times in inside for earlier, later in pairwise(times)]

    async def _models(self) -> list[str]:
        async with self._session.get(self._options.url("/v1/models")) as response:
            return [model["id"] for model in (await response.json())["data"]]
