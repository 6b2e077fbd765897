"""The gateway's side of a request: submit it, and yield its tokens until the one terminal event.

The life of a request here:
1. The feed is subscribed before anything is submitted.
2. `open` registers the request and runs `submit`.
3. Entries from pub/sub that continue what was delivered go to the client at once.
4. A gap, or `silence_s` without an entry: the journal is read, which also keeps the request alive.
5. Redis forgot the request: it is submitted again with what the client already has.
6. The journal contradicts what the client has: `repair`.
7. A cancel is repeated until the terminal entry, also when nobody reads any more.
8. Nothing waits for ever: Redis out of reach for `patience_s`, or the time budget, ends it here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import structlog
from redis.exceptions import RedisError

from shared.bus.delivery import Delivery, Verdict
from shared.bus.events import EventFeed, Resubscribed
from shared.bus.requests import RequestStore
from shared.bus.results import CANCEL_GONE, Conflict, Polled
from shared.errors import BusUnavailable, ProtocolError
from shared.protocol.messages import OUTCOME_CANCELLED, OUTCOME_ERROR, End, Job, Tokens
from shared.tasks import end_tasks

SILENCE_S = 2.0
PATIENCE_S = 60.0
BUDGET_GRACE_S = 5.0
TICK_S = 0.25
CANCEL_REPEAT_S = 0.5
MAX_RESUBMITS = 10
MAX_REPAIRS = 10
MAX_RECOVERING = 32

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Cancel:
    reason: str
    force: bool
    stops: Mapping[int, int]


@dataclass(slots=True)
class StreamCounters:
    """Plain counts for the metrics page."""

    replays: int = 0
    resubmits: int = 0
    repairs: int = 0
    resubscribes: int = 0


class StreamHandle:
    """Events of one request: async-iterate it for validated Tokens in order, then exactly one End."""

    def __init__(self, job: Job, nudge: asyncio.Event) -> None:
        now = time.monotonic()
        self.job = job
        self.last_event_id = ""
        self._delivery = Delivery(job.params.n)
        self._wake = asyncio.Event()
        self._nudge = nudge
        self._cancel: _Cancel | None = None
        self._opened = self._heard = self._reached = now
        self._cancel_sent = 0.0
        self._busy = False
        self._doubt = False
        self._resubmits = self._repairs = self._adoptions = 0
        self._taken = False

    @property
    def request_id(self) -> str:
        return self.job.request_id

    @property
    def epoch(self) -> int:
        """Highest epoch seen; above 1 it was resumed at least once."""
        return self._delivery.emax

    @property
    def ended(self) -> bool:
        return self._delivery.end is not None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Tokens | End:
        while not self._delivery.out:
            if self._taken:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        self.last_event_id, event = self._delivery.out.popleft()
        self._taken = isinstance(event, End)
        return event

    async def cancel(self, reason: str, force: bool = False, upto: int | Mapping[int, int] | None = None) -> None:
        """End the request, or with `upto` {choice: length} just these choices (a stop string), soon.

        `force` ends it at once instead of at its owner's next write; a plain number is choice 0's
        length. It is sent, and repeated until the terminal event, in the background. Keep iterating
        for the End, or forget the handle.
        """
        stops = {0: upto} if isinstance(upto, int) else dict(upto or {})
        held = self._cancel
        if held is not None and not held.stops and (stops or held.force or not force):
            return
        self._cancel = _Cancel(reason, force, {**held.stops, **stops} if held is not None and stops else stops)
        self._cancel_sent = 0.0
        self._nudge.set()

    @property
    def _wants_cancel(self) -> bool:
        """Whether a cancel has still something to do: single choices that finished need none."""
        if self._cancel is None or self.ended:
            return False
        return not self._cancel.stops or bool(self._open_stops())

    def _open_stops(self) -> dict[int, tuple[int, str]]:
        """{choice: (length, chain hash)} of the stop strings Redis has not confirmed yet."""
        stops = self._cancel.stops if self._cancel is not None else {}
        choices = self._delivery.choices
        return {c: (n, choices[c].hash_at(n)) for c, n in stops.items() if choices[c].finish is None}

    def _end(self, outcome: str, code: str, message: str) -> None:
        self._delivery.close(End(outcome, code, message))
        self._wake.set()

    def _is_due(self, now: float, silence_s: float) -> bool:
        if self._busy:
            return False
        if self._wants_cancel and now - self._cancel_sent >= CANCEL_REPEAT_S:
            return True
        return self._doubt or now - self._heard >= silence_s


@dataclass(slots=True)
class _Loops:
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    recoveries: set[asyncio.Task[None]] = field(default_factory=set)


class RequestStreams:
    """All open requests of one gateway; an async context manager around its two background loops."""

    def __init__(
        self,
        store: RequestStore,
        feed: EventFeed,
        gateway_id: str,
        *,
        silence_s: float = SILENCE_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.counters = StreamCounters()
        self._store = store
        self._feed = feed
        self._gateway = gateway_id
        self._silence_s = silence_s
        self._patience_s = patience_s
        self._handles: dict[str, StreamHandle] = {}
        self._slots = asyncio.Semaphore(MAX_RECOVERING)
        self._nudge = asyncio.Event()
        self._loops = _Loops()

    def __len__(self) -> int:
        return len(self._handles)

    async def __aenter__(self) -> Self:
        await self._feed.subscribe()
        self._loops.tasks = [asyncio.create_task(self._forever(loop)) for loop in (self._listen, self._keep)]
        return self

    async def __aexit__(self, *_: object) -> None:
        await end_tasks([*self._loops.tasks, *self._loops.recoveries])
        await self._feed.aclose()
        for handle in self._handles.values():
            handle._end(OUTCOME_ERROR, "gateway_stopped", "The gateway stopped.")
        self._handles.clear()

    async def open(self, job: Job) -> StreamHandle:
        """Submit a request and return its events.

        Raises BusUnavailable; the request is then cancelled in the background, in case it got through.
        """
        if job.request_id in self._handles:
            raise ProtocolError(f"request id {job.request_id} is in use")
        handle = StreamHandle(job, self._nudge)
        self._handles[job.request_id] = handle
        try:
            answer = await self._store.submit(job)
        except (RedisError, OSError) as error:
            await handle.cancel("submit_failed", force=True)
            raise BusUnavailable(f"Redis did not take the request: {type(error).__name__}") from error
        except asyncio.CancelledError:
            await handle.cancel("client_gone", force=True)
            raise
        if isinstance(answer, Conflict):
            del self._handles[job.request_id]
            raise ProtocolError(f"request id {job.request_id} is in use by gateway {answer.gateway}")
        return handle

    async def adopt(self, request_id: str) -> StreamHandle | None:
        """Take over a request of a gateway that is gone: its events from the first token on; None: it is unknown."""
        if request_id in self._handles:
            return None
        try:
            found = await self._store.adopt(request_id, self._gateway)
        except (RedisError, OSError) as error:
            raise BusUnavailable(f"Redis did not answer: {type(error).__name__}") from error
        if found is None:
            return None
        job, polled = found
        handle = StreamHandle(replace(job, gateway=self._gateway), self._nudge)
        handle._adoptions = 1
        self._handles[request_id] = handle
        self._judge(handle, handle._delivery.replay(polled.entries))
        return handle

    async def _forever(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a background loop again after a fault of ours: no stream may wait on a loop that died."""
        while True:
            try:
                await loop()
            except Exception:
                _log.exception("stream_loop_failed", loop=loop.__name__)
                for handle in self._handles.values():
                    handle._doubt = True
                await asyncio.sleep(TICK_S)

    async def _listen(self) -> None:
        async for batch in self._feed:
            if isinstance(batch, Resubscribed):
                self.counters.resubscribes += 1
                for handle in self._handles.values():
                    handle._doubt = True
                self._nudge.set()
                continue
            for request_id, entry in batch:
                handle_ = self._handles.get(request_id)
                if handle_ is not None:
                    self._judge(handle_, handle_._delivery.accept(entry))

    def _judge(self, handle: StreamHandle, verdict: Verdict) -> None:
        """After the delivery took something: wake the reader, or have the journal read."""
        handle._heard = time.monotonic()
        if verdict is not Verdict.TAKEN:
            handle._doubt = True
            self._nudge.set()
        if handle._delivery.out:
            handle._wake.set()
        if handle.ended:
            self._handles.pop(handle.request_id, None)

    async def _keep(self) -> None:
        """Start a recovery for every handle that needs one."""
        while True:
            try:
                async with asyncio.timeout(TICK_S):
                    await self._nudge.wait()
            except TimeoutError:
                pass
            self._nudge.clear()
            now = time.monotonic()
            for handle in list(self._handles.values()):
                if handle._is_due(now, self._silence_s):
                    handle._busy = True
                    task = asyncio.create_task(self._recover(handle))
                    self._loops.recoveries.add(task)
                    task.add_done_callback(self._loops.recoveries.discard)

    async def _recover(self, handle: StreamHandle) -> None:
        try:
            async with self._slots:
                handle._doubt = False
                await self._send_cancel(handle)
                await self._read_journal(handle)
                handle._reached = handle._heard = time.monotonic()
        except (RedisError, OSError) as error:
            _log.warning("journal_unreachable", request_id=handle.request_id, error=type(error).__name__)
            handle._heard = time.monotonic()
        except ProtocolError as error:
            _log.error("journal_unreadable", request_id=handle.request_id, error=str(error)[:200])
            handle._end(OUTCOME_ERROR, "protocol_error", "The request's journal cannot be read.")
        except Exception:
            _log.exception("stream_recovery_failed", request_id=handle.request_id)
            handle._end(OUTCOME_ERROR, "internal_error", "The gateway failed to follow the request.")
        finally:
            handle._busy = False
        self._give_up(handle)

    async def _send_cancel(self, handle: StreamHandle) -> None:
        cancel = handle._cancel
        now = time.monotonic()
        if cancel is None or not handle._wants_cancel or now - handle._cancel_sent < CANCEL_REPEAT_S:
            return
        handle._cancel_sent = now
        stops = handle._open_stops()
        answer = await self._store.cancel(
            handle.request_id, cancel.reason, force=cancel.force, upto=stops or None, gateway=self._gateway
        )
        if answer == CANCEL_GONE and not stops:
            handle._end(OUTCOME_CANCELLED, cancel.reason, "")

    async def _read_journal(self, handle: StreamHandle) -> None:
        if handle.ended:
            return
        self.counters.replays += 1
        polled = await self._store.poll(handle.request_id, self._gateway)
        if polled is None:
            await self._resubmit(handle)
        elif polled.gateway != self._gateway:
            await self._reclaim(handle)
        else:
            verdict = handle._delivery.replay(polled.entries)
            if verdict is Verdict.CONFLICT:
                await self._repair(handle, polled)
            self._judge(handle, Verdict.TAKEN)

    async def _reclaim(self, handle: StreamHandle) -> None:
        """The request's gateway is another: we lost it, or Redis lost that we adopted it."""
        if 0 < handle._adoptions <= MAX_REPAIRS:
            handle._adoptions += 1
            handle._doubt = await self._store.adopt(handle.request_id, self._gateway) is not None
            return
        handle._end(OUTCOME_CANCELLED, "adopted", "Another gateway took the request over.")

    async def _resubmit(self, handle: StreamHandle) -> None:
        """Redis forgot the request: submit it with what was delivered, and what is left of its time."""
        delivery = handle._delivery
        if handle._cancel is not None and not handle._cancel.stops:
            handle._end(OUTCOME_CANCELLED, handle._cancel.reason, "")
            return
        handle._resubmits += 1
        if handle._resubmits > MAX_RESUBMITS:
            handle._end(OUTCOME_ERROR, "bus_unavailable", "Redis forgot the request again and again.")
            return
        self.counters.resubmits += 1
        job = handle.job
        if job.budget_ms:
            job = replace(job, budget_ms=max(1, job.budget_ms - int(1000 * (time.monotonic() - handle._opened))))
        await self._store.submit(job, delivery.tokens, delivery.emax, delivery.finished)

    async def _repair(self, handle: StreamHandle, polled: Polled) -> None:
        delivery = handle._delivery
        handle._repairs += 1
        self.counters.repairs += 1
        _log.warning("journal_conflict", request_id=handle.request_id, epoch=polled.epoch, state=polled.state)
        if polled.state == "done" or handle._repairs > MAX_REPAIRS:
            handle._end(OUTCOME_ERROR, "stream_conflict", "The stream cannot be continued without changing it.")
            return
        await self._store.repair(handle.request_id, self._gateway, delivery.tokens, delivery.emax, delivery.finished)

    def _give_up(self, handle: StreamHandle) -> None:
        """End what can get no answer in any bounded time; forget what has ended."""
        now = time.monotonic()
        budget = handle.job.budget_ms / 1000
        if not handle.ended and budget and now - handle._opened > budget + BUDGET_GRACE_S:
            handle._end(OUTCOME_ERROR, "deadline_exceeded", "The request ran out of its time budget.")
        elif not handle.ended and now - handle._reached > self._patience_s:
            handle._end(OUTCOME_ERROR, "bus_unavailable", "Redis could not be reached.")
        if handle.ended:
            self._handles.pop(handle.request_id, None)
            handle._wake.set()
