"""The Idempotency-Key header: one key and one body of a client are one generation, however often it is asked for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from services.gateway.errors import IdempotencyKeyReused
from services.gateway.schemas import GenerationBody
from shared.bus.stored import Held, digest_of
from shared.errors import InvalidRequest, SlipstreamError

HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotent-Replayed"

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
