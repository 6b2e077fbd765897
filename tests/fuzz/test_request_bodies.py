"""Any bytes and any JSON as a request: it is planned, or refused as the caller's fault, and nothing else happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.errors import to_api_error
from services.gateway.health import ClusterView
from services.gateway.params import Limits, SamplingDefaults
from services.gateway.prepare import Plan, PlanLimits, Planner, ServedModel
from services.gateway.schemas import (
    UNSUPPORTED,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    check_size,
    parse_json,
    validate,
)
from services.gateway.text import TextService
from shared.errors import RequestError
from shared.protocol.codec import decode, encode
from shared.protocol.keys import Keys
from shared.protocol.messages import Job
from tests.gateway_rig import CODEC, CONTEXT, MESSAGES, MODEL

KINDS: list[type[Body]] = [ChatBody, CompletionBody, TokenizeBody, DetokenizeBody]
REFUSED = range(400, 500)

numbers = st.one_of(
    st.integers(-3, 70),
    st.integers(-(2**70), 2**70),
    st.sampled_from([10**30, -(10**400), 2**31, 2**63, 2**64, CODEC.vocab_size, CONTEXT]),
    st.floats(allow_nan=True, allow_infinity=True),
)
texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", "user", "assistant", "tool", "text", "image_url", "<|im_end|>", "\0", "x" * 2000]),
)
names = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["role", "content", "type", "text", "name", "include_usage", "tool_calls", "1", "-1", "__class__"]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(names, inner, max_size=6)),
    max_leaves=20,
)
deep = st.integers(17, 900).map(lambda depth: json.loads("[" * depth + "]" * depth))
known = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *TokenizeBody.model_fields})
fields = st.one_of(*[st.sampled_from(known)] * 9, st.sampled_from(sorted(UNSUPPORTED)))


class AllReady(ClusterView):
    """A cluster in which every model has its workers; nothing of the bus is touched."""

    def __init__(self) -> None:
        pass

    def require_ready(self) -> None:
        pass

    def limits(self, context: int, vocab_size: int) -> Limits:
        return Limits(context, vocab_size)


@pytest.fixture(scope="module")
def planner() -> Iterator[Planner]:
    text = TextService(CODEC, CODEC.vocab_size, CONTEXT, threads=1, timeout_s=30)
    model = ServedModel(MODEL, CONTEXT, SamplingDefaults(), 0)
    limits = PlanLimits(max_prompts=4, max_messages=8, budget_ms=1000)
    yield Planner(model, text, cast(ClusterView, AllReady()), Keys("fuzz"), "gw", limits)
    text.close()


def plan(planner: Planner, kind: type[Body], raw: bytes) -> Plan | Body | None:
    """What the gateway makes of a body; None when it refuses it."""
    try:
        check_size(raw, 10_000)
        body = validate(kind, parse_json(raw))
        if isinstance(body, ChatBody | CompletionBody):
            return asyncio.run(planner.plan(body, "key"))
    except RequestError as exc:
        error = to_api_error(exc)
        assert error.status in REFUSED
        json.loads(error.body())
        assert len(error.message) < 600
        return None
    return body


def check_jobs(made: Plan | Body | None) -> None:
    """What was planned can be written to the bus and is within its bounds."""
    if not isinstance(made, Plan):
        return
    assert made.jobs
    for job in made.jobs:
        assert decode(Job, encode(job)) == job
        assert 0 < len(job.prompt_ids) < CONTEXT
        assert len(job.prompt_ids) + job.params.max_tokens <= CONTEXT


@settings(max_examples=150, deadline=None)
@given(raw=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_bytes(planner: Planner, raw: bytes) -> None:
    for kind in KINDS:
        plan(planner, kind, raw)


@settings(max_examples=150, deadline=None)
@given(body=values)
def test_any_json(planner: Planner, body: Any) -> None:
    for kind in KINDS:
        check_jobs(plan(planner, kind, as_json(body)))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.dictionaries(fields, st.one_of(values, deep), max_size=4), whole=st.booleans())
def test_any_value_in_any_field(planner: Planner, body: dict[str, Any], whole: bool) -> None:
    needed: dict[str, Any] = {"messages": MESSAGES, "prompt": "Hello"} if whole else {}
    for kind in KINDS[:2]:
        check_jobs(plan(planner, kind, as_json({**needed, **body})))
    for kind in KINDS[2:]:
        plan(planner, kind, as_json(body))


@settings(max_examples=150, deadline=None)
@given(messages=st.lists(st.dictionaries(names, values, max_size=4), max_size=4), variables=values)
def test_any_messages_and_variables(planner: Planner, messages: Any, variables: Any) -> None:
    raw = as_json({"messages": messages, "chat_template_kwargs": variables})
    check_jobs(plan(planner, ChatBody, raw))
    plan(planner, TokenizeBody, raw)


def test_the_checks_would_fire(planner: Planner) -> None:
    made = plan(planner, ChatBody, as_json({"messages": MESSAGES}))
    assert isinstance(made, Plan)
    check_jobs(made)
    assert plan(planner, ChatBody, b"{bad") is None


def as_json(body: Any) -> bytes:
    return json.dumps(body).encode()
