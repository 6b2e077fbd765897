"""The frame codec, the control messages and the address: nothing a peer sends raises anything but TransferError."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import TransferError
from shared.transfer.address import MAX_ADDRESS_BYTES, Address, decode_address, encode_address
from shared.transfer.auth import LinkKeys
from shared.transfer.base import MAX_RECORD_BYTES, ExportKey, Identity, Part
from shared.transfer.control import Hello, Notice, Welcome
from shared.transfer.frame import (
    MAX_CONTROL_BYTES,
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    MAX_TEXT_BYTES,
    PREFIX_BYTES,
    FrameHeader,
    Kind,
    Prefix,
    check_digest,
    decode_header,
    decode_prefix,
    digest,
    encode_header,
    encode_prefix,
)
from shared.transfer.link import Link

KEYS = LinkKeys(outgoing=b"o" * 32, incoming=b"i" * 32)
texts = st.text(max_size=60).filter(lambda text: len(text.encode()) <= MAX_TEXT_BYTES)
identities = st.builds(Identity, texts, texts)
keys = st.builds(ExportKey, texts, st.integers(0, 2**63 - 1), texts)
ranges = st.tuples(st.integers(0, 60000), st.integers(1, 5000))
parts = st.builds(
    lambda layers, blocks, slots: Part(layers[0], sum(layers), blocks[0], sum(blocks), slots),
    ranges,
    ranges,
    st.integers(1, 65535),
)
headers = st.builds(FrameHeader, texts, identities, keys, parts)
hellos = st.builds(Hello, texts, texts, identities, keys, *(st.integers(0, 2**63 - 1) for _ in range(3)))


@given(headers)
def test_a_header_comes_back(header: FrameHeader) -> None:
    data = encode_header(header)
    assert len(data) <= MAX_HEADER_BYTES
    assert decode_header(data) == header


@given(st.sampled_from(list(Kind)), st.integers(0, 2**64 - 1))
def test_a_prefix_comes_back(kind: Kind, index: int) -> None:
    prefix = Prefix(kind, MAX_HEADER_BYTES if kind is Kind.FRAME else 0, MAX_CONTROL_BYTES, index)
    assert decode_prefix(encode_prefix(prefix)) == prefix


@given(st.binary(max_size=200))
def test_garbage_is_no_header(data: bytes) -> None:
    _only_transfer_error(lambda: encode_header(decode_header(data)) == data)


@given(headers, st.data())
def test_a_damaged_header_is_refused_or_another_header(header: FrameHeader, data: st.DataObject) -> None:
    damaged = bytearray(encode_header(header))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    _only_transfer_error(lambda: decode_header(bytes(damaged)) != header)


@given(headers, st.data())
def test_a_cut_header_is_refused(header: FrameHeader, data: st.DataObject) -> None:
    whole = encode_header(header)
    with pytest.raises(TransferError) as raised:
        decode_header(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert raised.value.reason == "malformed"


@given(st.binary(max_size=2 * PREFIX_BYTES) | st.binary(min_size=PREFIX_BYTES, max_size=PREFIX_BYTES))
def test_garbage_is_no_prefix(data: bytes) -> None:
    _only_transfer_error(lambda: encode_prefix(decode_prefix(data)) == data)


@given(st.binary(min_size=14, max_size=14))
def test_lengths_are_bounded_whatever_follows_the_magic(rest: bytes) -> None:
    def bounded() -> bool:
        prefix = decode_prefix(b"SLKV\x01" + bytes([rest[0] % 12]) + rest)
        limit = {Kind.FRAME: MAX_FRAME_BYTES, Kind.FINAL: MAX_RECORD_BYTES}.get(prefix.kind, MAX_CONTROL_BYTES)
        return prefix.payload_bytes <= limit and prefix.header_bytes <= MAX_HEADER_BYTES

    _only_transfer_error(bounded)


@pytest.mark.parametrize(
    "prefix",
    [
        Prefix(Kind.FRAME, MAX_HEADER_BYTES + 1, 0, 0),
        Prefix(Kind.HELLO, 1, 0, 0),
        Prefix(Kind.HELLO, 0, MAX_CONTROL_BYTES + 1, 0),
        Prefix(Kind.FINAL, 0, MAX_RECORD_BYTES + 1, 0),
        Prefix(Kind.FRAME, 0, MAX_FRAME_BYTES + 1, 0),
        Prefix(Kind.FRAME, 0, 2**32 - 1, 0),
    ],
)
def test_lengths_over_the_bounds_are_refused(prefix: Prefix) -> None:
    with pytest.raises(TransferError) as raised:
        decode_prefix(encode_prefix(prefix))
    assert raised.value.reason == "malformed"


@pytest.mark.parametrize("change", [(0, 0x00), (4, 2), (4, 0), (5, 0), (5, 200)])
def test_a_foreign_prefix_is_refused(change: tuple[int, int]) -> None:
    data = bytearray(encode_prefix(Prefix(Kind.ACK, 0, 0, 0)))
    data[change[0]] = change[1]
    with pytest.raises(TransferError) as raised:
        decode_prefix(bytes(data))
    assert raised.value.reason == "malformed"


def test_a_name_too_long_for_a_header_is_refused_when_written() -> None:
    header = FrameHeader("l", Identity("m" * (MAX_TEXT_BYTES + 1), "n"), ExportKey("r", 0, "n"), Part(0, 1, 0, 1, 1))
    with pytest.raises(TransferError, match="513 bytes"):
        encode_header(header)


@given(st.binary(max_size=64), st.binary(max_size=64), st.data())
def test_a_digest_covers_head_content_and_key(head: bytes, content: bytes, data: st.DataObject) -> None:
    seal = digest(b"key", head, content)
    check_digest(b"key", head, content, seal)
    changed = bytearray(head + content + seal)
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    split = len(head), len(head) + len(content)
    for key, message in ((b"key", bytes(changed)), (b"other", head + content + seal)):
        with pytest.raises(TransferError) as raised:
            check_digest(key, message[: split[0]], message[split[0] : split[1]], message[split[1] :])
        assert raised.value.reason == "digest"


@given(hellos)
def test_a_hello_comes_back(hello: Hello) -> None:
    data = hello.encode()
    assert len(data) <= MAX_CONTROL_BYTES
    assert Hello.decode(data) == hello


@given(texts, texts, st.booleans())
def test_a_notice_comes_back(reason: str, message: str, keep: bool) -> None:
    notice = Notice(reason, message, keep)
    assert Notice.decode(notice.encode()) == notice


def test_a_long_notice_is_cut_not_refused() -> None:
    assert Notice.decode(Notice("r" * 5000, "m" * 5000).encode()) == Notice("r" * 512, "m" * 512)


@given(identities, texts)
def test_a_welcome_comes_back(identity: Identity, layout: str) -> None:
    assert Welcome.decode(Welcome(layout, identity).encode()) == Welcome(layout, identity)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=3),
    max_leaves=20,
)
decoders = st.sampled_from([Hello.decode, Welcome.decode, Notice.decode, decode_address])


@given(decoders, st.binary(max_size=300) | values.map(msgpack.packb))
def test_garbage_is_no_control_message(decode: Callable[[bytes], object], data: bytes) -> None:
    _only_transfer_error(lambda: decode(data) is not None)


@given(decoders, hellos.map(Hello.encode), st.data())
def test_damaged_control_messages_raise_nothing_else(
    decode: Callable[[bytes], object], whole: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    _only_transfer_error(lambda: decode(bytes(damaged)) is not None)


routes = st.dictionaries(
    st.text(max_size=10),
    st.dictionaries(st.text(max_size=10), st.text(max_size=20) | st.integers(0, 2**63)),
    max_size=3,
)


@given(st.text(min_size=1, max_size=60), st.integers(1, 65535), routes)
def test_an_address_comes_back(host: str, port: int, infos: dict[str, dict[str, str | int]]) -> None:
    try:
        data = encode_address(Address(host, port, infos))
    except TransferError as error:
        assert "4096" in str(error)  # noqa: PT017 - drawn addresses may be too long
    else:
        _only_transfer_error(lambda: decode_address(data) == Address(host, port, infos))


@pytest.mark.parametrize(
    "value",
    [
        [1, "h", 0, {}],
        [1, "h", 65536, {}],
        [2, "h", 80, {}],
        [1, "", 80, {}],
        [1, "h", 80, {"tcp": []}],
        [1, "h", 80, {"tcp": {"a": None}}],
        [1, "h", 80, {"tcp": {"a": [1]}}],
        [1, "h", "80", {}],
        [1, "h", 80],
        {},
        None,
    ],
)
def test_a_strange_address_is_refused(value: object) -> None:
    with pytest.raises(TransferError) as raised:
        decode_address(msgpack.packb(value))
    assert raised.value.reason == "malformed"


def test_an_address_over_the_bound_is_refused() -> None:
    with pytest.raises(TransferError):
        decode_address(msgpack.packb([1, "h" * MAX_ADDRESS_BYTES, 80, {}]))
    with pytest.raises(TransferError):
        encode_address(Address("h" * MAX_ADDRESS_BYTES, 80, {}))


def _only_transfer_error(check: Callable[[], bool]) -> None:
    """`check` either holds or raises TransferError("malformed")."""
    try:
        assert check()
    except TransferError as error:
        assert error.reason == "malformed"  # noqa: PT017 - both outcomes are right


# Garbage on a link.


class _Deaf:
    """A writer that nobody listens to; receiving needs none."""


def _receive(data: bytes) -> str:
    """Reason with which a link that reads `data`, and then the end, gives up."""

    async def run() -> str:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        link = Link(reader, _Deaf(), KEYS, 1.0)  # type: ignore[arg-type]
        try:
            while True:
                await link.receive(lambda header: 64, timeout_s=1.0)
        except TransferError as error:
            return error.reason

    return asyncio.run(run())


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda rest: b"SLKV\x01" + rest))
def test_garbage_on_a_link_ends_in_a_reason(data: bytes) -> None:
    assert _receive(data) in {"malformed", "peer_lost", "coverage", "digest"}


def test_a_huge_length_prefix_allocates_nothing() -> None:
    data = encode_prefix(Prefix(Kind.FRAME, 0, 2**32 - 1, 0)) + bytes(100)
    _receive(data)
    tracemalloc.start()
    try:
        assert _receive(data) == "malformed"
        assert tracemalloc.get_traced_memory()[1] < 256 << 10
    finally:
        tracemalloc.stop()


def test_a_control_message_with_a_wrong_digest_is_refused() -> None:
    head = encode_prefix(Prefix(Kind.KEEPALIVE, 0, 0, 0))
    assert _receive(head + digest(KEYS.incoming, head, b"")) == "peer_lost"
    assert _receive(head + digest(KEYS.outgoing, head, b"")) == "digest"


def test_a_repeated_message_is_refused() -> None:
    head = encode_prefix(Prefix(Kind.KEEPALIVE, 0, 0, 0))
    assert _receive(2 * (head + digest(KEYS.incoming, head, b""))) == "coverage"
