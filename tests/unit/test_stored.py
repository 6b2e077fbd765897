"""Records of answers in Redis: every byte of them may be foreign."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.presentation import CHAT, COMPLETION, Presentation
from services.gateway.schemas import ChatBody, CompletionBody, validate
from shared.bus.stored import (
    MAX_REQUESTS,
    Claim,
    StoredResponse,
    digest_of,
    pack_claim,
    pack_response,
    unpack_claim,
    unpack_response,
)
from shared.errors import ProtocolError
from tests.gateway_rig import MESSAGES

SHOWN = Presentation(COMPLETION, 2, stops=("a", "b"), echo_texts=("x", "ζ"))
STORED = StoredResponse("chatcmpl-1", 1_700_000_000, "key", ("r1", "r2"), True, SHOWN.pack())
CLAIM = Claim("chatcmpl-1", "f" * 64, 720_000)

names = st.text(max_size=40)
shown = st.builds(
    Presentation,
    kind=st.sampled_from([CHAT, COMPLETION]),
    n=st.integers(1, 64),
    logprobs=st.booleans(),
    stops=st.lists(st.text(min_size=1, max_size=9), max_size=16).map(tuple),
    echo_texts=st.lists(st.text(), max_size=4).map(tuple),
    scores_only=st.booleans(),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(st.builds(StoredResponse, names, st.integers(0, 2**40), names, st.just(("r",)), st.booleans(), st.binary()))
def test_responses_there_and_back(stored: StoredResponse) -> None:
    assert unpack_response(pack_response(stored)) == stored


@given(shown)
def test_presentations_there_and_back(presentation: Presentation) -> None:
    assert Presentation.unpack(presentation.pack()) == presentation


def test_claims_there_and_back() -> None:
    assert unpack_claim(pack_claim(CLAIM)) == CLAIM


@given(st.binary() | anything.map(msgpack.packb))
def test_foreign_bytes_are_refused_in_one_way(data: bytes) -> None:
    for unpack in (unpack_response, unpack_claim, Presentation.unpack):
        with pytest.raises(ProtocolError):
            unpack(data)


@given(st.data())
def test_a_record_with_one_field_replaced_is_read_or_refused(data: Any) -> None:
    for packed, unpack in (
        (pack_response(STORED), unpack_response),
        (pack_claim(CLAIM), unpack_claim),
        (SHOWN.pack(), Presentation.unpack),
    ):
        fields = msgpack.unpackb(packed)
        fields[data.draw(st.integers(0, len(fields) - 1))] = data.draw(anything)
        with suppress(ProtocolError):
            unpack(msgpack.packb(fields))


@given(st.integers(0, 200), st.integers(1, 255))
def test_a_flipped_byte_is_read_or_refused(at: int, flip: int) -> None:
    for packed, unpack in ((pack_response(STORED), unpack_response), (SHOWN.pack(), Presentation.unpack)):
        raw = bytearray(packed)
        raw[at % len(raw)] ^= flip
        with suppress(ProtocolError):
            unpack(bytes(raw))


@pytest.mark.parametrize(
    "changes",
    [
        {1: 2},
        {1: True},
        {2: "x" * 129},
        {3: -1},
        {3: True},
        {5: []},
        {5: ["r"] * (MAX_REQUESTS + 1)},
        {5: [b"r"]},
        {6: 1},
        {7: "text"},
    ],
)
def test_every_bound_of_a_stored_response(changes: dict[int, Any]) -> None:
    fields = msgpack.unpackb(pack_response(STORED))
    for at, value in changes.items():
        fields[at] = value
    with pytest.raises(ProtocolError):
        unpack_response(msgpack.packb(fields))


@pytest.mark.parametrize(
    ("name", "value"),
    [("kind", "other"), ("n", 0), ("n", 65), ("n", True), ("include_usage", 1), ("stops", ["a"] * 17), ("stops", [""])],
)
def test_every_bound_of_a_presentation(name: str, value: Any) -> None:
    fields = msgpack.unpackb(SHOWN.pack())
    fields[2 + list(Presentation.__slots__).index(name)] = value
    with pytest.raises(ProtocolError):
        Presentation.unpack(msgpack.packb(fields))


def test_a_presentation_has_what_the_formats_need_of_a_body() -> None:
    chat = validate(
        ChatBody,
        {
            **{"messages": MESSAGES, "n": 2, "stop": "x", "logprobs": True, "stream": True},
            "stream_options": {"include_usage": True},
        },
    )
    presentation = Presentation.of(chat)
    assert presentation == Presentation(CHAT, 2, include_usage=True, logprobs=True, stops=("x",))
    plain = validate(ChatBody, {"messages": MESSAGES})
    assert presentation.streamed_for(plain).include_usage is False
    text = validate(CompletionBody, {"prompt": "p", "echo": True, "max_tokens": 0, "prompt_logprobs": 1})
    assert Presentation.of(text, ("p",)) == Presentation(
        COMPLETION, prompt_logprobs=True, scores_only=True, echo_texts=("p",)
    )


def test_clients_have_keys_of_their_own() -> None:
    assert digest_of("a", "bc") != digest_of("ab", "c")
    assert len(digest_of("", "x")) == 64
