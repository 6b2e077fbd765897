"""The order in which waiting requests go: fair shares between flows (API keys), priority within a flow.

Start-time fair queueing (Goyal, Vin & Cheng, SIGCOMM 1996), after the fair queueing of Demers, Keshav & Shenker
(SIGCOMM 1989), with several requests in service at once (Jin, Chase & Kaur, SIGMETRICS 2004). Each flow has a virtual
start time; the flow with the least goes next and its start moves on by cost / weight. Over any stretch in which two
flows both wait, what they were let in differs, weighted, by no more than one request of each.

Order goes by start and not by finish times, so that a request's cost counts only when it goes. This leaves a flow
free to reorder its own requests, which is what `priority` does: it never moves a flow before another.

A flow whose start is not past the virtual time has had no more than the others since it last waited. When a request
comes to it while none of its own waits, its turn is a newcomer's: the next one, before all turns of other kind.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """One waiting request; `item` is the caller's, `live` ends when it goes or leaves."""

    item: T
    flow: str
    cost: float
    live: bool = True


@dataclass(slots=True, eq=False)
class _Flow(Generic[T]):
    """`start` is the virtual time its next request goes at.

    `entry` is the number of its one valid place among the turns, 0 for none; `resting`: it has a place among the idle;
    `is_new`: its next turn is a newcomer's.
    """

    start: float
    weight: float = 1.0
    size: int = 0
    entry: int = 0
    resting: bool = False
    is_new: bool = False
    waiting: list[tuple[int, int, Ticket[T]]] = field(default_factory=list)


class FairQueue(Generic[T]):
    """Waiting requests of many flows. `push`, `pop` and `remove` take O(log n), amortised; no clock, no waiting."""

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[T]] = {}
        self._turns: list[tuple[float, bool, int, str]] = []
        self._idle: list[tuple[float, str]] = []
        self._now = 0.0
        self._count = 0
        self._weights = 0.0
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def waiting(self, flow: str) -> int:
        """How many requests of a flow wait."""
        known = self._flows.get(flow)
        return known.size if known is not None else 0

    def ahead(self, flow: str, weight: float) -> float:
        """About how many requests go before one that the flow would add now, at its share of the turns."""
        own = self.waiting(flow)
        others = self._weights - (self._flows[flow].weight if own else 0.0)
        return min(float(self.size), own * (1 + others / weight))

    def is_newcomer(self, flow: str) -> bool:
        """Whether the flow's next turn is a newcomer's; of one that does not wait, whether it would be."""
        known = self._flows.get(flow)
        return known is None or (known.is_new if known.size else known.start <= self._now)

    def push(self, item: T, flow: str, cost: float, weight: float = 1.0, priority: int = 0) -> Ticket[T]:
        """Queue a request; a lower `priority` goes first within its flow, then the one that came first."""
        if cost <= 0 or weight <= 0:
            raise ValueError("cost and weight must be positive")
        ticket = Ticket(item, flow, cost)
        is_new = not self.waiting(flow) and self.is_newcomer(flow)
        known = self._flows.get(flow)
        if known is None:
            known = self._flows[flow] = _Flow(self._now)
        self._weights += weight - (known.weight if known.size else 0.0)
        known.weight = weight
        known.size += 1
        self.size += 1
        heapq.heappush(known.waiting, (priority, self._next(), ticket))
        if is_new and (not known.is_new or known.start < self._now):
            known.start, known.is_new, known.entry = self._now, True, 0
        if not known.entry:
            self._schedule(flow, known)
        return ticket

    def peek(self) -> Ticket[T] | None:
        """The request that goes next."""
        while self._turns:
            *_, entry, flow = self._turns[0]
            known = self._flows.get(flow)
            if known is not None and known.entry == entry:
                if known.size:
                    while not known.waiting[0][2].live:
                        heapq.heappop(known.waiting)
                    return known.waiting[0][2]
                known.entry = 0
            heapq.heappop(self._turns)
        return None

    def pop(self) -> Ticket[T] | None:
        """Let the next request go and charge its flow."""
        ticket = self.peek()
        if ticket is None:
            return None
        known = self._flows[ticket.flow]
        heapq.heappop(self._turns)
        heapq.heappop(known.waiting)
        self._now = known.start
        known.start += ticket.cost / known.weight
        known.entry, known.is_new = 0, False
        self._forget(ticket, known)
        if known.size:
            self._schedule(ticket.flow, known)
        self._prune()
        return ticket

    def forget(self) -> None:
        """Nobody waits and nothing runs: what comes next begins anew, and nobody owes anything."""
        self._flows.clear()
        self._turns.clear()
        self._idle.clear()
        self._now = 0.0

    def remove(self, ticket: Ticket[T]) -> bool:
        """Take a request out without charging its flow; False when it went or left before."""
        if not ticket.live:
            return False
        known = self._flows[ticket.flow]
        self._forget(ticket, known)
        if len(known.waiting) > 2 * known.size + 8:
            known.waiting = [entry for entry in known.waiting if entry[2].live]
            heapq.heapify(known.waiting)
        return True

    def _forget(self, ticket: Ticket[T], known: _Flow[T]) -> None:
        ticket.live = False
        known.size -= 1
        self.size -= 1
        if not known.size:
            known.waiting.clear()
            self._weights -= known.weight
            self._rest(ticket.flow, known)
        if not self.size:
            self._weights = 0.0  # sums of floats do not come back to zero by themselves

    def _schedule(self, flow: str, known: _Flow[T]) -> None:
        known.entry = self._next()
        heapq.heappush(self._turns, (known.start, not known.is_new, known.entry, flow))

    def _rest(self, flow: str, known: _Flow[T]) -> None:
        if not known.resting:
            known.resting = True
            heapq.heappush(self._idle, (known.start, flow))

    def _prune(self) -> None:
        """Forget idle flows that owe nothing any more: as newcomers they would start at the same virtual time."""
        while self._idle and self._idle[0][0] <= self._now:
            _, flow = heapq.heappop(self._idle)
            known = self._flows[flow]
            known.resting = False
            if known.size:
                continue
            if known.start <= self._now:
                del self._flows[flow]
            else:
                self._rest(flow, known)

    def _next(self) -> int:
        self._count += 1
        return self._count
