"""The prefill service. Life of one request here:

1. An entry of the work stream is claimed; `begin` makes this worker the owner and tells what was emitted before.
   Requests whose worker died before wait, unowned, until they can be computed alone (`shared.worker.probation`).
2. The engine allocates the whole prompt (cached prefix first) and computes it in chunks.
3. The hand-off is opened for export as soon as blocks are there, and offered to the decode workers when what is left
   to compute takes about as long as the transfer: frames stream while later chunks are computed.
4. The first token of each choice is sampled from the last row, journaled and published: time to first token does
   not wait for the hand-off.
5. The final frame carries the tokens; the decode worker verifies, commits and acknowledges.
6. Blocks are let go when request and reader have both let go; full ones stay as prefix cache.

A `touch` each second keeps the lease, hears of cancellation and of a lost owner or offer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import structlog

from services.prefill.pace import Pace
from shared import faultpoints
from shared.bus.requests import Append, Lease
from shared.bus.results import Appended, Begun, Refused
from shared.bus.workqueue import WorkItem
from shared.engine.engine import Engine, Output
from shared.engine.sequence import Sequence
from shared.protocol.journal import JournalState, fold
from shared.protocol.messages import PATH_PREFILL_ONLY, Job, Tokens, Usage
from shared.tasks import end_tasks, heed_cancellation
from shared.transfer.base import OUTCOME_ACKED, ExportKey
from shared.transfer.exporter import Export, Exporter
from shared.worker.context import WorkerContext
from shared.worker.handoff import HandoffRecord, OfferBlob
from shared.worker.jobs import overdue_finishes, prefill_sequence, tokens_event
from shared.worker.probation import Probation, Start

log = structlog.get_logger()

TOUCH_INTERVAL_S = 1.0
_MAX_COMPUTING = 16
_MAX_EXPRESS = 4
"""So many more of those that go first: they do not wait until a decode worker takes one that is computed."""


class Dropped(Exception):
    """The request is not this worker's any more (cancelled, finished or swept): let go of it."""


@dataclass(slots=True, eq=False)
class Handling:
    """One request this worker computes: its journal, its sequence, and the outputs that came for it."""

    job: Job
    lease: Lease
    state: JournalState
    sequence: Sequence
    export: Export
    start: Start
    computed: bool = False
    outputs: asyncio.Queue[Output] = field(default_factory=asyncio.Queue)
    offered: bool = False


class PrefillService:
    """Computes prompts and exports their KV. Implements `shared.worker.context.Service`."""

    def __init__(self, context: WorkerContext, exporter: Exporter) -> None:
        self._context = context
        self._exporter = exporter
        self._pace = Pace()
        self._outputs: dict[Sequence, asyncio.Queue[Output]] = {}
        self._begun: dict[Lease, str] = {}
        self._probation = Probation()
        self._releases: set[asyncio.Task[None]] = set()
        self._waiting_for_blocks = 0

    @property
    def addresses(self) -> tuple[tuple[str, str], ...]:
        return (("tcp", self._exporter.endpoint),)

    @property
    def in_flight(self) -> int:
        return len(self._begun)

    @property
    def engine(self) -> Engine:
        """For heartbeats, and for tests to look at."""
        return self._context.built.engine

    def requests(self) -> Iterable[tuple[str, str]]:
        return [(lease.request_id, gateway) for lease, gateway in self._begun.items()]

    def room(self, *, express: bool = False) -> int:
        """Claim only what can be computed soon, so that another prefill worker can have the rest.

        What goes first does not wait for what is pending here: it is computed before that.
        """
        pending = sum(sequence.num_pending for sequence in self._outputs)
        is_busy = pending >= self._context.engine_settings.max_num_batched_tokens and not express
        if self._waiting_for_blocks or self._probation.is_closed or is_busy:
            return 0
        most = _MAX_COMPUTING + (_MAX_EXPRESS if express else 0)
        return max(0, min(4, most - len(self._outputs)))

    async def run(self) -> None:
        """Route the engine's outputs to the requests they belong to."""
        while True:
            for step in await self._context.bridge.outputs():
                for output in step:
                    queue = self._outputs.get(output.sequence)
                    if queue is not None:
                        queue.put_nowait(output)

    async def handle(self, item: WorkItem) -> None:
        with self._probation.ask(suspect=int(item[2].get("deaths", "0")) > 0) as start:
            await start.admitted()
            await self._handle(item, start)

    async def _handle(self, item: WorkItem, start: Start) -> None:
        stream, entry, fields = item
        begun = await self._context.store.begin(stream, entry, fields["id"], self._context.worker_id)
        if not isinstance(begun, Begun):
            return
        self._begun[begun.lease] = begun.job.gateway
        try:
            faultpoints.fault_point("prefill.begun")
            await self._serve(begun, start)
        except* Dropped as group:
            log.info("request_dropped", request_id=begun.lease.request_id, reason=str(group.exceptions[0]))
        finally:
            del self._begun[begun.lease]

    async def hand_back(self) -> None:
        for lease in list(self._begun):
            await self._context.store.requeue(lease)

    async def _serve(self, begun: Begun, start: Start) -> None:
        job, state = begun.job, fold(begun.entries, begun.job.params.n)
        if not self._context.can_hold(job):
            await self._context.store.fail(begun.lease, "context_length_exceeded", "longer than this worker's KV cache")
            return
        overdue = overdue_finishes(job, state)
        if overdue:
            await self._append(begun.lease, overdue, Usage(path=PATH_PREFILL_ONLY))
            for event in overdue:
                state.choices[event.choice].accept(event)
            if state.is_finished:
                return
        sequence = prefill_sequence(job, state, self._context.scope)
        async with self._admitted(begun, state, sequence, start) as handling, asyncio.TaskGroup() as group:
            toucher = group.create_task(self._keep_touching(handling))
            await self._compute_and_hand_off(handling)
            await end_tasks([toucher])

    @asynccontextmanager
    async def _admitted(
        self, begun: Begun, state: JournalState, sequence: Sequence, start: Start
    ) -> AsyncIterator[Handling]:
        """The sequence in the engine with all its blocks, exported; both let go at the end, in any case."""
        bridge, queue = self._context.bridge, asyncio.Queue[Output]()
        self._outputs[sequence] = queue
        try:
            await bridge.call(lambda engine: engine.add(sequence))
            await self._wait_for_blocks(sequence, begun.lease)
            faultpoints.fault_point("prefill.blocks_allocated")
            blocks = await bridge.call(lambda engine: engine.retain_blocks(sequence), undo=Engine.release_blocks)
            key = ExportKey(begun.lease.request_id, begun.lease.epoch, begun.lease.nonce)
            export = self._exporter.open(key, blocks, len(sequence.tokens))
            handling = Handling(begun.job, begun.lease, state, sequence, export, start, outputs=queue)
            try:
                yield handling
            finally:
                export.abort("dropped")
                self._release_when_read(export, blocks)
        finally:
            del self._outputs[sequence]
            bridge.post(lambda engine: engine.free(sequence))

    async def _wait_for_blocks(self, sequence: Sequence, lease: Lease) -> None:
        self._waiting_for_blocks += 1
        try:
            while not sequence.block_ids:
                await self._context.bridge.progress(TOUCH_INTERVAL_S)
                touched = await self._context.store.touch(lease)
                if not touched.owner:
                    raise Dropped("lost while waiting for blocks")
                self._begun[lease] = touched.gateway
        finally:
            self._waiting_for_blocks -= 1

    def _release_when_read(self, export: Export, blocks: list[int]) -> None:
        """The in-flight reader is the blocks' second owner: they are reusable when it lets go too."""

        async def release() -> None:
            await export.released()
            self._context.bridge.post(lambda engine: engine.release_blocks(blocks))

        task = asyncio.create_task(release())
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _compute_and_hand_off(self, handling: Handling) -> None:
        sequence, export = handling.sequence, handling.export
        computed = sequence.num_cached
        export.progress(computed)
        await self._maybe_offer(handling, computed)
        while True:
            with self._pace.measure() as measured:
                output = await handling.outputs.get()
            measured(output.num_computed - computed)
            computed = output.num_computed
            if output.error:
                await self._context.store.fail(handling.lease, "internal_error", output.error)
                raise Dropped("failed")
            export.progress(computed)
            faultpoints.fault_point("prefill.chunk_exported")
            if computed >= len(sequence.tokens):
                break
            await self._maybe_offer(handling, computed)
        handling.computed = True
        emitted = await self._emit(handling, output)
        handling.start.over()
        record = HandoffRecord(tuple(emitted), sequence.num_cached, self._context.worker_id)
        export.finish(record.pack())
        faultpoints.fault_point("prefill.final_frame")
        outcome = await export.closed()
        faultpoints.fault_point("prefill.acknowledged")
        if outcome != OUTCOME_ACKED:
            log.warning("handoff_not_taken", request_id=handling.lease.request_id, outcome=outcome)
            await self._context.store.requeue(handling.lease)

    async def _emit(self, handling: Handling, output: Output) -> list[Tokens]:
        """Journal the first token of every choice; ends here when that was all the request wanted."""
        events = [
            tokens_event(handling.state, [sample], output.prompt_logprobs)
            for sample in output.samples
            if handling.state.choices[sample.choice].finish is None
        ]
        if events:
            usage = Usage(
                path=PATH_PREFILL_ONLY,
                prefill_cached_tokens=handling.sequence.num_cached,
                prefill_worker=self._context.worker_id,
            )
            await self._append(handling.lease, events, usage)
            faultpoints.fault_point("prefill.first_token_appended")
        return [replace(event, prompt_logprobs=()) for event in events]  # journaled; a long prompt's fill megabytes

    async def _append(self, lease: Lease, events: list[Tokens], usage: Usage) -> None:
        results = await self._context.store.append([Append(lease, event, usage) for event in events])
        for result in results:
            if not isinstance(result, Appended):
                raise Dropped(type(result).__name__.lower())
            if result.done:
                raise Dropped("finished")

    async def _maybe_offer(self, handling: Handling, computed: int) -> None:
        """Offer when the transfer would end with the computation; never for a request that ends at its first token."""
        remaining = len(handling.sequence.tokens) - computed
        num_bytes = len(handling.sequence.tokens) * self._context.built.layout.bytes_per_token
        last_chunk = remaining <= self._context.engine_settings.max_num_batched_tokens
        if handling.offered or not needs_decode(handling):
            return
        if last_chunk or self._pace.seconds(remaining) <= 2 * self._pace.transfer_seconds(num_bytes) + 0.05:
            await self._offer(handling)

    async def _offer(self, handling: Handling) -> None:
        blob = OfferBlob(len(handling.sequence.tokens), self._exporter.address)
        store, job = self._context.store, handling.job
        private = job.decode_stream if store.keys.is_private(job.decode_stream, job.model) else ""
        if isinstance(await store.offer(handling.lease, blob.pack(), private), Refused):
            raise Dropped("offer refused")
        handling.offered = True
        faultpoints.fault_point("prefill.offered")

    async def _keep_touching(self, handling: Handling) -> None:
        while True:
            await asyncio.sleep(TOUCH_INTERVAL_S)
            touched = await self._context.store.touch(handling.lease, computed=handling.computed)
            heed_cancellation()
            if not touched.owner or touched.cancel:
                if handling.export.num_readers:
                    continue  # the decode worker has committed and is about to acknowledge
                raise Dropped("cancelled" if touched.cancel else "owned by another")
            self._begun[handling.lease] = touched.gateway
            handling.export.renew()
            if handling.offered and not touched.offer_live:
                await self._offer(handling)


def needs_decode(handling: Handling) -> bool:
    """Whether any choice can want more than the one token that is sampled here, if one is."""
    sampled = 1 if handling.sequence.choices else 0
    tokens = (len(choice.tokens) for choice in handling.state.choices if choice.finish is None)
    return any(count + sampled < handling.job.params.max_tokens for count in tokens)
