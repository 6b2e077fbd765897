"""What is kept of an answer for whoever comes for it later, by its id or by the same Idempotency-Key.

One key and one body of a client are one generation, however often it is asked for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from services.gateway.errors import IdempotencyKeyReused
from services.gateway.schemas import GenerationBody
from shared.bus.stored import Claim, Held, ResponseStore, StoredResponse, digest_of
from shared.errors import BusUnavailable, InvalidRequest, ProtocolError, SlipstreamError

HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotent-Replayed"

_log = structlog.get_logger()

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class KeyHeld(SlipstreamError):
    """Another request has the key by now; it never leaves the gateway."""

    def __init__(self, held: Held) -> None:
        super().__init__("the idempotency key stands for another answer")
        self.held = held


@dataclass(frozen=True, slots=True)
class Ticket:
    """A client's idempotency key as it is stored, and the body it comes with."""

    digest: str
    fingerprint: str

    def check(self, held: Held) -> None:
        """Raises IdempotencyKeyReused when the key stands for an answer to another body."""
        if held.claim.fingerprint != self.fingerprint:
            raise IdempotencyKeyReused(f"This {HEADER} was used with another body; take a new key.", HEADER)


@dataclass(frozen=True, slots=True)
class Record:
    """An answer's record in Redis, and the claim of its idempotency key where it came with one."""

    responses: ResponseStore
    stored: StoredResponse
    ttl_ms: int
    ticket: Ticket | None
    claim: Claim | None

    async def write(self, instead_of: Held | None) -> None:
        """Raises KeyHeld when the key was claimed meanwhile, and BusUnavailable."""
        await self.responses.save(self.stored, self.ttl_ms)
        if self.ticket is None or self.claim is None:
            return
        held = await self.responses.claim(self.ticket.digest, self.claim, instead_of)
        if held is not None:
            await self.responses.forget(self.stored.response_id)
            raise KeyHeld(held)

    async def write_again(self) -> None:
        """After Redis forgot everything; a key that stands for something else by now is left to it, readable or not.

        Raises BusUnavailable.
        """
        await self.responses.save(self.stored, self.ttl_ms)
        if self.ticket is None or self.claim is None:
            return
        try:
            await self.responses.claim(self.ticket.digest, self.claim)
        except ProtocolError as exc:
            _log.warning("claim_unreadable", response_id=self.stored.response_id, error=str(exc)[:200])

    async def forget(self) -> None:
        """The submission failed: nobody shall wait for it. What cannot be read or reached just expires."""
        try:
            if self.ticket is not None and self.claim is not None:
                await self.responses.release(self.ticket.digest, self.claim)
            await self.responses.forget(self.stored.response_id)
        except (BusUnavailable, ProtocolError) as exc:
            _log.warning("records_left", response_id=self.stored.response_id, error=str(exc))


def ticket_of(headers: Mapping[str, str], key_id: str, body: GenerationBody) -> Ticket | None:
    """What a request's header says; None without one. Raises InvalidRequest."""
    key = headers.get(HEADER)
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise InvalidRequest(f"{HEADER} must be 1 to 255 visible ASCII characters.", HEADER)
    return Ticket(digest_of(key_id, key), fingerprint_of(body))


def fingerprint_of(body: GenerationBody) -> str:
    """Names what a body asks for; whether it is streamed makes no difference."""
    asked = body.model_dump_json(exclude={"stream", "stream_options"})
    return hashlib.sha256(f"{type(body).__name__}\x00{asked}".encode()).hexdigest()
