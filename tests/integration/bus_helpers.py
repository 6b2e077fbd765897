"""A store with the streams of one model, and the usual steps of a request's life."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from redis.asyncio import Redis

from shared.bus.requests import RequestStore
from shared.bus.results import Append, Begun, Committed, Lease, Offer
from shared.bus.workqueue import WorkQueue
from shared.protocol.journal import JournalState, chain, fold
from shared.protocol.keys import Keys
from shared.protocol.messages import Job, Tokens
from shared.protocol.sampling import SamplingParams


def tokens(held: list[int], new: list[int], choice: int = 0, finish: str | None = None) -> Tokens:
    """New tokens of a choice that holds `held`."""
    h = chain("", held)
    return Tokens(choice, len(held), h, chain(h, new), tuple(new), finish=finish)


@dataclass
class Bench:
    """One deployment seen through every role."""

    client: Redis
    keys: Keys
    store: RequestStore
    numbers: Any = field(default_factory=itertools.count)

    @classmethod
    def of(cls, client: Redis, keys: Keys, **options: Any) -> Bench:
        return cls(client, keys, RequestStore(client, keys, **options))

    @property
    def prefill(self) -> str:
        return self.keys.work("prefill", "m")

    @property
    def decode(self) -> str:
        return self.keys.work("decode", "m")

    def job(self, request_id: str = "r", n: int = 1, **changes: Any) -> Job:
        params = SamplingParams(max_tokens=8, seed=1, n=n)
        return replace(Job(request_id, "m", (1, 2, 3), params, "g", self.prefill, self.decode), **changes)

    def queue(self, consumer: str, *streams: str) -> WorkQueue:
        return WorkQueue(self.client, self.client, streams or (self.prefill, self.decode), consumer)

    async def read(self, stream: str, consumer: str = "p") -> tuple[str, str]:
        """(stream, entry id) of the one new entry of a stream."""
        items = await self.queue(consumer, stream).read(10, 0)
        assert len(items) == 1, items
        return items[0][0], items[0][1]

    async def begun(self, job: Job | None = None, worker: str = "p") -> Begun:
        """Submit a request and begin it."""
        job = job or self.job()
        await self.store.submit(job)
        begun = await self.store.begin(*await self.read(job.prefill_stream, worker), job.request_id, worker)
        assert isinstance(begun, Begun)
        return begun

    async def offered(self, job: Job | None = None, worker: str = "d") -> tuple[Begun, Offer]:
        begun = await self.begun(job)
        assert isinstance(await self.store.offer(begun.lease, b"address"), str)
        offer = await self.store.take(*await self.read(begun.job.decode_stream, worker), begun.job.request_id)
        assert isinstance(offer, Offer)
        return begun, offer

    async def committed(self, job: Job | None = None, worker: str = "d") -> Lease:
        """A request in decode that holds token 1 in each choice."""
        begun, offer = await self.offered(job, worker)
        first = [tokens([], [1], choice) for choice in range(begun.job.params.n)]
        answer = await self.store.commit(offer, f"{worker}:{next(self.numbers)}", first)
        assert isinstance(answer, Committed)
        return answer.lease

    async def append(self, lease: Lease, *events: Tokens) -> list[Any]:
        return list(await self.store.append([Append(lease, event) for event in events]))

    async def journal(self, request_id: str = "r", n: int = 1) -> JournalState:
        polled = await self.store.poll(request_id, "")
        assert polled is not None
        return fold(polled.entries, n)

    async def field(self, name: str, request_id: str = "r") -> str:
        value: Any = await self.client.hget(self.keys.request(request_id), name)
        return "" if value is None else value.decode()

    async def num_entries(self) -> int:
        return int(await self.client.xlen(self.prefill)) + int(await self.client.xlen(self.decode))

    async def num_pending(self) -> int:
        count = 0
        for stream in (self.prefill, self.decode):
            if await self.client.exists(stream):
                count += (await self.client.xpending(stream, "workers"))["pending"]
        return count
