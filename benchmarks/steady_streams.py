"""Streams that run while something else is measured beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from types import TracebackType

import aiohttp

from services.bench.client import Sample, stream_one
from services.bench.events import MAX_LINE
from services.bench.options import BenchOptions
from services.bench.prompts import make_prompts


class SteadyStreams:
    """`options.concurrency` streams from entering to leaving; one that ends is followed by another at once."""

    def __init__(self, options: BenchOptions) -> None:
        self._options = options
        self._samples: list[Sample] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> SteadyStreams:
        timeout = aiohttp.ClientTimeout(total=self._options.timeout_s)
        self._session = aiohttp.ClientSession(timeout=timeout, read_bufsize=MAX_LINE)
        model = self._options.model or (await self._models())[0]
        prompts = await make_prompts(self._session, self._options, model, self._options.requests)
        ready = iter(enumerate(prompts.items))
        for _ in range(self._options.concurrency):
            self._tasks.append(asyncio.create_task(self._run(ready, model)))
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

        Raises RuntimeError when a stream failed or there are no prompts left: what is measured beside fewer streams
        would look better than it is.
        """
        failed = next((sample.error for sample in self._samples if sample.error), "")
        if failed or any(task.done() for task in self._tasks):
            raise RuntimeError(failed or "there are no prompts left for the streams: give them more")
        inside = [[at for at in sample.times if begin <= at <= end] for sample in self._samples]
        return [later - earlier for times in inside for earlier, later in pairwise(times)]

    async def _run(self, prompts: Iterator[tuple[int, list[int] | str]], model: str) -> None:
        for index, prompt in prompts:
            self._samples.append(Sample())
            await stream_one(self._session, self._options, model, prompt, index, self._samples[-1])

    async def _models(self) -> list[str]:
        async with self._session.get(self._options.url("/v1/models")) as response:
            return [model["id"] for model in (await response.json())["data"]]
