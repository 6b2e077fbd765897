"""Starting, joining and resuming answers; the routes only choose how to write them.

The life of an answer:
1. Refused at once when the gateway drains or the key or the queue is full; then planned, then a place is waited for.
2. What another gateway needs to continue it is stored, and the idempotency key, if one came, is made to stand for it.
3. Its jobs are submitted. If that fails, both records are taken off again.
4. Whoever comes with the same idempotency key, or with the answer's id, reads the same jobs from the first token on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import structlog

from services.gateway.deadline import Deadline
from services.gateway.errors import Draining, StreamNotFound
from services.gateway.gateway import Gateway
from services.gateway.generation import Generation, attached, submitted
from services.gateway.idempotency import KeyHeld, Record, Ticket
from services.gateway.metering import TokenMeter
from services.gateway.prepare import Plan
from services.gateway.presentation import Presentation
from services.gateway.schemas import ChatBody, CompletionBody
from shared.bus.stored import Claim, Held, StoredResponse
from shared.errors import Overloaded
from shared.protocol.position import Position
from shared.tasks import heed_cancellation

CLAIM_WAIT_S = 5.0
"""How long after a key was claimed its answer may take to be submitted; then the gateway that claimed it is gone."""
CLAIM_POLL_S = 0.1
MAX_CLAIMS = 4

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks: the id of the key, and the request's id that client and log share."""

    key_id: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A request to generate; `ticket` when it came with an idempotency key."""

    body: ChatBody | CompletionBody
    client: Client
    deadline: Deadline
    ticket: Ticket | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """An answer being read; `replayed`: it was asked for before with the same idempotency key."""

    plan: Plan
    generation: Generation
    replayed: bool = False


class Dispatcher:
    """Gives answers to read; leaving the context leaves the answer."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    @asynccontextmanager
    async def answer(self, asked: Asked) -> AsyncIterator[Running]:
        """A new answer, or the one its idempotency key stands for. Raises RequestError and CapacityError.

        A client that left while Redis was asked may have gone unnoticed there; it is seen before anything is awaited.
        """
        async with AsyncExitStack() as stack:
            if asked.ticket is None:
                running = await stack.enter_async_context(self._start(asked))
            else:
                running = await self._once(stack, asked, asked.ticket)
            heed_cancellation()
            yield running

    @asynccontextmanager
    async def resume(
        self, stored: StoredResponse, client: Client, shown: Presentation, after: Sequence[Position] = ()
    ) -> AsyncIterator[Running]:
        """A stored answer, for a client that has come to `after`. Raises StreamNotFound and CapacityError."""
        gateway = self._gateway
        self.refuse_when_draining()
        async with gateway.admission.joined(client.key_id, len(stored.request_ids)):
            settings = gateway.settings
            ttl_ms = int(1000 * (settings.request_timeout_s + settings.resume_ttl_s))

            async def restore() -> None:
                await gateway.responses.save(stored, ttl_ms)

            readers = attached(stored.request_ids, gateway.streams, stored.detachable, restore)
            async with Generation(readers, gateway.text.rules(shown), after=after) as generation:
                heed_cancellation()
                yield Running(Plan(stored.response_id, stored.created, shown, generation.jobs), generation)

    async def _once(self, stack: AsyncExitStack, asked: Asked, ticket: Ticket) -> Running:
        """Join what the key stands for, or start it; whoever claims the key first starts."""
        self.refuse_when_draining()
        held = await self._gateway.responses.look(ticket.digest)
        for _ in range(MAX_CLAIMS):
            if held is not None:
                ticket.check(held)
                running = await self._join(stack, asked, held)
                if running is not None:
                    return running
            try:
                return await stack.enter_async_context(self._start(asked, held))
            except KeyHeld as other:
                held = other.held
        raise Overloaded("Too many requests with this Idempotency-Key at once; try again in a moment.", retry_after=1)

    async def _join(self, stack: AsyncExitStack, asked: Asked, held: Held) -> Running | None:
        """The answer that a claim names; None when there is none, or when it ended because nobody read it."""
        until = time.monotonic() + CLAIM_WAIT_S - held.age_s
        while True:
            stored = await self._gateway.responses.load(held.claim.response_id)
            if stored is not None:
                async with AsyncExitStack() as attempt:
                    shown = Presentation.unpack(stored.presentation).streamed_for(asked.body)
                    try:
                        running = await attempt.enter_async_context(self.resume(stored, asked.client, shown))
                    except StreamNotFound:
                        pass
                    else:
                        if running.generation.was_abandoned:
                            return None
                        stack.push_async_exit(attempt.pop_all())
                        self._gateway.metrics.idempotent_joins.inc()
                        return replace(running, replayed=True)
            if time.monotonic() >= until:
                return None
            await asyncio.sleep(CLAIM_POLL_S)

    @asynccontextmanager
    async def _start(self, asked: Asked, instead_of: Held | None = None) -> AsyncIterator[Running]:
        """Plan, wait for a place, record, submit. Raises KeyHeld when the key was claimed meanwhile."""
        gateway, client, deadline = self._gateway, asked.client, asked.deadline
        self.refuse_when_draining()
        gateway.admission.check(client.key_id)
        plan = await gateway.planner.plan(asked.body, client.key_id)
        place = gateway.admission.slot(
            *(client.key_id, len(plan.jobs)), cost=plan.cost, priority=asked.body.priority, wait_s=deadline.left_s()
        )
        async with place as goes_first, AsyncExitStack() as stack:
            plan = gateway.planner.put_first(plan) if goes_first else plan
            plan = replace(plan, jobs=deadline.bound(plan.jobs))
            record = await self._record(plan, asked, instead_of)
            meter = TokenMeter(gateway.metrics, deadline.arrived)
            readers = submitted(plan.jobs, gateway.streams, meter, asked.ticket is not None, record.write_again)
            try:
                generation = await stack.enter_async_context(Generation(readers, gateway.text.rules(plan.shown), meter))
            except BaseException:
                await record.forget()
                raise
            self._log_submitted(plan, client)
            yield Running(plan, generation)

    async def _record(self, plan: Plan, asked: Asked, instead_of: Held | None) -> Record:
        """Store what a joining or resuming client needs. Raises KeyHeld and BusUnavailable."""
        gateway, ticket = self._gateway, asked.ticket
        ids = tuple(job.request_id for job in plan.jobs)
        ttl_ms = max(job.budget_ms for job in plan.jobs) + int(1000 * gateway.settings.resume_ttl_s)
        stored = StoredResponse(
            plan.response_id, plan.created, asked.client.key_id, ids, ticket is not None, plan.shown.pack()
        )
        claim = None if ticket is None else Claim(plan.response_id, ticket.fingerprint, ttl_ms)
        record = Record(gateway.responses, stored, ttl_ms, ticket, claim)
        await record.write(instead_of)
        return record

    def refuse_when_draining(self) -> None:
        """Raises Draining."""
        if self._gateway.cluster.draining:
            raise Draining("This gateway is shutting down; send the request to another or try again.", retry_after=2)

    def _log_submitted(self, plan: Plan, client: Client) -> None:
        """The one line that links the client's request id to the ids of its jobs on the bus."""
        jobs = [job.request_id for job in plan.jobs]
        _log.info(
            "request_submitted",
            **{"request_id": client.request_id, "response_id": plan.response_id, "key_id": client.key_id, "jobs": jobs},
        )
