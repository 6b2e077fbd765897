"""Slots for running requests: a bound on what is submitted, and a fair queue before it.

Work streams in Redis are first come, first served, so whatever goes there in excess of what the workers can run makes
the next key's request wait behind it. Hence the bound follows the workers (`resize`), the queue is kept here, and
`fairness` says who is next. Back-pressure towards clients happens here only.

A newcomer (`fairness`) does not wait for somebody's generation to end: a reserve of slots above the limit is for
newcomers only, and whoever goes as one while others run is told so, to be put before them on the workers. What it takes
it owes, so no key stays a newcomer, and one with more than its share never is: nobody starves.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from services.gateway.errors import DeadlineExceeded, RateLimited
from services.gateway.fairness import FairQueue, Ticket
from services.gateway.pace import Pace
from shared.errors import CapacityError, InvalidRequest, Overloaded

RESERVE_SHARE = 8
"""One slot of the reserve for so many below the limit, and at least one."""

_Turn = asyncio.Future[bool]
_Waiter = tuple[int, _Turn]


@dataclass(frozen=True, slots=True)
class Share:
    """What one key may have: `weight` against other keys, and prompts served or waiting at once (None: as all)."""

    weight: float = 1.0
    max_in_flight: int | None = None


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds of one gateway, in prompts for those in flight and in requests for those in the queue."""

    max_in_flight: int
    max_per_key: int
    max_queued: int
    max_queued_per_key: int
    max_wait_s: float


def _alike(_key_id: str) -> Share:
    return Share()


def _unwatched(_seconds: float) -> None:
    pass


class Admission:
    """Counts slots in use, by key and in total. A request of k prompts takes k slots.

    `limit` bounds what is let in, `limit_of_newcomers` the same and the reserve; neither is above the operator's bound.
    Owned by one event loop; every change happens between awaits. `share_of` knows the keys, `on_wait` is told how
    long each admitted request waited, in seconds.
    """

    def __init__(
        self,
        limits: AdmissionLimits,
        share_of: Callable[[str], Share] = _alike,
        on_wait: Callable[[float], None] = _unwatched,
        pace: Pace | None = None,
    ) -> None:
        self._limits = limits
        self._share_of = share_of
        self._on_wait = on_wait
        self._pace = pace or Pace()
        self._queue: FairQueue[_Waiter] = FairQueue()
        self._held: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self.limit = self.limit_of_newcomers = limits.max_in_flight
        self.in_flight = 0

    @property
    def queued(self) -> int:
        return len(self._queue)

    def resize(self, room: int | None) -> None:
        """Follow the workers: let in at most `room` prompts at once; None when they do not say how many they run."""
        most = self._limits.max_in_flight
        self.limit = most if room is None else max(1, min(room, most))
        self.limit_of_newcomers = min(self.limit + max(1, self.limit // RESERVE_SHARE), most)
        self._admit()

    def check(self, key_id: str) -> None:
        """Refuse early what `slot` would refuse anyway. Raises RateLimited, Overloaded."""
        self._check_key(key_id, 1, self._share_of(key_id))
        if not self._goes_at_once(key_id, 1):
            self._check_queue(key_id)

    @asynccontextmanager
    async def slot(
        self, key_id: str, weight: int = 1, *, cost: float = 0, priority: int = 0, wait_s: float | None = None
    ) -> AsyncIterator[bool]:
        """Hold `weight` slots; waits for its turn when they are not free. `cost` (in tokens) is what the turn costs.

        Gives whether the request should go before others on the workers: a newcomer's, while others run.

        Raises RateLimited when the key has its share already, Overloaded when the queue is full, the wait too long
        or longer than `wait_s` as far as can be told, DeadlineExceeded when `wait_s` is over, InvalidRequest when it
        could never fit.
        """
        share = self._share_of(key_id)
        most = min(self._limits.max_in_flight, self._key_limit(share))
        if weight > most:
            raise InvalidRequest(f"A request may have at most {most} prompts here, it has {weight}.", "prompt")
        self._check_key(key_id, weight, share)
        if not self._goes_at_once(key_id, weight):
            self._check_queue(key_id)
            self._check_wait(key_id, share, wait_s)
        with self._counted(key_id, weight):
            ticket = self._queue.push(
                (weight, asyncio.get_running_loop().create_future()),
                *(key_id, max(cost, weight), share.weight, priority),
            )
            self._admit()
            goes_first = await self._turn(ticket, wait_s)
            try:
                yield goes_first
            finally:
                self.in_flight -= weight
                self._pace.count()
                self._admit()

    @asynccontextmanager
    async def joined(self, key_id: str, weight: int = 1) -> AsyncIterator[None]:
        """Count a reader of a generation that was admitted before; it never queues and takes no room from others.

        Raises RateLimited when the key has its share already.
        """
        self._check_key(key_id, weight, self._share_of(key_id))
        with self._counted(key_id, weight):
            yield

    def refuse_waiting(self, why: Callable[[], CapacityError]) -> None:
        """Send everybody in the queue away, each with an error of its own; who was let in stays."""
        while (ticket := self._queue.peek()) is not None:
            self._queue.pop()
            _, turn = ticket.item
            if not turn.done():
                turn.set_exception(why())

    async def wait_idle(self) -> None:
        """Until nobody holds or waits for a slot, or reads a generation joined."""
        await self._idle.wait()

    def _check_key(self, key_id: str, weight: int, share: Share) -> None:
        if self._held[key_id] + weight > self._key_limit(share):
            retry_after = self._pace.retry_after(self._queue.waiting(key_id))
            raise RateLimited("Too many requests at once for this key; wait for one to end.", retry_after)

    def _check_queue(self, key_id: str) -> None:
        waiting = self._queue.waiting(key_id)
        if waiting >= self._limits.max_queued_per_key:
            message = "Too many requests of this key are waiting; wait for one to end."
            raise RateLimited(message, self._pace.retry_after(waiting))
        if self.queued >= self._limits.max_queued:
            raise Overloaded("The server is full; try again in a moment.", self._pace.retry_after(self.queued))

    def _check_wait(self, key_id: str, share: Share, wait_s: float | None) -> None:
        """Do not queue for nothing: a request that would be past its deadline is told now."""
        ahead = self._queue.ahead(key_id, share.weight)
        if wait_s is not None and self._pace.wait_s(ahead) > wait_s:
            message = "The queue is longer than the request's timeout allows; try again later or allow more time."
            raise Overloaded(message, self._pace.retry_after(ahead))

    def _key_limit(self, share: Share) -> int:
        return self._limits.max_per_key if share.max_in_flight is None else share.max_in_flight

    @contextmanager
    def _counted(self, key_id: str, weight: int) -> Iterator[None]:
        self._held[key_id] += weight
        self._idle.clear()
        try:
            yield
        finally:
            self._held[key_id] -= weight
            if not self._held[key_id]:
                del self._held[key_id]
            if not self._held:
                self._idle.set()

    async def _turn(self, ticket: Ticket[_Waiter], wait_s: float | None) -> bool:
        """Wait until `_admit` has let the request in; on any failure it is out of queue and slots again.

        Gives what `slot` gives.
        """
        began = time.monotonic()
        weight, turn = ticket.item
        is_own = wait_s is not None and wait_s < self._limits.max_wait_s
        try:
            async with asyncio.timeout(wait_s if is_own else self._limits.max_wait_s):
                goes_first = await turn
        except BaseException as exc:
            self._queue.remove(ticket)
            if was_let_in(turn):  # and the caller left in the same moment
                self.in_flight -= weight
            self._admit()
            if not isinstance(exc, TimeoutError):
                raise
            if is_own:
                raise DeadlineExceeded("The request's timeout was over before there was room for it.") from None
            raise Overloaded("The server stayed full; try again in a moment.", self._pace.retry_after(1)) from None
        self._on_wait(time.monotonic() - began)
        return goes_first

    def _fits(self, weight: int, *, is_newcomer: bool) -> bool:
        """A request of more prompts than the workers have room for now goes when nothing else runs."""
        if is_newcomer and self.in_flight + weight <= self.limit_of_newcomers:
            return True
        return self.in_flight + min(weight, self.limit) <= self.limit

    def _goes_at_once(self, key_id: str, weight: int) -> bool:
        """Whether a request that the key would bring now would not have to wait."""
        is_newcomer = self._queue.is_newcomer(key_id)
        first = self._queue.peek()
        if first is not None and (not is_newcomer or self._queue.is_newcomer(first.flow)):
            return False
        return self._fits(weight, is_newcomer=is_newcomer)

    def _admit(self) -> None:
        """Let in whoever is next while there is room. Nobody overtakes a request that waits for several slots."""
        while (ticket := self._queue.peek()) is not None:
            weight, turn = ticket.item
            is_newcomer = self._queue.is_newcomer(ticket.flow)
            if turn.cancelled():
                self._queue.remove(ticket)
            elif self._fits(weight, is_newcomer=is_newcomer):
                self._queue.pop()
                turn.set_result(is_newcomer and self.in_flight > 0)
                self.in_flight += weight
            else:
                return
        if not self.in_flight:
            self._queue.forget()


def was_let_in(turn: _Turn) -> bool:
    return turn.done() and not turn.cancelled() and turn.exception() is None
