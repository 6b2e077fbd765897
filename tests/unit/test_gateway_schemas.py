"""Request bodies: what is let through and in which shape; what is refused stands in tests/badrequests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.gateway.schemas import (
    ChatBody,
    CompletionBody,
    TokenizeBody,
    check_size,
    parse_json,
    unknown_fields,
    validate,
)
from shared.errors import InvalidRequest, RequestTooLarge

USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> ChatBody:
    return validate(ChatBody, {"messages": [USER], **fields})


def completion(**fields: Any) -> CompletionBody:
    return validate(CompletionBody, {"prompt": "hi", **fields})


def test_unsupported_fields_at_their_defaults_are_let_through() -> None:
    body = completion(
        **{"suffix": "", "best_of": 1, "length_penalty": 1, "use_beam_search": False, "bad_words": []},
        **{"response_format": {"type": "text"}, "tool_choice": "none", "tools": None, "modalities": ["text"]},
    )
    assert body.prompt == ("hi",)


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


def test_proposers_are_named_as_on_the_command_line() -> None:
    assert chat().speculation is None
    assert chat(speculation=None).speculation is None
    assert chat(speculation="none").speculation == ()
    assert chat(speculation=["none"]).speculation == ()
    assert chat(speculation="suffix,heads").speculation == ("suffix", "heads")
    assert chat(speculation=["draft", "draft"]).speculation == ("draft",)


@pytest.mark.parametrize(
    "value", ["", "oracle", "none,suffix", [], [None], ["suffix"] * 4, 5, True, {"suffix": 1}, [["a"]]]
)
def test_unknown_proposers_are_refused_with_the_known_ones(value: object) -> None:
    with pytest.raises(InvalidRequest, match="suffix, draft, heads"):
        chat(speculation=value)


def test_equal_limits_under_both_names_are_fine_and_the_new_name_counts() -> None:
    assert chat(max_tokens=4, max_completion_tokens=4).tokens_wanted == 4
    assert chat(max_completion_tokens=7).tokens_wanted == 7
    assert chat().tokens_wanted is None


def test_prompts_of_every_shape() -> None:
    assert completion(prompt="a").prompt == ("a",)
    assert completion(prompt=["a", "b"]).prompt == ("a", "b")
    assert completion(prompt=[1, 2]).prompt == ((1, 2),)
    assert completion(prompt=[[1], [2, 3]]).prompt == ((1,), (2, 3))


def test_zero_tokens_are_for_scoring_a_prompt() -> None:
    assert completion(max_tokens=0, echo=True, logprobs=1).tokens_wanted == 0
    assert completion(max_tokens=1).tokens_wanted == 1


def test_an_unsupported_field_is_named_before_anything_else_is_looked_at() -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate(ChatBody, {"tools": [], "temperature": "hot"})
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")


def test_a_body_of_many_values_is_refused_before_it_is_decoded() -> None:
    check_size(b'{"a": [1, 2, 3]}', 5)
    with pytest.raises(RequestTooLarge):
        check_size(b'{"a": [1, 2, 3]}', 4)


def test_text_parts_are_joined_by_line_breaks() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(messages=[{"role": "developer", "content": parts, "name": "ada"}])
    assert body.messages == ({"role": "developer", "content": "a\nb", "name": "ada"},)


def test_tokenize_wants_one_input() -> None:
    assert validate(TokenizeBody, {"prompt": ""}).prompt == ""
    assert validate(TokenizeBody, {"messages": [USER]}).messages == (USER,)


def test_json_that_only_looks_dangerous_is_read() -> None:
    pair = json.dumps({"a": "😀"}).encode()
    assert b"\\ud83d" in pair
    assert parse_json(pair) == {"a": "😀"}
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}, "of duplicate keys the last wins"
