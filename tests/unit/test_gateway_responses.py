"""The JSON of answers and chunks, checked as clients read it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from services.gateway.choices import Delta
from services.gateway.generation import UsageTotals
from services.gateway.prepare import Plan
from services.gateway.presentation import Presentation
from services.gateway.responses import Answer, make_format, usage_object
from services.gateway.schemas import ChatBody, CompletionBody, validate
from services.gateway.scores import MIN_LOGPROB, finite, prompt_logprobs
from shared.protocol.messages import Job, TokenLogprob, Usage
from shared.protocol.sampling import SamplingParams
from tests.gateway_rig import CODEC

HELLO = tuple(CODEC.encode("Hello there"))
USAGE = UsageTotals(3, 2, (Usage(transport="shm", kv_bytes=5, prefill_cached_tokens=1),))


def make_plan(kind: type[ChatBody] | type[CompletionBody], texts: tuple[str, ...] = (), **fields: Any) -> Plan:
    given = {"messages": [{"role": "user", "content": "x"}]} if kind is ChatBody else {"prompt": "x"}
    body = validate(kind, {**given, **fields})
    job = Job("r", "m", HELLO, SamplingParams(max_tokens=5, seed=1, n=body.n), "g", "p", "d")
    return Plan("id-1", 1700000000, Presentation.of(body, texts), (job,) * max(1, len(texts)))


def score(logprob: float, *top: tuple[int, float]) -> TokenLogprob:
    return TokenLogprob(logprob, top)


NASTY = 'a "quote" \\ back\nslash \u2028 😀 </script>\x00'


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody])
def test_a_chunk_is_valid_json_whatever_the_text(kind: Any) -> None:
    layout = make_format(make_plan(kind), 'mo"del', CODEC)
    chunk = json.loads(layout.chunk(Delta(0, NASTY, (1,), "1-1"), None))
    choice = chunk["choices"][0]
    assert (choice["delta"]["content"] if kind is ChatBody else choice["text"]) == NASTY
    assert (chunk["model"], chunk["id"], chunk["created"]) == ('mo"del', "id-1", 1700000000)
    assert choice["finish_reason"] is None
    assert "usage" not in chunk
    assert "\n" not in layout.chunk(Delta(0, NASTY, (1,), "1-1"), None), "an SSE data line has no line break"


def test_the_last_chat_chunk_has_an_empty_delta_unless_text_comes_with_it() -> None:
    layout = make_format(make_plan(ChatBody), "m", CODEC)
    last = json.loads(layout.chunk(Delta(0, "", (), "1-1", finish_reason="stop", stop_reason="###"), None))
    assert last["choices"][0]["delta"] == {}
    assert (last["choices"][0]["finish_reason"], last["choices"][0]["stop_reason"]) == ("stop", "###")
    both = json.loads(layout.chunk(Delta(0, "x", (), "1-1", finish_reason="length"), None))
    assert both["choices"][0]["delta"] == {"content": "x"}


def test_usage_in_a_stream() -> None:
    silent = make_format(make_plan(ChatBody, stream=True), "m", CODEC)
    assert "usage" not in json.loads(silent.opening()[0])
    layout = make_format(make_plan(ChatBody, stream=True, stream_options={"include_usage": True}), "m", CODEC)
    assert json.loads(layout.opening()[0])["usage"] is None
    assert json.loads(layout.chunk(Delta(0, "x", (1,), "1-1"), USAGE))["usage"]["completion_tokens"] == 2
    last = json.loads(layout.usage_chunk(USAGE))
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 5)


def test_the_opening_has_the_role_of_every_choice() -> None:
    layout = make_format(make_plan(ChatBody, n=2, return_token_ids=True), "m", CODEC)
    chunks = [json.loads(chunk) for chunk in layout.opening()]
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1]
    assert chunks[0]["prompt_token_ids"] == list(HELLO)
    assert make_format(make_plan(CompletionBody), "m", CODEC).opening() == []
    echo = make_format(make_plan(CompletionBody, ("p",), echo=True, n=2), "m", CODEC)
    assert [json.loads(chunk)["choices"][0]["text"] for chunk in echo.opening()] == ["p", "p"]


def test_chat_logprobs_have_bytes_and_alternatives() -> None:
    plan = make_plan(ChatBody, logprobs=True, top_logprobs=2)
    layout = make_format(plan, "m", CODEC)
    token, other = HELLO[:2]
    scored = score(-0.5, (token, -0.5), (other, -math.inf))
    chunk = json.loads(layout.chunk(Delta(0, "x", (token,), "1-1", (scored,)), None))
    [content] = chunk["choices"][0]["logprobs"]["content"]
    text = CODEC.token_text(token)
    assert (content["token"], content["logprob"], bytes(content["bytes"]).decode()) == (text, -0.5, text)
    assert [one["logprob"] for one in content["top_logprobs"]] == [-0.5, MIN_LOGPROB]
    answer = Answer(["x"], [token], [scored], "stop", None)
    whole = layout.whole([answer], [()], USAGE)
    assert whole["choices"][0]["logprobs"]["content"] == [content]
    json.dumps(whole, allow_nan=False)


def test_completion_logprobs_are_columns_with_offsets_into_the_text() -> None:
    layout = make_format(make_plan(CompletionBody, logprobs=1), "m", CODEC)
    scored = tuple(score(-1.0, (token, -1.0)) for token in HELLO)
    texts = [CODEC.token_text(token) for token in HELLO]
    first = json.loads(layout.chunk(Delta(0, texts[0], HELLO[:1], "1-1", scored[:1]), None))
    second = json.loads(layout.chunk(Delta(0, "".join(texts[1:]), HELLO[1:], "1-2", scored[1:]), None))
    table = second["choices"][0]["logprobs"]
    assert first["choices"][0]["logprobs"]["text_offset"] == [0]
    assert table["tokens"] == texts[1:]
    assert table["text_offset"][0] == len(texts[0])
    assert table["top_logprobs"][0] == {texts[1]: -1.0}


def test_echo_with_logprobs_scores_the_prompt_first() -> None:
    plan = make_plan(CompletionBody, ("Hello there",), echo=True, logprobs=1)
    layout = make_format(plan, "m", CODEC)
    prompt_scores = (None, *(score(-1.0, (token, -1.0)) for token in HELLO[1:]))
    new = CODEC.encode("!")
    answer = Answer(["!"], list(new), [score(-2.0, (new[0], -2.0))], "length", None)
    choice = layout.whole([answer], [prompt_scores], USAGE)["choices"][0]
    assert choice["text"] == "Hello there!"
    table = choice["logprobs"]
    assert table["token_logprobs"] == [None, *[-1.0] * (len(HELLO) - 1), -2.0]
    assert table["top_logprobs"][0] is None
    assert table["tokens"] == [CODEC.token_text(token) for token in (*HELLO, *new)]
    assert table["text_offset"][-1] == len("Hello there")
    assert len({len(column) for column in table.values()}) == 1


def test_alternatives_with_the_same_text_keep_the_better() -> None:
    layout = make_format(make_plan(CompletionBody, logprobs=2), "m", CODEC)
    broken = CODEC.encode("ζ")
    scored = score(-3.0, (broken[0], -0.1), (broken[1], -0.2))
    answer = Answer(["x"], [HELLO[0]], [scored], "stop", None)
    row = layout.whole([answer], [()], USAGE)["choices"][0]["logprobs"]["top_logprobs"][0]
    assert row == {"\ufffd": -0.1, CODEC.token_text(HELLO[0]): -3.0}


def test_prompt_logprobs_by_id_with_rank() -> None:
    a, b = HELLO[:2]
    table = prompt_logprobs(CODEC, (a, b), (None, score(-2.0, (a, -0.5))))
    assert table[0] is None
    assert table[1] == {
        str(a): {"logprob": -0.5, "rank": 1, "decoded_token": CODEC.token_text(a)},
        str(b): {"logprob": -2.0, "rank": None, "decoded_token": CODEC.token_text(b)},
    }


def test_token_ids_on_request() -> None:
    answer = Answer(["x"], [5, 6], [], "stop", None)
    chat = make_format(make_plan(ChatBody, return_token_ids=True), "m", CODEC).whole([answer], [()], USAGE)
    assert (chat["choices"][0]["token_ids"], chat["prompt_token_ids"]) == ([5, 6], list(HELLO))
    text = make_format(make_plan(CompletionBody, return_token_ids=True), "m", CODEC).whole([answer], [()], USAGE)
    assert text["choices"][0]["prompt_token_ids"] == list(HELLO)
    plain = make_format(make_plan(ChatBody), "m", CODEC).whole([answer], [()], USAGE)
    assert "token_ids" not in plain["choices"][0]


def test_usage_tells_which_way_the_jobs_went() -> None:
    remote = Usage(transport="shm", kv_bytes=5, prefill_cached_tokens=4, decode_cached_tokens=9, handoff_ms=1.23456)
    local = Usage("recompute", "digest", "shm", 0, 1, 2, 7.0, 3)
    one = usage_object(UsageTotals(10, 5, (remote,)))
    assert one["prompt_tokens_details"] == {"cached_tokens": 4}
    assert one["slipstream"]["handoff_ms"] == 1.235
    two = usage_object(UsageTotals(10, 5, (remote, local)))
    assert two["prompt_tokens_details"] == {"cached_tokens": 6}, "a recompute is served by decode's own cache"
    assert (two["slipstream"]["path"], two["slipstream"]["transport"]) == ("mixed", "shm")
    assert (two["slipstream"]["preemptions"], two["slipstream"]["handoff_ms"]) == (3, 7.0)
    assert usage_object(UsageTotals(1, 0, ()))["slipstream"]["path"] == ""


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan, -1e9])
def test_json_has_no_infinity(value: float) -> None:
    assert finite(value) == MIN_LOGPROB
    assert finite(-0.5) == -0.5
