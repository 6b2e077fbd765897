"""Any bytes on a KV link, before and after the proof of the secret: TransferError with a reason, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import TransferError
from shared.transfer.address import Address, decode_address, encode_address
from shared.transfer.auth import (
    GREETING,
    MAC_BYTES,
    NONCE_BYTES,
    LinkKeys,
    authenticate_exporter,
    authenticate_importer,
)
from shared.transfer.base import MAX_RECORD_BYTES, REASONS, ExportKey, Part
from shared.transfer.blocks import as_memory, gather
from shared.transfer.control import Hello, Notice, Welcome
from shared.transfer.coverage import Coverage
from shared.transfer.frame import (
    MAX_CONTROL_BYTES,
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    FrameHeader,
    Kind,
    Prefix,
    decode_header,
    decode_prefix,
    digest,
    encode_header,
    encode_prefix,
)
from shared.transfer.link import Link, peer_errors
from tests.fuzz.damage import allocates_at_most, damaged, refusal_of
from tests.transfer_rig import IDENTITY, LAYOUT, random_cache

MANY = settings(max_examples=150, deadline=None)
SECRET = b"a secret for the fuzzer"
KEYS = LinkKeys(b"o" * 32, b"i" * 32)
KEY = ExportKey("request", 3, "nonce")
PART = Part(0, LAYOUT.num_layers, 0, 2, LAYOUT.block_size)
HEADER = encode_header(FrameHeader(LAYOUT.fingerprint(), IDENTITY, KEY, PART))
HELLO = Hello("tcp", LAYOUT.fingerprint(), IDENTITY, KEY, 8, 0, 2000)
ADDRESS = encode_address(Address("10.0.0.1", 4000, {"tcp": {}, "shm": {"path": "/dev/shm/x", "device": 1}}))


class Sink(asyncio.Transport):
    """A writer's other end that takes everything."""

    def write(self, data: bytes | bytearray | memoryview[int]) -> None:
        self.num_bytes = getattr(self, "num_bytes", 0) + len(data)

    def is_closing(self) -> bool:
        return getattr(self, "is_closed", False)

    def close(self) -> None:
        self.is_closed = True


def reads(data: bytes, read: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]) -> str:
    """The reason with which `read` ends on `data` followed by the end of the stream; "" if it does not fail."""

    async def run() -> str:
        reader, loop = asyncio.StreamReader(), asyncio.get_running_loop()
        reader.feed_data(data)
        reader.feed_eof()
        writer = asyncio.StreamWriter(Sink(), asyncio.StreamReaderProtocol(reader), reader, loop)
        try:
            with peer_errors():
                await read(reader, writer)
        except TransferError as error:
            return error.reason
        finally:
            writer.close()
        return ""

    return asyncio.run(run())


@MANY
@given(st.binary(max_size=2 * (NONCE_BYTES + MAC_BYTES)) | st.binary(max_size=80).map(GREETING.__add__))
def test_no_bytes_pass_the_handshake(data: bytes) -> None:
    assert reads(data, lambda r, w: authenticate_exporter(r, w, SECRET)) in {"auth", "peer_lost"}
    assert reads(data, lambda r, w: authenticate_importer(r, w, SECRET)) in {"auth", "peer_lost"}


def message(kind: Kind, header: bytes, payload: bytes, index: int = 0) -> bytes:
    head = encode_prefix(Prefix(kind, len(header), len(payload), index)) + header
    return head + payload + digest(KEYS.incoming, head, payload)


def frame() -> bytes:
    content = bytes(as_memory(gather(random_cache(), PART, [10, 11])))
    return message(Kind.FRAME, HEADER, content)


CONVERSATION = frame() + message(Kind.KEEPALIVE, b"", b"", 1) + message(Kind.FINAL, b"", b"record", 2)


def expect(header: FrameHeader) -> int:
    """As the receiver: what a frame may carry follows from what is due, not from what it says."""
    Coverage(LAYOUT, 8, 0).check(header.part)
    return header.part.num_bytes(LAYOUT)


async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    link = Link(reader, writer, KEYS, 5.0)
    while (await link.receive(expect, 5.0)).kind is not Kind.FINAL:
        pass


def test_an_honest_conversation_is_read() -> None:
    assert reads(CONVERSATION, conversation) == ""


@MANY
@given(damaged(CONVERSATION, head=400) | st.binary(max_size=200).map(lambda rest: b"SLKV\1" + rest))
def test_any_bytes_from_a_proven_peer(data: bytes) -> None:
    """A damaged content byte of a frame is left to the receiver, which checks the digest over what it copied."""
    with allocates_at_most((1 << 20) + 4 * len(data) + MAX_FRAME_BYTES):
        assert reads(data, conversation) in REASONS | {""}


@MANY
@given(damaged(encode_prefix(Prefix(Kind.FRAME, 100, 1000, 0))))
def test_a_damaged_prefix_stays_within_the_bounds(data: bytes) -> None:
    error = refusal_of(TransferError, lambda: decode_prefix(data[:20]))
    if error is not None:
        assert error.reason == "malformed"
        return
    prefix = decode_prefix(data[:20])
    limits = {Kind.FRAME: MAX_FRAME_BYTES, Kind.FINAL: MAX_RECORD_BYTES}
    assert prefix.payload_bytes <= limits.get(prefix.kind, MAX_CONTROL_BYTES)
    assert prefix.header_bytes <= MAX_HEADER_BYTES


@MANY
@given(damaged(HEADER))
def test_a_damaged_frame_header(data: bytes) -> None:
    error = refusal_of(TransferError, lambda: Coverage(LAYOUT, 8, 0).add(decode_header(data).part))
    if error is not None:
        assert error.reason in {"malformed", "coverage"}
        return
    assert decode_header(data).part.num_bytes(LAYOUT) <= 2 * LAYOUT.bytes_per_block


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=4) | st.binary(max_size=4)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=11) | st.dictionaries(scalars, inner, max_size=2))
DECODERS: list[tuple[Callable[[bytes], object], bytes]] = [
    (Hello.decode, HELLO.encode()),
    (Welcome.decode, Welcome(LAYOUT.fingerprint(), IDENTITY).encode()),
    (Notice.decode, Notice("cancelled", "why").encode()),
    (decode_address, ADDRESS),
]


@pytest.mark.parametrize(("decode", "whole"), DECODERS, ids=["hello", "welcome", "notice", "address"])
@MANY
@given(data=st.data())
def test_any_control_message_and_address(decode: Callable[[bytes], object], whole: bytes, data: st.DataObject) -> None:
    given_bytes = data.draw(damaged(whole) | st.binary(max_size=100) | values.map(msgpack.packb))
    with allocates_at_most(1 << 20):
        error = refusal_of(TransferError, lambda: decode(given_bytes))
    assert error is None or error.reason == "malformed"
