"""The scripts as the model calls them: every accepted command is held against a book of owners."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from redis.asyncio import Redis

from shared.bus.requests import RequestStore
from shared.bus.results import (
    Append,
    Appended,
    Begun,
    Behind,
    Committed,
    Conflict,
    Lease,
    Offer,
    Refused,
    Submitted,
    Touched,
)
from shared.protocol.messages import Job, Tokens

ORPHANED = "orphaned"


class Violation(AssertionError):
    """The protocol broke a promise."""


class Book:
    """A RequestStore that raises Violation when a command of somebody else than the owner is accepted.

    The book sees every reply, also those the caller never gets, so it knows the truth; it goes back
    with Redis when that loses writes.
    """

    def __init__(self, store: RequestStore, client: Redis) -> None:
        self.store = store
        self.owners: dict[str, str] = {}
        self._client = client

    async def submit(
        self, job: Job, tokens: list[list[int]], emax: int, finished: dict[int, str]
    ) -> Submitted | Conflict:
        answer = await self.store.submit(job, tokens, emax, finished)
        if isinstance(answer, Submitted):
            self.owners.pop(job.request_id, None)
        return answer

    async def cancel(self, request_id: str, gateway: str, force: bool) -> str:
        answer = await self.store.cancel(request_id, "test", force=force, gateway=gateway)
        if answer == "ended":
            self.owners.pop(request_id, None)
        return answer

    async def orphan(self, request_id: str, gateway: str, living: Collection[str]) -> None:
        """End a request whose gateway is gone, as a worker believes; nobody must hold it."""
        held: Any = await self._client.hget(self.store.keys.request(request_id), "gw")
        answer = await self.store.cancel(request_id, ORPHANED, force=True, gateway=gateway)
        if answer == "ended":
            if held.decode() in living:
                raise Violation(f"{request_id} was ended as an orphan of {gateway}, but {held.decode()} holds it")
            self.owners.pop(request_id, None)

    async def stop(self, request_id: str, gateway: str, stops: dict[int, tuple[int, str]]) -> str:
        answer = await self.store.cancel(request_id, "stop", upto=stops, gateway=gateway)
        await self._forget_if_done(request_id)
        return answer

    async def repair(
        self, request_id: str, gateway: str, tokens: list[list[int]], emax: int, finished: dict[int, str]
    ) -> bool:
        done = await self.store.repair(request_id, gateway, tokens, emax, finished)
        if done:
            self.owners.pop(request_id, None)
        return done

    async def sweep(self, stream: str, entry_id: str, request_id: str, counted: bool) -> str:
        outcome = await self.store.sweep(stream, entry_id, request_id, counted)
        if outcome in ("requeued", "ended", "dead"):
            self.owners.pop(request_id, None)
        return outcome

    async def begin(self, name: str, stream: str, entry_id: str, request_id: str, nonce: str) -> Any:
        begun = await self.store.begin(stream, entry_id, request_id, name, nonce)
        if isinstance(begun, Begun):
            owner = self.owners.get(request_id, begun.lease.owner)
            if owner != begun.lease.owner:
                raise Violation(f"{request_id} was begun by {begun.lease.owner} while {owner} owns it")
            self.owners[request_id] = begun.lease.owner
        elif not hasattr(begun, "lease"):
            await self._forget_if_done(request_id)
        return begun

    async def offer(self, lease: Lease) -> str | Refused:
        answer = await self.store.offer(lease, b"here")
        if not isinstance(answer, Refused):
            self._must_own(lease, "offer")
        return answer

    async def touch(self, lease: Lease) -> Touched:
        touched = await self.store.touch(lease)
        if touched.owner:
            self._must_own(lease, "touch")
        await self._forget_if_done(lease.request_id)
        return touched

    async def append(self, appends: list[Append]) -> list[Any]:
        results = await self.store.append(appends)
        for append, result in zip(appends, results, strict=True):
            if isinstance(result, Appended | Behind):
                self._must_own(append.lease, "append")
        await self._forget_if_done(appends[0].lease.request_id)
        return list(results)

    async def commit(self, offer: Offer, owner: str, emitted: list[Tokens]) -> Any:
        answer = await self.store.commit(offer, owner, emitted)
        if isinstance(answer, Committed):
            held = self.owners.get(offer.request_id, "")
            if held != owner and not held.endswith(f":{offer.nonce}"):
                raise Violation(f"{offer.request_id} was committed from {offer.nonce} while {held} owns it")
            self.owners[offer.request_id] = owner
        await self._forget_if_done(offer.request_id)
        return answer

    async def requeue(self, lease: Lease) -> bool:
        done = await self.store.requeue(lease)
        if done:
            self._must_own(lease, "requeue")
            self.owners.pop(lease.request_id, None)
        return done

    def _must_own(self, lease: Lease, what: str) -> None:
        if self.owners.get(lease.request_id) != lease.owner:
            owner = self.owners.get(lease.request_id)
            raise Violation(f"{what} of {lease.owner} on {lease.request_id} was accepted, its owner is {owner}")

    async def _forget_if_done(self, request_id: str) -> None:
        state: Any = await self._client.hget(self.store.keys.request(request_id), "state")
        if state in (None, b"done"):
            self.owners.pop(request_id, None)
