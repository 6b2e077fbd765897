"""What travels beside the KV: it comes back as it was, and nothing else gets through."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.protocol.journal import chain
from shared.protocol.messages import TokenLogprob, Tokens
from shared.protocol.sampling import MAX_CHOICES
from shared.worker.handoff import HandoffRecord, OfferBlob, unpack_offer, unpack_record


def first_token(choice: int, token: int = 7) -> Tokens:
    logprobs = (TokenLogprob(-0.5, ((token, -0.5), (1, -2.0))),)
    return Tokens(choice, 0, "", chain("", [token]), (token,), logprobs, None, (None, TokenLogprob(-1.0)))


@given(st.integers(1, (1 << 31) - 1), st.binary(max_size=4096))
def test_an_offer_comes_back(num_tokens: int, address: bytes) -> None:
    offer = OfferBlob(num_tokens, address)
    assert unpack_offer(offer.pack()) == offer


@pytest.mark.parametrize("choices", [0, 1, MAX_CHOICES])
def test_a_record_comes_back(choices: int) -> None:
    record = HandoffRecord(tuple(first_token(choice) for choice in range(choices)), 48, "prefill-1")
    assert unpack_record(record.pack()) == record


def test_a_long_worker_name_is_cut() -> None:
    assert unpack_record(HandoffRecord((), 0, "w" * 500).pack()).worker_id == "w" * 128


@pytest.mark.parametrize(
    "value",
    [
        [0, b""],
        [-1, b""],
        [1 << 31, b""],
        [1.5, b""],
        [1, "text"],
        [1, b"x" * 4097],
        [1],
        [1, b"", 2],
        {"num_tokens": 1},
        None,
        "text",
    ],
)
def test_an_offer_out_of_bounds_is_refused(value: object) -> None:
    with pytest.raises(ProtocolError, match="offer"):
        unpack_offer(msgpack.packb(value))


@pytest.mark.parametrize(
    "value",
    [
        [[], -1, "w"],
        [[], 1 << 31, "w"],
        [[], 0, b"w"],
        [[], 0],
        [[b"garbage"], 0, "w"],
        [["text"], 0, "w"],
        [[None], 0, "w"],
        [[b""] * (MAX_CHOICES + 1), 0, "w"],
        [b"", 0, "w"],
        7,
    ],
)
def test_a_record_out_of_bounds_is_refused(value: object) -> None:
    with pytest.raises(ProtocolError):
        unpack_record(msgpack.packb(value))


@pytest.mark.parametrize("blob", [b"x" * (4096 + 65), msgpack.packb([1, b"x" * 5000])])
def test_an_offer_over_its_limit_is_not_even_parsed(blob: bytes) -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        unpack_offer(blob)


def test_a_record_over_its_limit_is_not_even_parsed() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        unpack_record(bytes((1 << 20) + 1))


@given(st.binary(max_size=300))
def test_garbage_is_a_protocol_error_and_nothing_else(blob: bytes) -> None:
    for unpack in (unpack_offer, unpack_record):
        try:
            unpack(blob)
        except ProtocolError:
            continue
        assert unpack(blob) == unpack(unpack(blob).pack()), "what is accepted is what `pack` could have made"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(VALUES)
def test_well_formed_msgpack_of_another_shape_is_a_protocol_error_too(value: object) -> None:
    blob = msgpack.packb(value)
    for unpack in (unpack_offer, unpack_record):
        try:
            accepted = unpack(blob)
        except ProtocolError:
            continue
        assert isinstance(value, list)
        assert isinstance(accepted, OfferBlob | HandoffRecord)


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_changed_byte_never_raises_anything_else(position: int, value: int) -> None:
    blob = bytearray(HandoffRecord((first_token(0), first_token(1)), 16, "prefill-1").pack())
    blob[position % len(blob)] = value
    try:
        record = unpack_record(bytes(blob))
    except ProtocolError:
        return
    assert len(record.emitted) <= MAX_CHOICES
