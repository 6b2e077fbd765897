"""A constant load: so many requests in flight at any time, each compared later with the same request undisturbed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import aiohttp

from tests.faults.client import FINISHED, Client, Record
from tests.faults.requests import Answer, Spec

LEAVING_SHARE = 0.1
LEARNERS = 4


class Load:
    """A closed loop over a fixed set of specs; an async context manager around its connections.

    `references` holds the undisturbed answer of each spec, once `learn` has run.
    """

    def __init__(self, urls: Callable[[], Sequence[str]], specs: Sequence[Spec], seed: int, *, leaving: bool) -> None:
        self.records: list[Record] = []
        self.references: dict[int, Answer] = {}
        self._urls = urls
        self._specs = list(specs)
        self._random = random.Random(seed)
        self._leaving = leaving
        self._runners: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._client = Client(self._http, self._urls)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for runner in self._runners:
            runner.cancel()
        await asyncio.gather(*self._runners, return_exceptions=True)
        await self._http.close()

    async def learn(self) -> None:
        """Ask for every spec once while nothing is disturbed."""
        slots = asyncio.Semaphore(LEARNERS)

        async def learn_one(spec: Spec) -> None:
            async with slots:
                record = await self._client.ask(replace(spec, stream=True))
            if record.outcome != FINISHED:
                raise AssertionError(f"request {spec.number} fails undisturbed: {record.error}")
            self.references[spec.number] = record.answer
            self.records.append(record)

        await asyncio.gather(*(learn_one(spec) for spec in self._specs))

    def start(self, concurrency: int) -> None:
        self._stopping = False
        for _ in range(concurrency):
            runner = asyncio.create_task(self._run())
            self._runners.add(runner)
            runner.add_done_callback(self._runners.discard)

    async def stop(self) -> None:
        """Ask for nothing new; returns when every request has ended."""
        self._stopping = True
        while self._runners:
            for failed in (await asyncio.wait(self._runners))[0]:
                failed.result()

    async def close_connections(self) -> None:
        """Let go of idle connections to gateways, so that their descriptors can be counted."""
        await self._http.close()
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._client = Client(self._http, self._urls)

    async def _run(self) -> None:
        while not self._stopping:
            spec = self._random.choice(self._specs)
            if self._leaving and spec.stream and self._random.random() < LEAVING_SHARE:
                spec = replace(spec, leaves_after=self._random.randint(1, 30))
            self.records.append(await self._client.ask(spec))
