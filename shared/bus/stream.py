"""The gateway's side of its requests: submit them, or join them, and yield tokens until the one terminal event.

The life of a request here:
1. The feed is subscribed before anything is submitted.
2. `open` registers the request and runs `submit`; `attach` gives another reader, or takes it from another gateway.
3. Entries from pub/sub that continue what was delivered go to the readers at once.
4. A gap, or `silence_s` without an entry: the journal is read, which also keeps the request alive.
5. Redis forgot the request: it is submitted again with what was delivered.
6. The journal contradicts what was delivered: `repair`.
7. A cancel is repeated until the terminal entry, also when nobody reads any more.
8. Another gateway took the request: it is followed in the journal while it has readers here, and taken back when
   that gateway is gone.
9. Nothing waits for ever: Redis out of reach for `patience_s`, or the time budget, ends it here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Self

import structlog
from redis.exceptions import RedisError

from shared import faultpoints
from shared.bus.delivery import Verdict
from shared.bus.events import EventFeed, Resubscribed
from shared.bus.handle import CANCEL_REPEAT_S, Restore, StreamHandle, StreamReader
from shared.bus.requests import RequestStore
from shared.bus.results import CANCEL_GONE, Conflict, Polled
from shared.errors import BusUnavailable, ProtocolError
from shared.protocol.messages import OUTCOME_CANCELLED, OUTCOME_ERROR, Job
from shared.protocol.position import Position, Standing, standing
from shared.tasks import end_tasks

SILENCE_S = 2.0
PATIENCE_S = 60.0
RESUME_GRACE_S = 10.0
BUDGET_GRACE_S = 5.0
TICK_S = 0.1
MAX_RESUBMITS = 10
MAX_REPAIRS = 10
MAX_RECOVERING = 32

NOBODY = "nobody"
"""The gateway a request is given to when its last reader here leaves while others may follow it elsewhere."""

_log = structlog.get_logger()


@dataclass(slots=True)
class StreamCounters:
    """Plain counts for the metrics page."""

    replays: int = 0
    resubmits: int = 0
    repairs: int = 0
    resubscribes: int = 0


@dataclass(slots=True)
class _Loops:
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    recoveries: set[asyncio.Task[None]] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long, in seconds: a silent request is left alone, an unreachable Redis is borne, an unread one goes on."""

    silence_s: float = SILENCE_S
    patience_s: float = PATIENCE_S
    resume_grace_s: float = RESUME_GRACE_S


class RequestStreams:
    """All open requests of one gateway; an async context manager around its two background loops."""

    def __init__(self, store: RequestStore, feed: EventFeed, gateway_id: str, patience: Patience | None = None) -> None:
        self.counters = StreamCounters()
        self._store = store
        self._feed = feed
        self._gateway = gateway_id
        self._patience = patience or Patience()
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
            handle.end(OUTCOME_ERROR, "gateway_stopped", "The gateway stopped.")
        self._handles.clear()

    async def open(self, job: Job, *, detachable: bool = False, restore: Restore | None = None) -> StreamReader:
        """Submit a request and return its events. `restore` is called before it has to be submitted again.

        Raises BusUnavailable; the request is then cancelled in the background, in case it got through.
        """
        if job.request_id in self._handles:
            raise ProtocolError(f"request id {job.request_id} is in use")
        handle = StreamHandle(job, self._nudge, detachable=detachable, restore=restore)
        reader = handle.reader()
        self._handles[job.request_id] = handle
        try:
            answer = await self._store.submit(job)
        except (RedisError, OSError) as error:
            handle.cancel("submit_failed", force=True)
            reader.leave()
            raise BusUnavailable(f"Redis did not take the request: {type(error).__name__}") from error
        except asyncio.CancelledError:
            handle.cancel("client_gone", force=True)
            reader.leave()
            raise
        if isinstance(answer, Conflict):
            del self._handles[job.request_id]
            raise ProtocolError(f"request id {job.request_id} is in use by gateway {answer.gateway}")
        faultpoints.fault_point("gateway.submitted")
        return reader

    async def standing(self, request_id: str, num_choices: int, after: Position) -> Standing | None:
        """Whether a reader that has come to `after` can go on; None: the request is unknown. Changes nothing.

        Raises BusUnavailable, and ProtocolError for a journal that cannot be read.
        """
        try:
            polled = await self._store.poll(request_id, self._gateway)
        except (RedisError, OSError) as error:
            raise BusUnavailable(f"Redis did not answer: {type(error).__name__}") from error
        found = None if polled is None else standing(after, polled.entries, num_choices)
        handle = self._handles.get(request_id)
        if handle is None or found is Standing.KNOWN:
            return found
        # Redis lost it, or what came before a resubmission; this gateway remembers what it gave out.
        is_there = any(position == after for position, _ in handle.delivery.history)
        return Standing.KNOWN if is_there else found or Standing.LOST

    async def attach(
        self, request_id: str, *, detachable: bool = False, restore: Restore | None = None
    ) -> StreamReader | None:
        """Join a request from its first event on; this gateway holds it from now on. None: it is unknown.

        Whoever reads it at another gateway goes on reading there. A request that has ended is only read.
        Raises BusUnavailable.
        """
        try:
            found = await self._store.adopt(request_id, self._gateway)
        except (RedisError, OSError) as error:
            raise BusUnavailable(f"Redis did not answer: {type(error).__name__}") from error
        handle = self._handles.get(request_id)
        if found is None:
            return None if handle is None else handle.reader()
        job, polled = found
        if handle is None:
            mine = replace(job, gateway=self._gateway)
            handle = StreamHandle(mine, self._nudge, detachable=detachable, restore=restore)
            self._handles[request_id] = handle
        handle.is_follower = False
        handle.is_shared |= polled.held_elsewhere
        reader = handle.reader()
        self._judge(handle, handle.delivery.replay(polled.entries))
        return reader

    def let_go(self) -> int:
        """End every stream here with `draining`; the requests go on for whoever adopts them. Answers how many."""
        kept = [handle for handle in self._handles.values() if not handle.is_cancelled]
        for handle in kept:
            handle.end(OUTCOME_ERROR, "draining", "The gateway is shutting down; the request goes on without it.")
            del self._handles[handle.request_id]
        return len(kept)

    async def _forever(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a background loop again after a fault of ours: no stream may wait on a loop that died."""
        while True:
            try:
                await loop()
            except Exception:
                _log.exception("stream_loop_failed", loop=loop.__name__)
                for handle in self._handles.values():
                    handle.doubt = True
                await asyncio.sleep(TICK_S)

    async def _listen(self) -> None:
        async for batch in self._feed:
            if isinstance(batch, Resubscribed):
                self.counters.resubscribes += 1
                for handle in self._handles.values():
                    handle.doubt = True
                self._nudge.set()
                continue
            for request_id, entry in batch:
                handle_ = self._handles.get(request_id)
                if handle_ is not None:
                    self._judge(handle_, handle_.delivery.accept(entry))

    def _judge(self, handle: StreamHandle, verdict: Verdict) -> None:
        """After the delivery took something: wake the readers, or have the journal read."""
        handle.heard = time.monotonic()
        if verdict is not Verdict.TAKEN:
            handle.doubt = True
            self._nudge.set()
        handle.wake()
        if handle.ended:
            self._forget(handle)

    def _forget(self, handle: StreamHandle) -> None:
        if self._handles.get(handle.request_id) is handle:
            del self._handles[handle.request_id]

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
                self._tend(handle, now)
                if handle.is_due(now, self._patience.silence_s):
                    handle.busy = True
                    task = asyncio.create_task(self._recover(handle))
                    self._loops.recoveries.add(task)
                    task.add_done_callback(self._loops.recoveries.discard)

    def _tend(self, handle: StreamHandle, now: float) -> None:
        """What becomes of a request that nobody reads here and nobody cancelled."""
        if handle.has_readers or handle.is_cancelled:
            return
        if handle.is_follower:
            self._forget(handle)
        elif handle.is_shared:
            handle.doubt = True
        elif now - handle.left >= self._patience.resume_grace_s:
            handle.cancel("client_gone", force=True)

    async def _recover(self, handle: StreamHandle) -> None:
        try:
            async with self._slots:
                handle.doubt = False
                await self._send_cancel(handle)
                await self._read_journal(handle)
                handle.reached = handle.heard = time.monotonic()
        except (RedisError, OSError, BusUnavailable) as error:
            _log.warning("journal_unreachable", request_id=handle.request_id, error=type(error).__name__)
            handle.heard = time.monotonic()
        except ProtocolError as error:
            _log.error("journal_unreadable", request_id=handle.request_id, error=str(error)[:200])
            handle.end(OUTCOME_ERROR, "protocol_error", "The request's journal cannot be read.")
        except Exception:
            _log.exception("stream_recovery_failed", request_id=handle.request_id)
            handle.end(OUTCOME_ERROR, "internal_error", "The gateway failed to follow the request.")
        finally:
            handle.busy = False
        self._give_up(handle)

    async def _send_cancel(self, handle: StreamHandle) -> None:
        cancel = handle.cancelling
        now = time.monotonic()
        if cancel is None or not handle.wants_cancel or now - handle.cancel_sent < CANCEL_REPEAT_S:
            return
        handle.cancel_sent = now
        stops = handle.open_stops()
        answer = await self._store.cancel(
            handle.request_id, cancel.reason, force=cancel.force, upto=stops or None, gateway=self._gateway
        )
        if answer == CANCEL_GONE and not stops:
            handle.end(OUTCOME_CANCELLED, cancel.reason, "")

    async def _read_journal(self, handle: StreamHandle) -> None:
        if handle.ended:
            return
        if handle.is_follower:
            await self._follow(handle)
        elif handle.is_shared and not handle.has_readers and not handle.is_cancelled:
            await self._release(handle)
        else:
            await self._replay(handle)

    async def _replay(self, handle: StreamHandle) -> None:
        self.counters.replays += 1
        polled = await self._store.poll(handle.request_id, self._gateway)
        if polled is None:
            await self._resubmit(handle)
        elif polled.gateway != self._gateway and polled.state != "done":
            handle.is_follower = True
            await self._follow(handle)
        else:
            if handle.delivery.replay(polled.entries) is Verdict.CONFLICT:
                await self._repair(handle, polled)
            self._judge(handle, Verdict.TAKEN)

    async def _follow(self, handle: StreamHandle) -> None:
        """Another gateway holds the request: read along, not keeping it alive; take it back when that one is gone."""
        if not handle.has_readers:
            self._forget(handle)
            return
        delivery = handle.delivery
        polled = await self._store.poll(handle.request_id, self._gateway, after=str(delivery.position))
        if polled is None:
            handle.is_follower = False
            await self._resubmit(handle)
            return
        if polled.state != "done" and not polled.held_elsewhere:
            handle.is_follower, handle.doubt = False, True
            await self._store.adopt(handle.request_id, self._gateway)
            return
        if delivery.follow(polled.entries) is Verdict.REPLAY:
            whole = await self._store.poll(handle.request_id, self._gateway)
            if whole is not None and delivery.replay(whole.entries) is Verdict.CONFLICT:
                handle.end(OUTCOME_ERROR, "stream_conflict", "The stream cannot be continued without changing it.")
        self._judge(handle, Verdict.TAKEN)

    async def _release(self, handle: StreamHandle) -> None:
        """Nobody reads it here any more, but others may elsewhere: leave it to them, or to the orphan grace."""
        await self._store.adopt(handle.request_id, NOBODY, held_by=self._gateway)
        if handle.has_readers:
            handle.doubt = True
        else:
            self._forget(handle)

    async def _resubmit(self, handle: StreamHandle) -> None:
        """Redis forgot the request: submit it with what was delivered, and what is left of its time."""
        delivery = handle.delivery
        if handle.cancelling is not None and handle.is_cancelled:
            handle.end(OUTCOME_CANCELLED, handle.cancelling.reason, "")
            return
        handle.resubmits += 1
        if handle.resubmits > MAX_RESUBMITS:
            handle.end(OUTCOME_ERROR, "bus_unavailable", "Redis forgot the request again and again.")
            return
        self.counters.resubmits += 1
        if handle.restore is not None:
            await handle.restore()
        job = handle.job
        if job.budget_ms:
            job = replace(job, budget_ms=max(1, job.budget_ms - int(1000 * (time.monotonic() - handle.opened))))
        await self._store.submit(job, delivery.tokens, delivery.emax, delivery.finished)

    async def _repair(self, handle: StreamHandle, polled: Polled) -> None:
        delivery = handle.delivery
        handle.repairs += 1
        self.counters.repairs += 1
        _log.warning("journal_conflict", request_id=handle.request_id, epoch=polled.epoch, state=polled.state)
        if polled.state == "done" or handle.repairs > MAX_REPAIRS:
            handle.end(OUTCOME_ERROR, "stream_conflict", "The stream cannot be continued without changing it.")
            return
        await self._store.repair(handle.request_id, self._gateway, delivery.tokens, delivery.emax, delivery.finished)

    def _give_up(self, handle: StreamHandle) -> None:
        """End what can get no answer in any bounded time; forget what has ended."""
        now = time.monotonic()
        budget = handle.job.budget_ms / 1000
        if not handle.ended and budget and now - handle.opened > budget + BUDGET_GRACE_S:
            handle.end(OUTCOME_ERROR, "deadline_exceeded", "The request ran out of its time budget.")
        elif not handle.ended and now - handle.reached > self._patience.patience_s:
            handle.end(OUTCOME_ERROR, "bus_unavailable", "Redis could not be reached.")
        if handle.ended:
            self._forget(handle)
            handle.wake()
