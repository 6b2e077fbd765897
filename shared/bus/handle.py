"""One request as a gateway holds it, and the readers that share it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Self

from shared.bus.delivery import Delivery
from shared.protocol.messages import OUTCOME_CANCELLED, End, Job, Tokens
from shared.protocol.position import START

FOLLOW_S = 0.2
CANCEL_REPEAT_S = 0.5
ABANDONED = frozenset({"client_gone", "submit_failed", "orphaned"})
"""Reasons of a cancel that only mean that nobody waits for the answer; `orphaned` is the sweeper's."""


Restore = Callable[[], Awaitable[None]]
"""Raises BusUnavailable; may be repeated."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """What Redis has to be told: end the request, or with `stops` {choice: length} just these choices."""

    reason: str
    force: bool
    stops: Mapping[int, int]


class StreamHandle:
    """What was delivered of one request, who reads it here, and what Redis has yet to hear.

    `detachable`: it goes on without readers for a while instead of being cancelled when the last one leaves.
    `restore` writes again what Redis knew of it beside the request itself, before it is submitted again.
    `is_follower`: another gateway holds the request. `is_shared`: another one may follow it while it is ours.
    Written by `stream.RequestStreams`, apart from what the readers do through the methods here.
    """

    def __init__(
        self, job: Job, nudge: asyncio.Event, *, detachable: bool = False, restore: Restore | None = None
    ) -> None:
        now = time.monotonic()
        self.job = job
        self.detachable = detachable
        self.restore = restore
        self.delivery = Delivery(job.params.n)
        self.cancelling: Cancel | None = None
        self.cancel_sent = 0.0
        self.opened = self.heard = self.reached = self.left = now
        self.is_follower = self.is_shared = False
        self.busy = self.doubt = False
        self.resubmits = self.repairs = 0
        self._readers: set[StreamReader] = set()
        self._nudge = nudge
        self._wake = asyncio.Event()

    @property
    def request_id(self) -> str:
        return self.job.request_id

    @property
    def ended(self) -> bool:
        return self.delivery.end is not None

    @property
    def has_readers(self) -> bool:
        return bool(self._readers)

    @property
    def is_cancelled(self) -> bool:
        """The whole request is being cancelled."""
        return self.cancelling is not None and not self.cancelling.stops

    def reader(self) -> StreamReader:
        """A new reader, from the first event on."""
        reader = StreamReader(self)
        self._readers.add(reader)
        return reader

    def leave(self, reader: StreamReader, reason: str) -> None:
        """A reader goes; with the last one the request is cancelled, unless it is detachable or shared."""
        self._readers.discard(reader)
        if self._readers or self.ended:
            return
        self.left = time.monotonic()
        if not (self.detachable or self.is_shared or self.is_follower):
            self.cancel(reason, force=True)
        self._nudge.set()

    def cancel(self, reason: str, force: bool = False, stops: Mapping[int, int] | None = None) -> None:
        """Note a cancel; it is sent, and repeated until the terminal event, in the background."""
        held, stops = self.cancelling, dict(stops or {})
        if held is not None and not held.stops and (stops or held.force or not force):
            return
        self.cancelling = Cancel(reason, force, {**held.stops, **stops} if held is not None and stops else stops)
        self.cancel_sent = 0.0
        self._nudge.set()

    @property
    def wants_cancel(self) -> bool:
        """Whether a cancel has still something to do: single choices that finished need none."""
        if self.cancelling is None or self.ended:
            return False
        return not self.cancelling.stops or bool(self.open_stops())

    def open_stops(self) -> dict[int, tuple[int, str]]:
        """{choice: (length, chain hash)} of the stop strings Redis has not confirmed yet."""
        stops = self.cancelling.stops if self.cancelling is not None else {}
        choices = self.delivery.choices
        return {c: (n, choices[c].hash_at(n)) for c, n in stops.items() if choices[c].finish is None}

    def is_due(self, now: float, silence_s: float) -> bool:
        """Whether Redis has to be asked or told something now."""
        if self.busy:
            return False
        if self.wants_cancel and now - self.cancel_sent >= CANCEL_REPEAT_S:
            return True
        return self.doubt or now - self.heard >= (FOLLOW_S if self.is_follower else silence_s)

    def end(self, outcome: str, code: str, message: str) -> None:
        """End it here, for all readers."""
        self.delivery.close(End(outcome, code, message))
        self.wake()

    def wake(self) -> None:
        """Let the readers look for news."""
        self._wake.set()
        for reader in self._readers:
            reader.hear()

    async def news(self) -> None:
        """Until somebody calls `wake`."""
        self._wake.clear()
        await self._wake.wait()


class StreamReader:
    """Events of one request: async-iterate it for validated Tokens in order, then exactly one End.

    Or `take` what is there, and be told by `on_news` when to look again: that costs no task. `position` is that of the
    last event taken. Call `leave` when done, also after the End.
    """

    def __init__(self, handle: StreamHandle) -> None:
        self._handle = handle
        self._taken = 0
        self._tell: Callable[[], None] | None = None
        self.position = START

    @property
    def job(self) -> Job:
        return self._handle.job

    @property
    def epoch(self) -> int:
        """Highest epoch seen; above 2 it was migrated at least once."""
        return self._handle.delivery.emax

    @property
    def end(self) -> End | None:
        """How the request ended, as soon as it is known here, though this reader may not have come so far."""
        return self._handle.delivery.end

    @property
    def was_abandoned(self) -> bool:
        """It was cancelled before its end because nobody read it."""
        end = self.end
        is_cut = end is not None and end.outcome == OUTCOME_CANCELLED and not self._handle.delivery.is_complete
        return is_cut and end is not None and end.code in ABANDONED

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Tokens | End:
        while (event := self.take()) is None:
            if self._handle.ended:
                raise StopAsyncIteration
            await self._handle.news()
        return event

    def on_news(self, tell: Callable[[], None]) -> None:
        """Have `tell` called whenever there may be something to take; not for what is there already."""
        self._tell = tell

    def hear(self) -> None:
        """There may be something to take."""
        if self._tell is not None:
            self._tell()

    def take(self) -> Tokens | End | None:
        """The next event; None: there is none now, nor ever after the End."""
        history = self._handle.delivery.history
        if self._taken >= len(history):
            return None
        self.position, event = history[self._taken]
        self._taken += 1
        return event

    async def cancel(self, reason: str, force: bool = False, upto: int | Mapping[int, int] | None = None) -> None:
        """End the request, or with `upto` {choice: length} just these choices (a stop string), soon.

        `force` ends it at once instead of at its owner's next write; a plain number is choice 0's
        length. Keep iterating for the End, or leave.
        """
        self._handle.cancel(reason, force, {0: upto} if isinstance(upto, int) else upto)

    def leave(self, reason: str = "client_gone") -> None:
        """Read no more. The last reader's reason is why the request is cancelled, where it is."""
        self._handle.leave(self, reason)
