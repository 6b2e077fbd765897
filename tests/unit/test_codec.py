"""Every message survives the codec, and nothing else gets through it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.protocol.codec import (
    MAX_MESSAGE_BYTES,
    UnknownVersion,
    decode,
    decode_event,
    encode,
    encode_usage,
    unpack,
)
from shared.protocol.fields import MAX_TOKENS
from shared.protocol.messages import End, Job, Marker, TokenLogprob, Tokens, Usage, WorkerBeat
from shared.protocol.sampling import MAX_CHOICES, PROPOSER_NAMES, SamplingParams

finite = st.floats(allow_nan=False, allow_infinity=False)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=20).map(tuple)
names = st.text(max_size=40)
counts = st.integers(0, 2**53 - 1)
hashes = st.sampled_from(["", "0123456789abcdef"])
logprob = st.builds(
    TokenLogprob,
    st.floats(max_value=0, allow_nan=False),
    st.lists(st.tuples(st.integers(0, 1000), st.floats(max_value=0, allow_nan=False)), max_size=20).map(tuple),
)
params = st.builds(
    SamplingParams,
    max_tokens=st.integers(0, 1 << 20),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.integers(0, 1 << 20),
    temperature=finite,
    top_k=st.integers(0, 2**31 - 1),
    top_p=finite,
    min_p=finite,
    presence_penalty=finite,
    frequency_penalty=finite,
    repetition_penalty=finite,
    logit_bias=st.lists(st.tuples(st.integers(0, 1000), finite), max_size=5).map(tuple),
    stop_ids=ids,
    n=st.integers(1, MAX_CHOICES),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    proposers=st.none() | st.lists(st.sampled_from(PROPOSER_NAMES), max_size=3).map(tuple),
)
jobs = st.builds(
    Job,
    request_id=names,
    model=names,
    prompt_ids=ids,
    params=params,
    gateway=names,
    prefill_stream=names,
    decode_stream=names,
    adapter=names,
    tenant=names,
    priority=st.integers(-100, 100),
    budget_ms=counts,
)
usages = st.builds(Usage, names, names, names, counts, counts, counts, finite, counts, names, names)
ends = st.builds(End, st.sampled_from(["finished", "cancelled", "error"]), names, names, st.integers(-1, 99), usages)
beats = st.builds(
    WorkerBeat,
    worker_id=names,
    role=st.sampled_from(["prefill", "decode"]),
    state=names,
    model=names,
    numerics=names,
    layout=names,
    addresses=st.lists(st.tuples(names, names), max_size=3).map(tuple),
    progress=finite,
    running=counts,
    tokens_per_second=finite,
    pid=counts,
    max_num_seqs=counts,
    dead_workers_swept=counts,
    requests_swept=counts,
    own_entries_swept=counts,
    orphans_cancelled=counts,
)


@st.composite
def tokens_events(draw: st.DrawFn) -> Tokens:
    tokens = draw(ids | st.tuples(st.integers(0, 2**31 - 1)))
    logprobs = draw(st.just(()) | st.tuples(*[logprob] * len(tokens)))
    prompt = draw(st.lists(st.none() | logprob, max_size=4).map(tuple))
    finish = draw(st.sampled_from([None, "stop", "length"]))
    return Tokens(
        draw(st.integers(0, MAX_CHOICES - 1)), draw(st.integers(0, 99)), draw(hashes), draw(hashes), tokens, logprobs,
        finish, prompt,
    )  # fmt: skip


@st.composite
def markers(draw: st.DrawFn) -> Marker:
    at = draw(st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple))
    return Marker(at, draw(st.just(()) | st.tuples(*[ids] * len(at))))


@given(st.one_of(jobs, tokens_events(), markers(), ends, beats))
def test_a_message_comes_back_as_it_was(message: Any) -> None:
    assert decode(type(message), encode(message)) == message


@given(st.one_of(tokens_events(), markers(), ends))
def test_an_event_is_found_by_its_kind(event: Any) -> None:
    kind = {Tokens: b"T", Marker: b"M", End: b"E"}[type(event)]
    assert decode_event(kind, encode(event)) == event


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_protocol_error(data: bytes) -> None:
    classes: tuple[Any, ...] = (Job, Tokens, Marker, End, WorkerBeat)
    for cls in classes:
        with pytest.raises(ProtocolError):
            decode(cls, data)


@given(jobs, st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_gives_a_job_or_a_protocol_error(job: Job, at: int, value: int) -> None:
    data = bytearray(encode(job))
    data[at % len(data)] = value
    try:
        changed = decode(Job, bytes(data))
    except ProtocolError:
        return
    assert isinstance(changed.prompt_ids, tuple)
    assert 1 <= changed.params.n <= MAX_CHOICES


TOKENS = Tokens(0, 2, "0" * 16, "1" * 16, (7, 8))


def altered(position: int, value: object, message: Any = TOKENS) -> bytes:
    items = msgpack.unpackb(encode(message))
    items[position] = value
    return bytes(msgpack.packb(items))


@pytest.mark.parametrize(
    "message", [pytest.param(TOKENS, id="two tokens"), pytest.param(replace(TOKENS, tokens=(7,)), id="one token")]
)
@pytest.mark.parametrize(
    ("position", "value"),
    [
        pytest.param(2, True, id="bool for choice"),
        pytest.param(2, MAX_CHOICES, id="choice out of range"),
        pytest.param(3, -1, id="negative base"),
        pytest.param(4, "12", id="short hash"),
        pytest.param(3, MAX_TOKENS + 1, id="base out of range"),
        pytest.param(5, b"1" * 16, id="bytes for a hash"),
        pytest.param(6, [-5], id="one negative token"),
        pytest.param(6, [2**31], id="one token too large"),
        pytest.param(6, [True], id="one bool token"),
        pytest.param(6, [1, -5], id="negative token"),
        pytest.param(6, [1, 2**31], id="token too large"),
        pytest.param(6, [1.0, 2], id="float token"),
        pytest.param(6, [True, 2], id="bool token"),
        pytest.param(6, None, id="no tokens"),
        pytest.param(7, [[-1.0, []]] * 3, id="three log-probs"),
        pytest.param(7, None, id="no log-probs"),
        pytest.param(9, None, id="no prompt log-probs"),
        pytest.param(7, [[float("nan"), []], [-1.0, []]], id="nan"),
        pytest.param(8, "because", id="finish"),
    ],
)
def test_a_field_out_of_its_bounds_is_refused(position: int, value: object, message: Tokens) -> None:
    with pytest.raises(ProtocolError):
        decode(Tokens, altered(position, value, message))


def test_a_newer_version_is_told_apart() -> None:
    with pytest.raises(UnknownVersion, match="version 2"):
        decode(Tokens, altered(1, 2))
    with pytest.raises(ProtocolError) as caught:
        decode(Tokens, altered(1, 0))
    assert not isinstance(caught.value, UnknownVersion)


def test_a_message_of_another_class_is_refused() -> None:
    with pytest.raises(ProtocolError, match="tag 'M'"):
        decode(Marker, encode(TOKENS))
    with pytest.raises(ProtocolError, match="unknown kind"):
        decode_event(b"X", encode(TOKENS))


def test_too_many_fields_or_bytes_are_refused() -> None:
    with pytest.raises(ProtocolError, match="8 fields"):
        decode(Tokens, msgpack.packb([*msgpack.unpackb(encode(TOKENS)), 1]))
    with pytest.raises(ProtocolError, match="larger"):
        decode(Tokens, bytes(MAX_MESSAGE_BYTES + 1))


def test_a_beat_of_an_older_worker_reads_as_zeros_where_it_says_nothing() -> None:
    beat = WorkerBeat("w", "decode", "ready", "m", "n", "l", equal_tokens=True, max_num_seqs=32)
    swept = replace(beat, dead_workers_swept=1, requests_swept=2, own_entries_swept=3, orphans_cancelled=4)
    guessed = replace(swept, generated_tokens=9, sequence_steps=5, drafted=(4, 3), accepted=(2, 1))
    items = msgpack.unpackb(encode(guessed))
    assert items[-9:] == [32, 1, 2, 3, 4, 9, 5, [4, 3], [2, 1]], "the order on the wire"
    assert decode(WorkerBeat, msgpack.packb(items[:-4])) == swept
    assert decode(WorkerBeat, msgpack.packb(items[:-8])) == beat
    assert decode(WorkerBeat, msgpack.packb(items[:-9])) == replace(beat, max_num_seqs=0)
    for wrong in (items[:-10], *(items[:-cut] for cut in (1, 2, 3, 5, 6, 7)), [*items, 1]):
        with pytest.raises(ProtocolError, match="fields"):
            decode(WorkerBeat, msgpack.packb(wrong))


def test_maps_and_extension_types_are_refused() -> None:
    for data in (msgpack.packb({"a": 1}), msgpack.packb(msgpack.ExtType(1, b"x")), b"\x93" * 5000):
        with pytest.raises(ProtocolError):
            unpack(data)


def test_a_job_with_an_absurd_n_is_refused() -> None:
    job = Job("r", "m", (1,), SamplingParams(max_tokens=1, seed=1), "g", "p", "d")
    with pytest.raises(ProtocolError, match=r"1\.\.64"):
        decode(Job, encode(replace(job, params=replace(job.params, n=10**9))))


def test_usage_left_out_by_a_script_is_the_default() -> None:
    end = msgpack.packb(["E", 1, "error", "deadline_exceeded", "", -1, []])
    assert decode(End, end) == End("error", "deadline_exceeded")


@given(usages)
def test_usage_spliced_into_an_end_is_that_usage(usage: Usage) -> None:
    end = b"\x97" + b"".join(msgpack.packb(item) for item in ("E", 1, "finished", "", "", -1)) + encode_usage(usage)
    assert decode(End, end).usage == usage
