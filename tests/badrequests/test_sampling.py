"""Bad requests, rows 40 to 63: sampling parameters and the other fields of a generation."""

from __future__ import annotations

import math

import pytest

from tests.badrequests.cases import (
    NO_TOKEN,
    Case,
    chat,
    check_accepted,
    check_refused,
    completion,
    each_value,
    parametrize,
)
from tests.gateway_rig import COMPLETIONS, Rig

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAN, INF = math.nan, math.inf
UNSUPPORTED = "unsupported_parameter"

REFUSED = [
    *each_value(40, "temperature", [-0.1, 2.1, "hot", NAN, INF, True, 10**400]),
    *each_value(41, "top_p", [0, 1.1, -1, "x", NAN]),
    *each_value(42, "top_k", [-2, 1.5, "5", True, 2**70]),
    *each_value(43, "min_p", [-0.1, 1.1, NAN]),
    *each_value(44, "presence_penalty", [2.1, -2.1, "x"]),
    *each_value(44, "frequency_penalty", [2.1, -2.1, True]),
    *each_value(45, "repetition_penalty", [0, -1, INF, 10**400]),
    *each_value(46, "max_tokens", [0, -1, 1.5, 2**63, True, "7"]),
    Case(46, "max_completion_tokens 0", chat(max_completion_tokens=0), param="max_completion_tokens"),
    Case(46, "two limits that differ", chat(max_tokens=4, max_completion_tokens=5), param="max_tokens"),
    *each_value(47, "min_tokens", [-1, 1.5]),
    Case(47, "min_tokens over max_tokens", chat(min_tokens=5, max_tokens=4), param="min_tokens"),
    Case(47, "min_tokens over the room there is", chat(min_tokens=10**6), param="min_tokens"),
    *each_value(48, "n", [0, -1, 65, 10**9, True, 1.0]),
    *each_value(49, "seed", [2**64, -(2**63) - 1, "x", 1.5, True, 10**4000]),
    Case(50, "logprobs a word", chat(logprobs="abc"), param="logprobs"),
    Case(50, "logprobs a number in chat", chat(logprobs=1), param="logprobs"),
    Case(50, "logprobs a word in text", completion(logprobs="abc"), 400, "invalid_value", "logprobs", COMPLETIONS),
    Case(50, "logprobs true in text", completion(logprobs=True), 400, "invalid_value", "logprobs", COMPLETIONS),
    Case(50, "logprobs -2", completion(logprobs=-2), 400, "invalid_value", "logprobs", COMPLETIONS),
    Case(50, "logprobs 21", completion(logprobs=21), 400, "invalid_value", "logprobs", COMPLETIONS),
    Case(50, "top_logprobs without logprobs", chat(top_logprobs=3), param="top_logprobs"),
    Case(50, "top_logprobs 21", chat(top_logprobs=21, logprobs=True), param="top_logprobs"),
    *each_value(51, "prompt_logprobs", [-1, 21, True]),
    Case(51, "prompt_logprobs streamed", chat(prompt_logprobs=1, stream=True), param="prompt_logprobs"),
    Case(
        *(51, "echo with logprobs streamed", completion(echo=True, logprobs=1, stream=True), 400),
        *("invalid_value", "logprobs", COMPLETIONS),
    ),
    *each_value(52, "stop", ["", [""], ["x"] * 17, "x" * (1 << 19), 7, ["a", 1], [["a"]], {"a": "b"}]),
    *each_value(53, "stop_token_ids", [["a"], [-1], [True], "1", [NO_TOKEN], [2**40], [0] * 100_000]),
    *each_value(54, "logit_bias", [{"x": 1}, {"-1": 1}, {"²": 1}, {"1.5": 1}, {str(NO_TOKEN): 1}, {"9" * 30: 1}]),
    *each_value(54, "logit_bias", [{"1": 101}, {"1": -101}, {"1": True}, {"1": "x"}, {"1": NAN}, {"1": None}, []]),
    *each_value(54, "logit_bias", [{str(token): 1 for token in range(20_000)}]),
    *each_value(55, "bad_words", [["x"], [""]], UNSUPPORTED),
    *each_value(55, "allowed_token_ids", [[], [NO_TOKEN]], UNSUPPORTED),
    *each_value(57, "best_of", [2], UNSUPPORTED),
    *each_value(57, "best_of", [0, 65, "x"]),
    *each_value(57, "suffix", ["the end of it"], UNSUPPORTED),
    *each_value(57, "length_penalty", [1.5, True], UNSUPPORTED),
    *each_value(57, "use_beam_search", [True], UNSUPPORTED),
    *each_value(57, "modalities", [["text", "audio"]], UNSUPPORTED),
    Case(57, "echo in chat", chat(echo=True), param="echo"),
    Case(59, "stream_options without stream", chat(stream_options={"include_usage": True}), param="stream_options"),
    Case(59, "unknown option", chat(stream=True, stream_options={"zebra_option": 1}), param="stream_options"),
    Case(
        *(59, "thousands of options", chat(stream=True, stream_options={f"zebra{i}": 1 for i in range(9000)})),
        param="stream_options",
    ),
    Case(59, "option a word", chat(stream=True, stream_options={"include_usage": "yes"}), param="stream_options"),
    Case(59, "options a list", chat(stream=True, stream_options=[]), param="stream_options"),
    *each_value(60, "stream", ["yes", 1]),
    *each_value(61, "cache_salt", ["", "x" * 2048, 7]),
    *each_value(62, "priority", [10**6, -(10**6), 1.5, "high"]),
    *each_value(62, "user", [7, "x" * 2000]),
    *each_value(62, "ignore_eos", ["true", 1]),
    *each_value(63, "kv_transfer_params", [{"remote_host": "169.254.169.254"}], UNSUPPORTED),
]

ACCEPTED = [
    Case(42, "top_k over the vocabulary", chat(top_k=2**40)),
    Case(46, "two limits that agree", chat(max_tokens=2, max_completion_tokens=2)),
    Case(48, "several greedy choices", chat(n=2, temperature=0)),
    Case(49, "the largest seed", chat(seed=2**64 - 1)),
    Case(52, "stop strings that look like patterns", chat(stop=["(a+)+$", "a{1,1000000000}", "\\", ".*"])),
    Case(56, "all penalties at once", chat(presence_penalty=2, frequency_penalty=-2, repetition_penalty=1.5)),
    Case(57, "unsupported fields at their defaults", completion(suffix="", best_of=1, bad_words=[]), path=COMPLETIONS),
    Case(58, "unknown fields", chat(zebra={"deep": [1, 2]}, store=True)),
    Case(62, "priorities at their bounds", chat(priority=-1000)),
]


@parametrize(REFUSED)
async def test_refused(it: Rig, case: Case) -> None:
    await check_refused(it, case)


@parametrize(ACCEPTED)
async def test_accepted(it: Rig, case: Case) -> None:
    await check_accepted(it, case)


async def test_unknown_fields_are_counted(it: Rig) -> None:
    before = it.metric("unknown_fields_total")
    await check_accepted(it, Case(58, "unknown", chat(zebra=1, yak=2, store=True)))
    assert it.metric("unknown_fields_total") == before + 2
