"""A worker without an engine for measurements of what stands before it: answers with the same tokens again and again.

It speaks for both roles and stays in the prefill state to the end, which the scripts allow. All its requests go on in
step, as a batch does: one `step` appends a token to each, in one round trip.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from shared.bus.connection import connect, connect_blocking
from shared.bus.registry import Registry
from shared.bus.requests import RequestStore
from shared.bus.results import Append, Appended, Begun
from shared.bus.workqueue import WorkQueue
from shared.protocol.journal import EMPTY_HASH, chain
from shared.protocol.keys import Keys
from shared.protocol.messages import FINISH_LENGTH, Tokens, WorkerBeat
from shared.tasks import end_tasks

WORKER = "canned"
ROOM = 1 << 20
BEAT_S = 0.5
BLOCK_MS = 200
MAX_ENTRIES = 64


@dataclass(slots=True)
class _Running:
    """One request and how far it has come; `sent_at[n]` is when its token n was handed to the bus."""

    begun: Begun
    h: str
    sent_at: list[float]

    def append(self, token: int) -> Append:
        """The next token as the bus takes it."""
        base, h_base = len(self.sent_at), self.h
        self.h = chain(h_base, [token])
        finish = FINISH_LENGTH if base + 1 == self.begun.job.params.max_tokens else None
        return Append(self.begun.lease, Tokens(0, base, h_base, self.h, (token,), finish=finish))


class CannedWorker:
    """`async with`: takes all work of `model` and generates when told to. Call `use` first."""

    def __init__(self, url: str, keys: Keys, model: str) -> None:
        self._commands, self._reader = connect(url), connect_blocking(url)
        self._store = RequestStore(self._commands, keys)
        self._registry = Registry(self._commands, keys)
        work = [key("prefill", model) for key in (keys.express_work, keys.work)]
        self._queue = WorkQueue(self._reader, self._commands, work, WORKER)
        self._model = model
        self._tokens: Sequence[int] = ()
        self._tasks: list[asyncio.Task[None]] = []
        self._news = asyncio.Event()
        self.running: list[_Running] = []

    async def __aenter__(self) -> Self:
        await self._beat()
        self._tasks = [asyncio.create_task(self._keep_beating()), asyncio.create_task(self._take_work())]
        return self

    async def __aexit__(self, *_: object) -> None:
        await end_tasks(self._tasks)
        await self._commands.aclose()
        await self._reader.aclose()

    def use(self, tokens: Sequence[int]) -> None:
        """Every answer is these tokens, over and over."""
        self._tokens = tokens

    async def wait_for(self, count: int, timeout_s: float) -> None:
        """Until so many requests are under way. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while len(self.running) < count:
                await self._news.wait()
                self._news.clear()

    async def step(self) -> None:
        """A token for every request. Raises RuntimeError when the bus does not take one."""
        appends = [one.append(self._tokens[len(one.sent_at) % len(self._tokens)]) for one in self.running]
        now = time.monotonic()
        for one in self.running:
            one.sent_at.append(now)
        results = await self._store.append(appends)
        if not all(isinstance(result, Appended) for result in results):
            raise RuntimeError("a request was taken from the worker, so nothing was measured")

    async def steps(self, count: int, interval_s: float) -> None:
        """So many steps at an even pace."""
        begin = time.monotonic()
        for number in range(count):
            await asyncio.sleep(max(0.0, begin + number * interval_s - time.monotonic()))
            await self.step()

    def dismiss(self) -> dict[int, list[float]]:
        """Forget the requests, which have ended: when each token was sent, by the first token of its prompt."""
        ended, self.running = self.running, []
        return {one.begun.job.prompt_ids[0]: one.sent_at for one in ended}

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await self._beat()

    async def _beat(self) -> None:
        for role in ("prefill", "decode"):
            await self._registry.beat(
                WorkerBeat(
                    worker_id=f"{WORKER}-{role}",
                    role=role,
                    state="ready",
                    model=self._model,
                    numerics="canned",
                    layout="canned",
                    kv_tokens=ROOM,
                    max_request_tokens=ROOM,
                )
            )

    async def _take_work(self) -> None:
        while True:
            for stream, entry, fields in await self._queue.read(MAX_ENTRIES, BLOCK_MS):
                begun = await self._store.begin(stream, entry, fields["id"], WORKER)
                if isinstance(begun, Begun):
                    self.running.append(_Running(begun, EMPTY_HASH, []))
                    self._news.set()
