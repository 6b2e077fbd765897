"""Any bytes from Redis: a message, or ProtocolError. Redis is only half trusted, and old versions write there too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.bus.events import _decoded
from shared.bus.requests import _entries, _polled
from shared.errors import ProtocolError
from shared.protocol.codec import decode, decode_event, encode, unpack
from shared.protocol.journal import JournalState, chain
from shared.protocol.messages import End, Job, JournalEntry, Marker, Tokens, WorkerBeat
from shared.protocol.sampling import SamplingParams
from shared.worker.handoff import HandoffRecord, OfferBlob, unpack_offer, unpack_record
from tests.fuzz.damage import EXTREMES, allocates_at_most, damaged, refusal_of

MANY = settings(max_examples=150, deadline=None)

H = chain("", (1, 2))
PARAMS = SamplingParams(max_tokens=4, seed=1, logit_bias=((1, 2.0),), stop_ids=(2,))
JOB = Job("id", "model", (1, 2, 3), PARAMS, "gw", "p", "d", tenant="t")
TOKENS = Tokens(0, 0, "", H, (1, 2), finish="stop")
BEAT = WorkerBeat("w-1", "decode", "ready", "m", "numerics", "layout", (("tcp", "h:1"),), 1.0)
MESSAGES: list[Any] = [JOB, TOKENS, Marker((0,), ((1,),)), End("error", "c", "m", -1), BEAT]
RECORD = HandoffRecord((TOKENS,), 3, "w-1").pack()
OFFER = OfferBlob(17, b"address").pack()

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.sampled_from(EXTREMES) | st.floats()
values: st.SearchStrategy[Any] = st.recursive(
    scalars | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=10) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=25,
)
packed = values.map(msgpack.packb)


def is_message_or_error(read: Callable[[bytes], object], data: bytes) -> None:
    with allocates_at_most((4 << 20) + 64 * len(data)):
        error = refusal_of(ProtocolError, lambda: read(data))
    assert len(str(error)) < 1000


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@MANY
@given(data=st.data())
def test_a_damaged_message(message: Any, data: st.DataObject) -> None:
    damage = data.draw(damaged(encode(message)))
    is_message_or_error(lambda given: decode(type(message), given), damage)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@MANY
@given(data=st.data())
def test_a_message_with_any_fields(message: Any, data: st.DataObject) -> None:
    """The right number of fields, some of them anything that msgpack carries."""
    fields = msgpack.unpackb(encode(message))
    for at in data.draw(st.lists(st.integers(2, len(fields) - 1), max_size=3)):
        fields[at] = data.draw(values)
    is_message_or_error(lambda given: decode(type(message), given), msgpack.packb(fields))


@pytest.mark.parametrize(("read", "whole"), [(unpack_offer, OFFER), (unpack_record, RECORD)], ids=["offer", "record"])
@MANY
@given(data=st.data())
def test_what_travels_beside_the_kv(read: Callable[[bytes], object], whole: bytes, data: st.DataObject) -> None:
    is_message_or_error(read, data.draw(damaged(whole) | packed | st.binary(max_size=64)))


@pytest.mark.parametrize("depth", [10, 100, 1000, 5000])
@pytest.mark.parametrize("head", [b"\xdd\x00\x10\x00\x00", b"\xdd\xff\xff\xff\xff", b"\x91", b"\x81\xa1a"])
def test_nested_lists_of_huge_claims(head: bytes, depth: int) -> None:
    """Each level claims a million items; what is allocated stays in the order of one of them."""
    with allocates_at_most(128 << 20), pytest.raises(ProtocolError):
        decode(Job, head * depth)


@MANY
@given(packed | st.binary(max_size=100))
def test_any_publication(data: bytes) -> None:
    assert isinstance(_decoded(data), list)


@MANY
@given(st.lists(st.tuples(values, values, values, values, values).map(list), max_size=3))
def test_a_publication_of_any_items(items: list[Any]) -> None:
    _decoded(msgpack.packb(items))


def test_an_honest_publication_is_read() -> None:
    assert len(_decoded(msgpack.packb([[b"id", 1, 2, b"T", encode(TOKENS)]]))) == 1
    assert unpack(msgpack.packb([1, b"x"])) == [1, b"x"]


replies = st.recursive(st.binary(max_size=8) | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=4))


@MANY
@given(st.lists(replies, max_size=3))
def test_any_journal_from_redis(items: list[Any]) -> None:
    try:
        _entries(items)
    except ProtocolError:
        return


@MANY
@given(st.binary(max_size=12), st.sampled_from([b"T", b"M", b"E", b"X", b""]), st.binary(max_size=40))
def test_a_journal_of_the_right_shape(entry_id: bytes, kind: bytes, blob: bytes) -> None:
    reply = [b"state", b"queued", 1, b"gw", [[entry_id, [b"k", kind, b"b", blob]]]]
    with pytest.raises(ProtocolError):
        _polled(reply)


small = st.integers(0, 6)
ids = st.lists(st.integers(0, 9), max_size=4).map(tuple)
events = (
    st.builds(Tokens, st.integers(0, 3), small, st.sampled_from(["", H, "0" * 16]), st.sampled_from(["", H]), ids)
    | st.builds(Tokens, small, small, st.just(""), st.just(""), st.just(()), finish=st.sampled_from([None, "stop"]))
    | st.builds(Marker, st.lists(small, max_size=3).map(tuple), st.lists(ids, max_size=3).map(tuple))
    | st.builds(End, st.sampled_from(["finished", "cancelled", "error"]))
)


@MANY
@given(st.integers(1, 3), st.lists(st.builds(JournalEntry, small, small, events), max_size=12))
def test_any_journal_folds_or_is_refused(choices: int, entries: list[JournalEntry]) -> None:
    """And what it folds to is whole: the hash of each choice is that of its tokens."""
    state = JournalState.empty(choices)
    for entry in entries:
        try:
            state.accept(entry)
        except ProtocolError:
            continue
    assert [choice.h for choice in state.choices] == [chain("", choice.tokens) for choice in state.choices]


@MANY
@given(st.sampled_from([b"T", b"M", b"E"]), packed)
def test_any_event(kind: bytes, data: bytes) -> None:
    is_message_or_error(lambda given: decode_event(kind, given), data)
