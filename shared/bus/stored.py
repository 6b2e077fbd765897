"""What Redis keeps of an answer besides the journals of its requests, so that any gateway can continue or join it.

`resp:<response id>` says which requests it is made of and how their tokens become text. `idem:<digest>` says which
answer a client's idempotency key stands for. Both are bounded msgpack lists `[tag, version, fields...]` and never
without a time to live.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import msgpack
from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.bus.script import Script
from shared.errors import BusUnavailable, ProtocolError
from shared.protocol.keys import Keys

VERSION = 1
MAX_BYTES = 32 << 20
MAX_REQUESTS = 1024
MAX_NAME = 128
MAX_SECONDS = 1 << 40


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """An answer as its gateway submitted it.

    `presentation` is for the gateways alone (`services/gateway/presentation.py`). `detachable`: it may go on for a
    while without readers.
    """

    response_id: str
    created: int
    key_id: str
    request_ids: tuple[str, ...]
    detachable: bool
    presentation: bytes


@dataclass(frozen=True, slots=True)
class Claim:
    """What an idempotency key stands for: an answer, the body it was asked with, and how long it is kept."""

    response_id: str
    fingerprint: str
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class Held:
    """A claim found in Redis, with its bytes (to take it over) and its age by the clock of Redis."""

    claim: Claim
    raw: bytes
    age_s: float


class ResponseStore:
    """Reads and writes both records. Every method raises BusUnavailable when Redis does not do its part."""

    def __init__(self, client: Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._claim = Script("claim")

    async def save(self, response: StoredResponse, ttl_ms: int) -> None:
        try:
            await self._client.set(self._keys.response(response.response_id), pack_response(response), px=ttl_ms)
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error

    async def load(self, response_id: str) -> StoredResponse | None:
        """None: unknown or expired. Raises ProtocolError for a record that cannot be read."""
        try:
            raw = await self._client.get(self._keys.response(response_id))
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error
        return None if raw is None else unpack_response(raw if isinstance(raw, bytes) else raw.encode())

    async def forget(self, response_id: str) -> None:
        try:
            await self._client.delete(self._keys.response(response_id))
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error

    async def look(self, digest: str) -> Held | None:
        """What an idempotency key stands for."""
        return await self._exchange(digest, b"", b"", 0)

    async def claim(self, digest: str, claim: Claim, instead_of: Held | None = None) -> Held | None:
        """Let a key stand for `claim`, if it stands for nothing, or still for what was seen; else answers what for."""
        return await self._exchange(
            digest, b"" if instead_of is None else instead_of.raw, pack_claim(claim), claim.ttl_ms
        )

    async def release(self, digest: str, claim: Claim) -> None:
        """Take a claim off again, unless the key stands for something else by now."""
        await self._exchange(digest, pack_claim(claim), b"", 0)

    async def _exchange(self, digest: str, seen: bytes, new: bytes, ttl_ms: int) -> Held | None:
        try:
            reply = await self._claim(self._client, [self._keys.idempotency(digest)], [seen, new, ttl_ms])
        except (RedisError, OSError) as error:
            raise _unavailable(error) from error
        if reply == b"claimed" or reply[0] == b"":
            return None
        claim = unpack_claim(reply[0])
        return Held(claim, reply[0], max(0, claim.ttl_ms - max(0, reply[1])) / 1000)


def digest_of(key_id: str, idempotency_key: str) -> str:
    """Names a client's idempotency key; keys of two clients never meet."""
    return hashlib.sha256(f"{key_id}\x00{idempotency_key}".encode()).hexdigest()


def pack_response(response: StoredResponse) -> bytes:
    fields = (response.response_id, response.created, response.key_id, response.request_ids)
    packed: bytes = msgpack.packb(["P", VERSION, *fields, response.detachable, response.presentation])
    return packed


def unpack_response(data: bytes) -> StoredResponse:
    """Raises ProtocolError for anything that `pack_response` does not write."""
    response_id, created, key_id, request_ids, detachable, presentation = unpack_record(data, "P", VERSION, 6)
    if type(request_ids) is not list or not 0 < len(request_ids) <= MAX_REQUESTS:
        raise ProtocolError("a stored response names no requests, or too many")
    if type(detachable) is not bool or type(presentation) is not bytes:
        raise ProtocolError("a stored response has a field of the wrong type")
    return StoredResponse(
        response_id=_name(response_id),
        created=_count(created),
        key_id=_name(key_id),
        request_ids=tuple(map(_name, request_ids)),
        detachable=detachable,
        presentation=presentation,
    )


def pack_claim(claim: Claim) -> bytes:
    packed: bytes = msgpack.packb(["I", VERSION, claim.response_id, claim.fingerprint, claim.ttl_ms])
    return packed


def unpack_claim(data: bytes) -> Claim:
    """Raises ProtocolError for anything that `pack_claim` does not write."""
    response_id, fingerprint, ttl_ms = unpack_record(data, "I", VERSION, 3)
    return Claim(_name(response_id), _name(fingerprint), _count(ttl_ms))


def unpack_record(data: bytes, tag: str, version: int, size: int) -> list[Any]:
    """The fields of `[tag, version, fields...]`, their number checked. Raises ProtocolError."""
    if len(data) > MAX_BYTES:
        raise ProtocolError(f"a record of {len(data)} bytes is larger than {MAX_BYTES}")
    try:
        items = msgpack.unpackb(data, raw=False, strict_map_key=True, max_map_len=0, max_ext_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(f"a record is not valid msgpack: {type(error).__name__}") from None
    if (
        type(items) is not list
        or len(items) != size + 2
        or items[0] != tag
        or type(items[1]) is not int
        or items[1] != version
    ):
        raise ProtocolError(f"a record is not of tag {tag!r}, version {version} and {size} fields")
    return items[2:]


def _name(value: object) -> str:
    if type(value) is not str or len(value) > MAX_NAME:
        raise ProtocolError(f"a record's name is not text of at most {MAX_NAME} characters")
    return value


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SECONDS:
        raise ProtocolError("a record's number is out of range")
    return value


def _unavailable(error: Exception) -> BusUnavailable:
    return BusUnavailable(f"Redis did not answer: {type(error).__name__}")
