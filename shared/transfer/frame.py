"""The one unit that crosses a link: prefix, header, payload, digest.

    prefix   magic, version, kind, header length, payload length, index     20 bytes
    header   of a FRAME: whose blocks these are; empty in every other kind
    payload  what the kind says; in a FRAME what the transport puts there
    digest   blake2b-128, keyed per connection and direction, over prefix + header + content

`content` is the payload itself, except in a FRAME sent by reference (shm), where it is the bytes
the payload refers to. `index` counts the messages of one direction from 0, so a doubled, lost or
moved message is seen even though its digest is right. All integers are big-endian.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum

from shared.errors import TransferError
from shared.transfer.base import MAX_RECORD_BYTES, REASON_DIGEST, REASON_MALFORMED, ExportKey, Identity, Part

MAGIC = b"SLKV"
VERSION = 1
DIGEST_BYTES = 16
MAX_HEADER_BYTES = 4096
MAX_CONTROL_BYTES = 64 << 10
MAX_FRAME_BYTES = 16 << 20
MAX_TEXT_BYTES = 512

_PREFIX = struct.Struct("!4sBBHIQ")
PREFIX_BYTES = _PREFIX.size
_NUMBERS = struct.Struct("!QHHIIH")
_LENGTH = struct.Struct("!H")
_MAX_EPOCH = (1 << 63) - 1


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    FRAME = 4
    KEEPALIVE = 5
    PROGRESS = 6
    FINAL = 7
    ABORT = 8
    ACK = 9
    BYE = 10


_MAX_PAYLOAD = {Kind.FRAME: MAX_FRAME_BYTES, Kind.FINAL: MAX_RECORD_BYTES}


@dataclass(frozen=True, slots=True)
class Prefix:
    """Lengths here are within bounds, but nothing about them is proven before the digest is."""

    kind: Kind
    header_bytes: int
    payload_bytes: int
    index: int


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """Whose blocks a frame carries. `layout` is the fingerprint of the sender's KVLayout."""

    layout: str
    identity: Identity
    key: ExportKey
    part: Part


def encode_prefix(prefix: Prefix) -> bytes:
    return _PREFIX.pack(MAGIC, VERSION, prefix.kind, prefix.header_bytes, prefix.payload_bytes, prefix.index)


def decode_prefix(data: bytes) -> Prefix:
    """Raises TransferError("malformed") for foreign bytes, an unknown version or kind, and lengths out of bounds."""
    if len(data) != PREFIX_BYTES:
        raise _malformed(f"a message prefix has {PREFIX_BYTES} bytes, got {len(data)}")
    magic, version, number, header_bytes, payload_bytes, index = _PREFIX.unpack(data)
    if magic != MAGIC or version != VERSION:
        raise _malformed("the peer does not speak this version of the KV transfer protocol")
    try:
        kind = Kind(number)
    except ValueError:
        raise _malformed(f"unknown message kind {number}") from None
    if header_bytes > (MAX_HEADER_BYTES if kind is Kind.FRAME else 0):
        raise _malformed(f"a header of {header_bytes} bytes is too long for {kind.name}")
    if payload_bytes > _MAX_PAYLOAD.get(kind, MAX_CONTROL_BYTES):
        raise _malformed(f"a payload of {payload_bytes} bytes is too long for {kind.name}")
    return Prefix(kind, header_bytes, payload_bytes, index)


def encode_header(header: FrameHeader) -> bytes:
    """Raises TransferError("malformed") when a name is longer than the protocol carries."""
    part = header.part
    numbers = _NUMBERS.pack(
        header.key.epoch, part.layer_start, part.layer_stop, part.block_start, part.block_stop, part.slots
    )
    names = (
        header.layout,
        header.identity.numerics,
        header.identity.model,
        header.key.request_id,
        header.key.nonce,
    )
    return numbers + b"".join(_encode_text(name) for name in names)


def decode_header(data: bytes) -> FrameHeader:
    """Raises TransferError("malformed") for anything that `encode_header` does not write."""
    if len(data) < _NUMBERS.size:
        raise _malformed("a frame header is too short")
    epoch, layer_start, layer_stop, block_start, block_stop, slots = _NUMBERS.unpack_from(data)
    if not (layer_start < layer_stop and block_start < block_stop and slots > 0 and epoch <= _MAX_EPOCH):
        raise _malformed("a frame header names an empty range")
    offset, names = _NUMBERS.size, []
    for _ in range(5):
        name, offset = _decode_text(data, offset)
        names.append(name)
    if offset != len(data):
        raise _malformed("a frame header has bytes left over")
    layout, numerics, model, request_id, nonce = names
    part = Part(layer_start, layer_stop, block_start, block_stop, slots)
    return FrameHeader(layout, Identity(model, numerics), ExportKey(request_id, epoch, nonce), part)


def digest(key: bytes, head: bytes, content: bytes | bytearray | memoryview) -> bytes:
    """Keyed digest over prefix + header (`head`) and content. Releases the GIL for large content."""
    state = hashlib.blake2b(head, digest_size=DIGEST_BYTES, key=key)
    state.update(content)
    return state.digest()


def check_digest(key: bytes, head: bytes, content: bytes | bytearray | memoryview, expected: bytes) -> None:
    """Raises TransferError("digest") unless `expected` is the digest; compares in constant time."""
    if not hmac.compare_digest(digest(key, head, content), expected):
        raise TransferError(REASON_DIGEST, "the digest of a message does not match its bytes")


def _encode_text(text: str) -> bytes:
    data = text.encode()
    if len(data) > MAX_TEXT_BYTES:
        raise _malformed(f"a name of {len(data)} bytes is longer than the {MAX_TEXT_BYTES} a frame header carries")
    return _LENGTH.pack(len(data)) + data


def _decode_text(data: bytes, offset: int) -> tuple[str, int]:
    start = offset + _LENGTH.size
    if start > len(data):
        raise _malformed("a frame header ends inside a length")
    (length,) = _LENGTH.unpack_from(data, offset)
    if length > MAX_TEXT_BYTES or start + length > len(data):
        raise _malformed("a frame header ends inside a name")
    try:
        return data[start : start + length].decode(), start + length
    except UnicodeDecodeError:
        raise _malformed("a name in a frame header is not UTF-8") from None


def _malformed(message: str) -> TransferError:
    return TransferError(REASON_MALFORMED, message)
