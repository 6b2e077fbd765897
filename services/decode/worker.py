"""The decode service. Life of one request here:

1. An offer is claimed from the work stream; `take` reads what it is about, without owning it.
2. Blocks are reserved for the prompt and some growth; until they are free the offer waits, then it is handed back.
3. The KV is pulled while prefill still computes, and verified block by block. Then the request waits for its turn to
   start: one whose worker died before starts alone, until its first tokens are journaled (`shared.worker.probation`).
4. `commit` makes this worker the owner; only then anything is sampled. Where the KV did not arrive or did not verify,
   the request is committed all the same and computed here: path "recompute", with the reason.
5. Every engine step's tokens are journaled and published in one round trip, while the next step runs.
6. The last choice's finishing event ends the request; its blocks stay as prefix cache until their room is needed.

Whenever a script refuses, somebody else owns the request: the sequences are dropped and their blocks freed.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import structlog

from services.decode.journaling import Journaler
from services.decode.request import DecodeRequest
from shared import faultpoints
from shared.bus.results import Committed, Offer, Stale
from shared.bus.workqueue import WorkItem
from shared.engine.engine import Engine, Reservation
from shared.errors import ProtocolError, TransferError
from shared.protocol.journal import JournalState, fold
from shared.protocol.messages import PATH_RECOMPUTE, PATH_REMOTE, Tokens, Usage
from shared.transfer.base import ExportKey
from shared.transfer.importer import Importer
from shared.worker.context import WorkerContext
from shared.worker.handoff import HandoffRecord, OfferBlob, unpack_offer, unpack_record
from shared.worker.jobs import decode_sequences
from shared.worker.probation import Probation, Start

log = structlog.get_logger()

GROWTH_TOKENS = 64
_RETRY_RESERVE_S = 0.5
_RECHECK_OFFER_S = 2.0


@dataclass(slots=True)
class Counters:
    """How requests arrived here since the start; the gateway's metrics tell the same from each request's usage."""

    remote: int = 0
    recomputed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Arrival:
    """Outcome of a pull: the record that came with verified KV, or the reason to compute here."""

    record: HandoffRecord | None
    usage: Usage


class DecodeService:
    """Pulls KV, decodes, journals. Implements `shared.worker.context.Service`."""

    def __init__(self, context: WorkerContext, importer: Importer) -> None:
        self._context = context
        self._importer = importer
        self._journaler = Journaler(context.store, context.bridge)
        self._in_flight = 0
        self._probation = Probation()
        self._waiting_for_blocks = 0
        self.counters = Counters()

    @property
    def addresses(self) -> tuple[tuple[str, str], ...]:
        return ()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def engine(self) -> Engine:
        """For heartbeats, and for tests to look at."""
        return self._context.built.engine

    def requests(self) -> Iterable[tuple[str, str]]:
        return self._journaler.requests()

    def room(self, *, express: bool = False) -> int:
        """Claim while sequences fit, and never more than one offer that has to wait for blocks."""
        if self._waiting_for_blocks or self._probation.is_closed:
            return 0
        return max(0, min(8, self._context.engine_settings.max_num_seqs - self._in_flight))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._journaler.run())
            group.create_task(self._journaler.keep_touching())

    async def handle(self, item: WorkItem) -> None:
        stream, entry, fields = item
        offer = await self._context.store.take(stream, entry, fields["id"])
        if isinstance(offer, Stale):
            return
        faultpoints.fault_point("decode.taken")
        self._in_flight += 1
        try:
            await self._serve(offer)
        finally:
            self._in_flight -= 1

    async def hand_back(self) -> None:
        self._importer.drain()  # pulls cut off from here on leave their export for another worker
        await self._journaler.requeue_all()

    async def _serve(self, offer: Offer) -> None:
        started = time.monotonic()
        try:
            blob, state = unpack_offer(offer.address), fold(offer.entries, offer.job.params.n)
        except ProtocolError as error:
            log.error("offer_unreadable", request_id=offer.request_id, error=str(error))
            await self._context.store.strike(offer.stream, offer.entry, offer.request_id)
            return
        if not self._context.can_hold(offer.job):
            await self._refuse(offer)
            return
        reservation = None if state.is_finished else await self._reserve(offer, blob, state)
        if reservation is None:
            return
        with ExitStack() as unless_committed:
            unless_committed.callback(self._give_up, reservation)
            faultpoints.fault_point("decode.reserved")
            arrival = await self._pull(offer, blob, reservation)
            faultpoints.fault_point("decode.verified")
            with self._probation.ask(suspect=offer.deaths > 0) as start:
                if not await self._turn_to_start(offer, start):
                    return
                request = await self._commit(offer, state, reservation, arrival, started, start)
                if request is None:
                    return
                unless_committed.pop_all()
                await self._decode(request, reservation, arrival)

    async def _turn_to_start(self, offer: Offer, start: Start) -> bool:
        """Wait for the turn; False once the offer went stale meanwhile (cancelled, overdue, or taken back)."""
        while not await start.admitted(_RECHECK_OFFER_S):
            if isinstance(await self._context.store.take(offer.stream, offer.entry, offer.request_id), Stale):
                return False
        return True

    async def _refuse(self, offer: Offer) -> None:
        """End a request that would outgrow this worker's whole cache; to own it is the right to end it."""
        result = await self._context.store.commit(offer, f"{self._context.worker_id}:{secrets.token_hex(8)}", ())
        if isinstance(result, Committed):
            message = "longer than this worker's KV cache"
            await self._context.store.fail(result.lease, "context_length_exceeded", message)

    async def _reserve(self, offer: Offer, blob: OfferBlob, state: JournalState) -> Reservation | None:
        """Wait for room; None once the offer went stale or was handed to another worker."""
        sequences = decode_sequences(offer.job, state, self._context.scope)
        growth = min(GROWTH_TOKENS, offer.job.params.max_tokens)
        checked = time.monotonic()
        self._waiting_for_blocks += 1
        try:
            while True:
                reservation = await self._context.bridge.call(
                    lambda engine: engine.reserve(sequences, blob.num_tokens, growth),
                    undo=lambda engine, made: engine.cancel_reservation(made) if made else None,
                )
                if reservation is not None:
                    return reservation
                await self._context.bridge.progress(_RETRY_RESERVE_S)
                if time.monotonic() - checked > _RECHECK_OFFER_S:
                    checked = time.monotonic()
                    if not await self._is_worth_waiting(offer, blob.num_tokens + growth):
                        return None
        finally:
            self._waiting_for_blocks -= 1

    async def _is_worth_waiting(self, offer: Offer, num_tokens: int) -> bool:
        """False once the offer went stale, or was handed back because a peer has room for it now."""
        store = self._context.store
        if isinstance(await store.take(offer.stream, offer.entry, offer.request_id), Stale):
            return False
        for beat in await self._context.registry.live():
            peer = beat.role == "decode" and beat.model == self._context.model and beat.state == "ready"
            roomy = beat.kv_tokens - beat.kv_tokens_used >= num_tokens and not beat.waiting
            if peer and roomy and beat.worker_id != self._context.worker_id:
                await store.sweep(offer.stream, offer.entry, offer.request_id, False)
                return False
        return True

    async def _pull(self, offer: Offer, blob: OfferBlob, reservation: Reservation) -> Arrival:
        size = self._context.built.layout.block_size
        blocks = reservation.sequences[0].block_ids[: self._context.built.layout.num_blocks(blob.num_tokens)]
        key = ExportKey(offer.request_id, offer.epoch, offer.nonce)
        cached = reservation.num_cached
        usage = Usage(decode_cached_tokens=cached, decode_worker=self._context.worker_id)
        try:
            pulled = await self._importer.pull(blob.address, key, blob.num_tokens, blocks, cached // size)
            record = unpack_record(pulled.record)
        except (TransferError, ProtocolError) as error:
            reason = error.reason if isinstance(error, TransferError) else "record"
            log.warning("kv_not_received", request_id=offer.request_id, reason=reason)
            return Arrival(None, replace(usage, path=PATH_RECOMPUTE, reason=reason))
        return Arrival(
            record,
            replace(
                usage,
                path=PATH_REMOTE,
                transport=pulled.transport,
                kv_bytes=pulled.bytes_moved,
                prefill_cached_tokens=record.cached_tokens,
                prefill_worker=record.worker_id,
            ),
        )

    async def _commit(
        self,
        offer: Offer,
        state: JournalState,
        reservation: Reservation,
        arrival: Arrival,
        started: float,
        start: Start,
    ) -> DecodeRequest | None:
        """Become the owner; None when the offer is not valid any more or nothing is left to decode."""
        owner = f"{self._context.worker_id}:{secrets.token_hex(8)}"
        emitted = arrival.record.emitted if arrival.record else ()
        usage = replace(arrival.usage, handoff_ms=round((time.monotonic() - started) * 1000, 3))
        result = await self._context.store.commit(offer, owner, emitted, usage)
        if not isinstance(result, Committed):
            log.info("commit_refused", request_id=offer.request_id, result=type(result).__name__)
            return None
        faultpoints.fault_point("decode.committed")
        self._count(usage)
        state = await self._journaled(offer, state, emitted)
        for sequence in reservation.sequences:
            sequence.tokens[sequence.prompt_len :] = state.choices[sequence.choices[0]].tokens
        return DecodeRequest(offer.job, result.lease, state, usage, self._context.bridge, start)

    async def _journaled(self, offer: Offer, state: JournalState, emitted: tuple[Tokens, ...]) -> JournalState:
        """What the request holds now: beside what the offer told, the record's tokens, or without any the journal's.

        The journal is folded anew: a stop string may have cut a choice since, and what came before the cut does not
        continue what is left of it.
        """
        for event in emitted:
            state.choices[event.choice].accept(event)
        if emitted:
            return state
        polled = await self._context.store.poll(offer.request_id, offer.job.gateway)
        return state if polled is None else fold(polled.entries, offer.job.params.n)

    async def _decode(self, request: DecodeRequest, reservation: Reservation, arrival: Arrival) -> None:
        received = arrival.record is not None
        finished = {index for index, choice in enumerate(request.state.choices) if choice.finish is not None}
        request.sequences = [s for s in reservation.sequences if s.choices[0] not in finished]

        def start(engine: Engine) -> None:
            if received:
                engine.start_received(reservation)
            else:
                engine.start_recompute(reservation)
            for sequence in reservation.sequences:
                if sequence.choices[0] in finished:
                    engine.free(sequence)

        self._journaler.add(request)
        try:
            await self._context.bridge.call(start)
            await request.done
            if request.failure:
                await self._context.store.fail(request.lease, "internal_error", request.failure)
        finally:
            self._journaler.remove(request)
            self._context.bridge.post(lambda engine: engine.free_all(reservation.sequences))

    def _give_up(self, reservation: Reservation) -> None:
        self._context.bridge.post(lambda engine: engine.cancel_reservation(reservation))

    def _count(self, usage: Usage) -> None:
        if usage.path == PATH_REMOTE:
            self.counters.remote += 1
        else:
            self.counters.recomputed[usage.reason] = self.counters.recomputed.get(usage.reason, 0) + 1
