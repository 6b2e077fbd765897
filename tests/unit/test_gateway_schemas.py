"""Request bodies: what is refused, by which field's name, and what is let through."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.gateway.fields import MAX_TOKEN_ID
from services.gateway.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parse_json,
    unknown_fields,
    validate,
)
from shared.errors import InvalidRequest

USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> ChatBody:
    return validate(ChatBody, {"messages": [USER], **fields})


def completion(**fields: Any) -> CompletionBody:
    return validate(CompletionBody, {"prompt": "hi", **fields})


def refusal(make: Any, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        make(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("temperature", [-0.1, 2.1, "hot", True, float("nan"), float("inf")]),
        ("top_p", [0, 1.1, -1, "x", float("nan")]),
        ("top_k", [-2, 1.5, "5", True, 2**70]),
        ("min_p", [-0.1, 1.1, float("nan")]),
        ("presence_penalty", [2.1, -2.1, "x"]),
        ("frequency_penalty", [2.1, -2.1, True]),
        ("repetition_penalty", [0, -1, float("inf")]),
        ("max_tokens", [0, -1, 1.5, 2**63, True, "7"]),
        ("min_tokens", [-1, 1.5]),
        ("n", [0, -1, 10**9, 65, True, 1.0]),
        ("seed", [2**64, -(2**63) - 1, "x", 1.5, True]),
        ("stop", ["", [""], ["x"] * 17, "x" * 2000, 7, ["a", 1], [["a"]]]),
        ("stop_token_ids", [["a"], [-1], [True], "1", list(range(1000)), [2**40]]),
        ("logit_bias", [{"x": 1}, {"1": 101}, {"1": -101}, {"1": True}, {"-1": 1}, {"1": "x"}, [], {"²": 1}]),
        ("stream", ["yes", 1]),
        ("cache_salt", ["", "x" * 2000, 7]),
        ("priority", [10**6, 1.5, "high"]),
        ("user", [7, "x" * 2000]),
        ("ignore_eos", ["true", 1]),
        ("model", [7, ["m"]]),
        ("prompt_logprobs", [-1, 21, True]),
    ],
)
@pytest.mark.parametrize("make", [chat, completion])
def test_a_bad_value_is_refused_by_its_name(make: Any, param: str, values: list[Any]) -> None:
    for value in values:
        error = refusal(make, **{param: value})
        assert error.param == param, (value, str(error))
        assert param in str(error)


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *[(name, []) for name in ("tools", "functions")],
        *[(name, {"a": 1}) for name in ("prompt_embeds", "kv_transfer_params", "structured_outputs", "audio")],
        *[(name, "x") for name in ("chat_template", "suffix", "guided_regex", "function_call")],
        *[("response_format", {"type": kind}) for kind in ("json_object", "json_schema", "nonsense")],
        ("tool_choice", "auto"),
        ("length_penalty", 1.5),
        ("use_beam_search", True),
        ("truncate_prompt_tokens", -2),
        ("bad_words", ["x"]),
        ("allowed_token_ids", []),
        ("best_of", 2),
        ("modalities", ["text", "audio"]),
    ],
)
def test_what_would_change_the_answer_and_is_not_supported_is_refused(param: str, value: Any) -> None:
    error = refusal(completion, **{param: value})
    assert error.param == param
    assert error.code == "unsupported_parameter"


def test_unsupported_fields_at_their_defaults_are_let_through() -> None:
    body = completion(
        **{"suffix": "", "best_of": 1, "length_penalty": 1, "use_beam_search": False, "bad_words": []},
        **{"response_format": {"type": "text"}, "tool_choice": "none", "tools": None, "modalities": ["text"]},
    )
    assert body.prompt == ("hi",)


def test_true_is_not_the_default_of_a_field_that_is_one() -> None:
    assert refusal(completion, length_penalty=True).param == "length_penalty"


def test_null_means_not_given() -> None:
    body = chat(**dict.fromkeys(("temperature", "n", "stop", "stream", "logit_bias", "seed", "max_tokens", "tools")))
    assert (body.n, body.stop, body.stream, body.temperature, body.logit_bias) == (1, (), False, None, ())


def test_unknown_fields_are_ignored_and_counted() -> None:
    raw = {"messages": [USER], "future": 1, "store": True, "metadata": {}, "temperature": 0, "tools": None}
    assert validate(ChatBody, raw).temperature == 0
    assert unknown_fields(ChatBody, raw) == 1


def test_values_at_the_edges_are_accepted() -> None:
    body = chat(
        **{"temperature": 2, "top_p": 1, "top_k": -1, "min_p": 0, "n": 64, "seed": 2**64 - 1, "max_tokens": 1},
        **{"stop": ["x"] * 16, "logit_bias": {"5": -100, "3": 100}, "cache_salt": "s", "logprobs": True},
        **{"top_logprobs": 20, "presence_penalty": -2},
    )
    assert body.logit_bias == ((3, 100.0), (5, -100.0))
    assert body.logprobs_wanted == 20
    assert chat(top_k=2**40).top_k == 2**40


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"nonsense": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": "abc"}, "logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"echo": True}, "echo"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": "y" * 20_000}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
def test_chat_fields_that_contradict_are_refused(fields: dict[str, Any], param: str) -> None:
    assert refusal(chat, **fields).param == param


def test_equal_limits_under_both_names_are_fine_and_the_new_name_counts() -> None:
    assert chat(max_tokens=4, max_completion_tokens=4).tokens_wanted == 4
    assert chat(max_completion_tokens=7).tokens_wanted == 7
    assert chat().tokens_wanted is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -2}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 1, "stream": True}, "logprobs"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[[1]]]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**63]}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
    ],
)
def test_bad_completion_fields_are_refused(fields: dict[str, Any], param: str) -> None:
    assert refusal(completion, **fields).param == param


def test_prompts_of_every_shape() -> None:
    assert completion(prompt="a").prompt == ("a",)
    assert completion(prompt=["a", "b"]).prompt == ("a", "b")
    assert completion(prompt=[1, 2]).prompt == ((1, 2),)
    assert completion(prompt=[[1], [2, 3]]).prompt == ((1,), (2, 3))


def test_zero_tokens_are_for_scoring_a_prompt() -> None:
    assert completion(max_tokens=0, echo=True, logprobs=1).tokens_wanted == 0
    assert refusal(completion, max_tokens=0).param == "max_tokens"


@pytest.mark.parametrize(
    ("messages", "param", "code"),
    [
        (None, "messages", "invalid_value"),
        ([], "messages", "invalid_value"),
        ("hi", "messages", "invalid_value"),
        (["hi"], "messages[0]", "invalid_value"),
        ([{"content": "hi"}], "messages[0].role", "invalid_value"),
        ([USER, {"role": "wizard", "content": "hi"}], "messages[1].role", "invalid_value"),
        ([{"role": 7, "content": "hi"}], "messages[0].role", "invalid_value"),
        ([{"role": "user"}], "messages[0].content", "invalid_value"),
        ([{"role": "user", "content": 7}], "messages[0].content", "invalid_value"),
        ([{"role": "user", "content": []}], "messages[0].content", "invalid_value"),
        ([{"role": "user", "content": [{"type": "riddle"}]}], "messages[0].content", "invalid_value"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], "messages[0].content", "invalid_value"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "invalid_value"),
        ([{"role": "user", "content": "hi", "name": 7}], "messages[0].name", "invalid_value"),
        ([{"role": "tool", "content": "hi"}], "messages[0].tool_call_id", "invalid_value"),
        ([{"role": "tool", "content": "hi", "tool_call_id": "c"}], "messages[0].role", "unsupported_value"),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{}]}],
            "messages[0].tool_calls",
            "unsupported_parameter",
        ),
    ],
)
def test_bad_messages_are_refused_by_their_path(messages: Any, param: str, code: str) -> None:
    error = refusal(chat, messages=messages)
    assert (error.param, error.code) == (param, code)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_media_are_refused_without_a_look_at_their_address(kind: str) -> None:
    part = {"type": kind, kind: {"url": "http://169.254.169.254/latest"}}
    error = refusal(chat, messages=[{"role": "user", "content": [{"type": "text", "text": "see"}, part]}])
    assert (error.param, error.code) == ("messages[0].content[1]", "unsupported_content")


def test_text_parts_are_joined_by_line_breaks() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(messages=[{"role": "developer", "content": parts, "name": "ada"}])
    assert body.messages == ({"role": "developer", "content": "a\nb", "name": "ada"},)


def test_tokenize_wants_one_input() -> None:
    assert refusal(lambda: validate(TokenizeBody, {})).param == "prompt"
    assert refusal(lambda: validate(TokenizeBody, {"prompt": "a", "messages": [USER]})).param == "prompt"
    assert validate(TokenizeBody, {"prompt": ""}).prompt == ""


def test_detokenize_wants_token_ids() -> None:
    assert validate(DetokenizeBody, {"tokens": [1, MAX_TOKEN_ID]}).tokens == (1, MAX_TOKEN_ID)
    for tokens in ("a", [1.5], [-1], None):
        assert refusal(lambda tokens=tokens: validate(DetokenizeBody, {"tokens": tokens})).param == "tokens"


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"{bad", "invalid_json"),
        (b"", "invalid_json"),
        *[(one, "invalid_json") for one in (b"[]", b'"x"', b"1", b"null")],
        (b"[" * 100_000, "invalid_json"),
        (b'{"a":' * 100_000, "invalid_json"),
        (b"\xff\xfe{}", "invalid_encoding"),
        (b'{"a": "\\ud800"}', "invalid_encoding"),
        (b'{"\\uDFFF": 1}', "invalid_encoding"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json"),
    ],
)
def test_bodies_that_are_no_json_object(raw: bytes, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json(raw)
    assert caught.value.code == code


def test_json_that_only_looks_dangerous_is_read() -> None:
    pair = json.dumps({"a": "😀"}).encode()
    assert b"\\ud83d" in pair
    assert parse_json(pair) == {"a": "😀"}
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}, "of duplicate keys the last wins"


def test_numbers_that_json_lacks_are_refused_by_field() -> None:
    for text in ("NaN", "Infinity", "-Infinity", "1e999"):
        raw = parse_json(b'{"messages": [{"role": "user", "content": "x"}], "temperature": %s}' % text.encode())
        assert refusal(lambda raw=raw: validate(ChatBody, raw)).param == "temperature"
