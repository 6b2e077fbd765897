"""Bytes of the bus messages: msgpack `[tag, version, field, ...]`, with a bound on every length.

What comes from Redis is only half trusted: every field's type and range is checked before an
object exists, and anything else raises ProtocolError. A message of a newer version raises
UnknownVersion, so that a rolling upgrade can leave it to others. The Lua scripts build `Marker`
and `End` themselves (`shared/bus/scripts/common.lua`): change them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import msgpack

from shared.errors import ProtocolError
from shared.protocol.beats import pack_beat, unpack_beat
from shared.protocol.fields import MAX_TEXT, MAX_TOKEN_ID, MAX_TOKENS, Fields
from shared.protocol.messages import (
    FINISH_LENGTH,
    FINISH_STOP,
    OUTCOME_CANCELLED,
    OUTCOME_ERROR,
    OUTCOME_FINISHED,
    PROTOCOL_VERSION,
    End,
    Event,
    Job,
    Marker,
    TokenLogprob,
    Tokens,
    Usage,
    WorkerBeat,
)
from shared.protocol.sampling import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_IDS,
    PROPOSER_NAMES,
    SamplingParams,
)

MAX_MESSAGE_BYTES = 32 << 20
_MAX_SEED = (1 << 64) - 1

Message = Job | Marker | Tokens | End | WorkerBeat
M = TypeVar("M", Job, Marker, Tokens, End, WorkerBeat, Usage)


class UnknownVersion(ProtocolError):
    """A message written by a newer release; leave it for a process that knows it."""


def encode(message: Message) -> bytes:
    """Bytes of a message; the inverse of `decode`."""
    return cast(bytes, msgpack.packb(_PACK[type(message)](message)))


def decode(cls: type[M], data: bytes) -> M:
    """The message of class `cls` in `data`; raises ProtocolError when it is anything else."""
    tag, unpack = _UNPACK[cls]
    fields = _unpack_array(data, tag)
    return cast(M, unpack(fields))


def decode_event(kind: bytes, data: bytes) -> Event:
    """The journal event of kind b"T", b"M" or b"E"."""
    cls = _EVENTS.get(kind)
    if cls is None:
        raise ProtocolError(f"unknown kind of journal entry {kind[:16]!r}")
    event: Event = _UNPACK[cls][1](_unpack_array(data, _UNPACK[cls][0]))
    return event


def encode_usage(usage: Usage) -> bytes:
    """The bare field array of a Usage, which the scripts splice into the terminal entry."""
    return cast(bytes, msgpack.packb(_pack_usage(usage)))


def unpack(data: bytes) -> Any:
    """msgpack with bounds, for the scripts' own arrays; strings stay bytes."""
    return _unpackb(data, raw=True)


def _unpackb(data: bytes, *, raw: bool) -> Any:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes is larger than {MAX_MESSAGE_BYTES}")
    try:
        return msgpack.unpackb(
            data, raw=raw, strict_map_key=True, max_array_len=MAX_TOKENS, max_map_len=0, max_ext_len=0
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(f"a message is not valid msgpack: {type(error).__name__}") from None


def _unpack_array(data: bytes, tag: str) -> list[Any]:
    items = _unpackb(data, raw=False)
    if type(items) is not list or len(items) < 2 or type(items[1]) is not int:
        raise ProtocolError("a message is not an array of a tag, a version and fields")
    if items[0] != tag:
        raise ProtocolError(f"expected a message of tag {tag!r}")
    if items[1] > PROTOCOL_VERSION:
        raise UnknownVersion(f"message {tag!r} has version {items[1]}; this process knows {PROTOCOL_VERSION}")
    if items[1] != PROTOCOL_VERSION:
        raise ProtocolError(f"message {tag!r} has version {items[1]}")
    return items[2:]


def _pack_logprob(value: TokenLogprob | None) -> list[Any] | None:
    return None if value is None else [value.logprob, value.top]


def _logprob(value: object) -> TokenLogprob:
    fields = Fields(value, "a log-prob", 2)
    logprob = _probability(fields.take())
    top: list[tuple[int, float]] = []
    for item in fields.array(MAX_LOGPROBS):
        pair = Fields(item, "an alternative", 2)
        top.append((pair.integer(0, MAX_TOKEN_ID), _probability(pair.take())))
    return TokenLogprob(logprob, tuple(top))


def _probability(value: object) -> float:
    if type(value) is not float or math.isnan(value) or value == math.inf:
        raise ProtocolError("a log-probability is not a number below infinity")
    return value


def _pack_tokens(t: Tokens) -> list[Any]:
    logprobs = [_pack_logprob(value) for value in t.logprobs]
    prompt = [_pack_logprob(value) for value in t.prompt_logprobs]
    return ["T", PROTOCOL_VERSION, t.choice, t.base, t.h_base, t.h, t.tokens, logprobs, t.finish, prompt]


def _unpack_tokens(items: list[Any]) -> Tokens:
    return _one_token(items) or _any_tokens(items)


def _one_token(items: list[Any]) -> Tokens | None:
    """The entry of nearly every step, one token and nothing beside it; None: this is another, or not valid."""
    if len(items) != 8:
        return None
    choice, base, h_base, h, tokens, logprobs, finish, prompt = items
    is_plain = (
        type(tokens) is list
        and len(tokens) == 1
        and finish is None
        and logprobs == []
        and prompt == []
        and type(choice) is type(base) is type(tokens[0]) is int
        and type(h_base) is type(h) is str
    )
    if not is_plain:
        return None
    token = tokens[0]
    in_bounds = 0 <= choice < MAX_CHOICES and 0 <= base <= MAX_TOKENS and 0 <= token <= MAX_TOKEN_ID
    if not in_bounds or len(h_base) not in (0, 16) or len(h) not in (0, 16):
        return None
    return Tokens(choice, base, h_base, h, (token,))


def _any_tokens(items: list[Any]) -> Tokens:
    f = Fields(items, "Tokens", 8)
    choice, base, h_base, h, tokens = (
        f.integer(0, MAX_CHOICES - 1),
        f.integer(0, MAX_TOKENS),
        f.hash(),
        f.hash(),
        f.ids(),
    )
    logprobs = tuple(map(_logprob, f.array(MAX_TOKENS)))
    if logprobs and len(logprobs) != len(tokens):
        raise ProtocolError(f"Tokens has {len(tokens)} tokens but {len(logprobs)} log-probs")
    finish = f.take()
    if finish is not None and finish not in (FINISH_STOP, FINISH_LENGTH):
        raise f.bad("a finish reason")
    prompt = tuple(None if value is None else _logprob(value) for value in f.array(MAX_TOKENS))
    return Tokens(choice, base, h_base, h, tokens, logprobs, finish, prompt)


def _pack_marker(m: Marker) -> list[Any]:
    return ["M", PROTOCOL_VERSION, m.at, m.tokens]


def _unpack_marker(items: list[Any]) -> Marker:
    f = Fields(items, "Marker", 2)
    at = f.ids(MAX_CHOICES, MAX_TOKENS)
    lists = f.array(MAX_CHOICES)
    tokens = tuple(Fields([ids], "Marker", 1).ids() for ids in lists)
    if tokens and len(tokens) != len(at):
        raise ProtocolError(f"Marker has {len(at)} choices but tokens of {len(tokens)}")
    return Marker(at, tokens)


def _pack_usage(u: Usage) -> list[Any]:
    return [
        u.path,
        u.reason,
        u.transport,
        u.kv_bytes,
        u.prefill_cached_tokens,
        u.decode_cached_tokens,
        float(u.handoff_ms),
        u.preemptions,
        u.prefill_worker,
        u.decode_worker,
    ]


def _unpack_usage(items: object) -> Usage:
    if items == []:
        return Usage()
    f = Fields(items, "Usage", 10)
    return Usage(
        f.text(), f.text(), f.text(), f.integer(), f.integer(), f.integer(), f.number(), f.integer(), f.text(), f.text()
    )  # fmt: skip


def _pack_end(e: End) -> list[Any]:
    return ["E", PROTOCOL_VERSION, e.outcome, e.code, e.message, e.upto, _pack_usage(e.usage)]


def _unpack_end(items: list[Any]) -> End:
    f = Fields(items, "End", 5)
    outcome = f.word(OUTCOME_FINISHED, OUTCOME_CANCELLED, OUTCOME_ERROR)
    return End(outcome, f.text(), f.text(MAX_TEXT), f.integer(-1, MAX_TOKENS), _unpack_usage(f.take()))


def _pack_params(p: SamplingParams) -> list[Any]:
    floats = (p.temperature, p.top_p, p.min_p, p.presence_penalty, p.frequency_penalty, p.repetition_penalty)
    bias = [(token, float(value)) for token, value in p.logit_bias]
    return [
        *(p.max_tokens, p.seed, p.min_tokens, p.top_k, p.n, p.logprobs, p.prompt_logprobs),
        *map(float, floats),
        bias,
        p.stop_ids,
        p.proposers,
    ]


def _unpack_params(items: object) -> SamplingParams:
    f = Fields(items, "SamplingParams", 16)
    max_tokens, seed, min_tokens = f.integer(0, MAX_TOKENS), f.integer(0, _MAX_SEED), f.integer(0, MAX_TOKENS)
    top_k, n = f.integer(0, MAX_TOKEN_ID), f.integer(1, MAX_CHOICES)
    logprobs, prompt_logprobs = f.optional_int(MAX_LOGPROBS), f.optional_int(MAX_LOGPROBS)
    temperature, top_p, min_p = f.number(), f.number(), f.number()
    presence, frequency, repetition = f.number(), f.number(), f.number()
    pairs = [Fields(item, "a logit bias", 2) for item in f.array(MAX_LOGIT_BIAS)]
    bias = tuple((pair.integer(0, MAX_TOKEN_ID), pair.number()) for pair in pairs)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=bias,
        stop_ids=f.ids(MAX_STOP_IDS),
        n=n,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        proposers=f.optional_words(*PROPOSER_NAMES),
    )


def _pack_job(j: Job) -> list[Any]:
    names = (j.request_id, j.model, j.gateway, j.prefill_stream, j.decode_stream, j.adapter, j.tenant)
    return ["J", PROTOCOL_VERSION, *names, j.priority, j.budget_ms, j.prompt_ids, _pack_params(j.params)]


def _unpack_job(items: list[Any]) -> Job:
    f = Fields(items, "Job", 11)
    request_id, model, gateway, prefill, decode_stream = f.text(), f.text(), f.text(), f.text(), f.text()
    adapter, tenant, priority, budget_ms = f.text(), f.text(), f.integer(-MAX_TOKEN_ID, MAX_TOKEN_ID), f.integer()
    return Job(
        request_id=request_id,
        model=model,
        prompt_ids=f.ids(),
        params=_unpack_params(f.take()),
        gateway=gateway,
        prefill_stream=prefill,
        decode_stream=decode_stream,
        adapter=adapter,
        tenant=tenant,
        priority=priority,
        budget_ms=budget_ms,
    )


_PACK: dict[type, Callable[[Any], list[Any]]] = {
    Tokens: _pack_tokens,
    Marker: _pack_marker,
    End: _pack_end,
    Job: _pack_job,
    WorkerBeat: pack_beat,
}
_UNPACK: dict[type, tuple[str, Callable[[list[Any]], Any]]] = {
    Tokens: ("T", _unpack_tokens),
    Marker: ("M", _unpack_marker),
    End: ("E", _unpack_end),
    Job: ("J", _unpack_job),
    WorkerBeat: ("W", unpack_beat),
}
_EVENTS: dict[bytes, type[Tokens] | type[Marker] | type[End]] = {b"T": Tokens, b"M": Marker, b"E": End}
