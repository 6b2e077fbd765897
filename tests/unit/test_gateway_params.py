"""Resolving what a request leaves open, and refusing what no worker can hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.gateway.params import Limits, SamplingDefaults, resolve_params, scores_only, worker_priority
from services.gateway.schemas import ChatBody, CompletionBody, validate
from shared.errors import ContextLengthExceeded, InvalidRequest, RequestError
from shared.protocol.sampling import MAX_STOP_IDS, SamplingParams

LIMITS = Limits(context=100, vocab_size=50)
EOS = (2, 3)
NO_DEFAULTS = SamplingDefaults()


def chat(**fields: Any) -> ChatBody:
    return validate(ChatBody, {"messages": [{"role": "user", "content": "x"}], **fields})


def completion(**fields: Any) -> CompletionBody:
    return validate(CompletionBody, {"prompt": "x", **fields})


def resolve(body: ChatBody | CompletionBody, prompt_len: int = 10, **changes: Any) -> SamplingParams:
    defaults = changes.pop("defaults", NO_DEFAULTS)
    return resolve_params(body, prompt_len, replace(LIMITS, **changes), defaults, EOS)


def test_open_parameters_get_the_api_defaults() -> None:
    params = resolve(chat())
    assert params.max_tokens == 90, "chat: the rest of the context"
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.stop_ids, params.n, params.logprobs, params.min_tokens) == (EOS, 1, None, 0)
    assert resolve(completion()).max_tokens == 16
    assert resolve(completion(), prompt_len=95).max_tokens == 5


def test_the_models_defaults_fill_in_and_the_client_wins() -> None:
    defaults = SamplingDefaults(temperature=0.2, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.1)
    params = resolve(chat(), defaults=defaults)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.2, 0.9, 40, 0.1)
    assert params.repetition_penalty == 1.1
    params = resolve(chat(temperature=0, top_k=-1, min_p=0, repetition_penalty=1), defaults=defaults)
    assert (params.temperature, params.top_k, params.min_p, params.repetition_penalty) == (0.0, 0, 0.0, 1.0)
    assert params.is_greedy


def test_top_k_is_clamped_to_the_vocabulary() -> None:
    assert resolve(chat(top_k=2**40)).top_k == 50
    assert resolve(chat(top_k=0)).top_k == 0


def test_a_seed_is_kept_and_a_missing_one_is_drawn() -> None:
    assert resolve(chat(seed=7)).seed == 7
    assert resolve(chat(seed=-1)).seed == 2**64 - 1
    drawn = {resolve(chat()).seed for _ in range(8)}
    assert len(drawn) == 8
    assert all(0 <= seed < 2**64 for seed in drawn)


def test_stop_ids_join_the_models_and_the_clients() -> None:
    assert resolve(chat(stop_token_ids=[7, 2])).stop_ids == (2, 3, 7)
    assert resolve(chat(stop_token_ids=[7], ignore_eos=True)).stop_ids == (7,)
    assert resolve(chat(ignore_eos=True)).stop_ids == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"stop_token_ids": [50]}, "stop_token_ids"), ({"logit_bias": {"50": 1}}, "logit_bias")],
)
def test_ids_beyond_the_vocabulary_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match="out of vocabulary") as caught:
        resolve(chat(**fields))
    assert caught.value.param == param


def test_too_many_stop_ids_together_are_refused() -> None:
    body = chat(stop_token_ids=list(range(MAX_STOP_IDS // 2)))
    with pytest.raises(InvalidRequest) as caught:
        resolve_params(body, 1, replace(LIMITS, vocab_size=10**6), NO_DEFAULTS, range(1000, 1000 + MAX_STOP_IDS))
    assert caught.value.param == "stop_token_ids"


@pytest.mark.parametrize(
    ("body", "prompt_len", "param"),
    [
        (chat(), 100, "messages"),
        (chat(max_tokens=91), 10, "messages"),
        (completion(), 5000, "prompt"),
        (completion(max_tokens=2**31 - 1), 10, "prompt"),
    ],
)
def test_overflow_is_told_in_the_words_agents_look_for(body: Any, prompt_len: int, param: str) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        resolve(body, prompt_len)
    assert str(caught.value).startswith("This model's maximum context length is 100 tokens.")
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)


def test_a_request_that_just_fits_is_accepted() -> None:
    assert resolve(chat(max_tokens=90)).max_tokens == 90
    assert resolve(completion(), prompt_len=99).max_tokens == 1


def test_min_tokens_beyond_the_output_limit_are_refused() -> None:
    with pytest.raises(RequestError) as caught:
        resolve(completion(min_tokens=17))
    assert caught.value.param == "min_tokens"
    assert resolve(completion(min_tokens=16)).min_tokens == 16


def test_logprobs_of_the_prompt_are_asked_for_by_name_or_by_echo() -> None:
    assert resolve(completion(echo=True, logprobs=2)).prompt_logprobs == 2
    assert resolve(completion(echo=True, logprobs=2, prompt_logprobs=4)).prompt_logprobs == 4
    assert resolve(completion(echo=True)).prompt_logprobs is None
    assert resolve(completion(logprobs=2)).prompt_logprobs is None
    assert resolve(chat(prompt_logprobs=0)).prompt_logprobs == 0
    assert resolve(chat(logprobs=True, top_logprobs=3)).logprobs == 3
    assert resolve(chat(logprobs=True)).logprobs == 0


def test_scoring_a_prompt_still_computes_one_token() -> None:
    body = completion(max_tokens=0, echo=True, logprobs=1)
    assert resolve(body).max_tokens == 1
    assert scores_only(body)
    assert not scores_only(completion())


def test_many_greedy_choices_are_accepted() -> None:
    assert resolve(chat(n=64, temperature=0)).n == 64


@pytest.mark.parametrize(
    ("given", "key_id", "priority"), [(-5, "k", 0), (0, "k", 0), (7, "k", 7), (-5, "", -5), (7, "", 7)]
)
def test_among_keys_nobody_goes_before_others_on_the_workers(given: int, key_id: str, priority: int) -> None:
    assert worker_priority(given, key_id) == priority


def test_who_may_guess_goes_with_the_request() -> None:
    assert resolve(chat()).proposers is None
    assert resolve(chat(speculation="none")).proposers == ()
    assert resolve(completion(speculation=["heads", "suffix"])).proposers == ("heads", "suffix")
