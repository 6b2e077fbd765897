"""What travels beside the KV: the offer (before the pull) and the record (after the last frame)."""

from __future__ import annotations

from dataclasses import dataclass

import msgpack

from shared.errors import ProtocolError
from shared.protocol.codec import decode, encode
from shared.protocol.messages import Tokens
from shared.protocol.sampling import MAX_CHOICES

_MAX_ADDRESS = 4096
_MAX_RECORD = 1 << 20


@dataclass(frozen=True, slots=True)
class OfferBlob:
    """How many positions are handed off, and where to pull them from."""

    num_tokens: int
    address: bytes

    def pack(self) -> bytes:
        return _packed([self.num_tokens, self.address])


@dataclass(frozen=True, slots=True)
class HandoffRecord:
    """First tokens of the choices and how the prefill went; closes a hand-off.

    The tokens are journaled by prefill too; the decode worker journals them again only if that did not happen.
    """

    emitted: tuple[Tokens, ...]
    cached_tokens: int
    worker_id: str

    def pack(self) -> bytes:
        return _packed([[encode(event) for event in self.emitted], self.cached_tokens, self.worker_id])


def unpack_offer(blob: bytes) -> OfferBlob:
    """Raises ProtocolError on anything `OfferBlob.pack` cannot have made."""
    match _unpacked(blob, _MAX_ADDRESS + 64, "offer"):
        case [int(num_tokens), bytes(address)] if 0 < num_tokens < 1 << 31 and len(address) <= _MAX_ADDRESS:
            return OfferBlob(num_tokens, address)
    raise ProtocolError("an offer's blob is not [number of tokens, address]")


def unpack_record(blob: bytes) -> HandoffRecord:
    """Raises ProtocolError on anything `HandoffRecord.pack` cannot have made."""
    match _unpacked(blob, _MAX_RECORD, "hand-off record"):
        case [list(events), int(cached), str(worker_id)] if _are_blobs(events) and 0 <= cached < 1 << 31:
            return HandoffRecord(tuple(decode(Tokens, event) for event in events), cached, worker_id[:128])
    raise ProtocolError("a hand-off record is not [events, cached tokens, worker]")


def _are_blobs(events: list[object]) -> bool:
    return len(events) <= MAX_CHOICES and all(isinstance(event, bytes) for event in events)


def _packed(value: list[object]) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def _unpacked(blob: bytes, limit: int, name: str) -> object:
    if len(blob) > limit:
        raise ProtocolError(f"a {name} of {len(blob)} bytes is over the limit of {limit}")
    try:
        return msgpack.unpackb(
            blob,
            raw=False,
            strict_map_key=True,
            max_bin_len=limit,
            max_array_len=MAX_CHOICES,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a {name} is not msgpack: {type(error).__name__}") from None
