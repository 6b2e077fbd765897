"""Slots for running requests: a bound on what is submitted, a short fair queue before it, no more.

Back-pressure towards clients happens here only. Keys take turns in the queue, so one key with a
thousand requests waiting does not hold up another key's first one.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from services.gateway.errors import RateLimited
from shared.errors import InvalidRequest, Overloaded

_RETRY_AFTER_S = 2


@dataclass(eq=False, slots=True)
class _Waiter:
    weight: int
    ready: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """Counts slots in use, by key and in total. A request of k prompts takes k slots.

    Owned by one event loop; every change happens between awaits.
    """

    def __init__(self, max_in_flight: int, max_per_key: int, max_queued: int, max_wait_s: float) -> None:
        self._max_in_flight = max_in_flight
        self._max_per_key = max_per_key
        self._max_queued = max_queued
        self._max_wait_s = max_wait_s
        self._held: Counter[str] = Counter()
        self._queues: OrderedDict[str, deque[_Waiter]] = OrderedDict()
        self.in_flight = 0
        self.queued = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def slot(self, key_id: str, weight: int = 1) -> AsyncIterator[None]:
        """Hold `weight` slots; waits in turn when none is free.

        Raises RateLimited when the key has its share already, Overloaded when the queue is full or the
        wait too long, InvalidRequest when it could never fit.
        """
        limit = min(self._max_in_flight, self._max_per_key)
        if weight > limit:
            raise InvalidRequest(f"A request may have at most {limit} prompts here, it has {weight}.", "prompt")
        if self._held[key_id] + weight > self._max_per_key:
            raise RateLimited("Too many requests at once for this key; wait for one to end.", _RETRY_AFTER_S)
        self._held[key_id] += weight
        self._idle.clear()
        try:
            try:
                async with asyncio.timeout(self._max_wait_s):
                    await self._enter(key_id, weight)
            except TimeoutError:
                raise Overloaded("The server stayed full; try again in a moment.", _RETRY_AFTER_S) from None
            try:
                yield
            finally:
                self.in_flight -= weight
                self._wake()
        finally:
            self._held[key_id] -= weight
            if not self._held[key_id]:
                del self._held[key_id]
            if not self._held:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Until nobody holds or waits for a slot."""
        await self._idle.wait()

    async def _enter(self, key_id: str, weight: int) -> None:
        if not self._queues and self.in_flight + weight <= self._max_in_flight:
            self.in_flight += weight
            return
        if self.queued >= self._max_queued:
            raise Overloaded("The server is full; try again in a moment.", _RETRY_AFTER_S)
        waiter = _Waiter(weight)
        self._queues.setdefault(key_id, deque()).append(waiter)
        self.queued += 1
        try:
            await waiter.ready
        except asyncio.CancelledError:
            if waiter.ready.cancelled():
                self._leave(key_id, waiter)
            else:  # the slot was given and the caller left in the same moment
                self.in_flight -= weight
            self._wake()
            raise

    def _leave(self, key_id: str, waiter: _Waiter) -> None:
        """Take a waiter out of the queue, wherever it stands; nothing happens when it is out already."""
        queue = self._queues.get(key_id)
        if queue is None or waiter not in queue:
            return
        queue.remove(waiter)
        self.queued -= 1
        if not queue:
            del self._queues[key_id]

    def _wake(self) -> None:
        """Let in whoever is next while there is room; keys take turns, each in its own order."""
        while self._queues:
            key_id, queue = next(iter(self._queues.items()))
            waiter = queue[0]
            if not waiter.ready.cancelled() and self.in_flight + waiter.weight > self._max_in_flight:
                return
            self._queues.move_to_end(key_id)
            self._leave(key_id, waiter)
            if not waiter.ready.cancelled():
                self.in_flight += waiter.weight
                waiter.ready.set_result(None)
