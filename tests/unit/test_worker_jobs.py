"""From a job and its journal to sequences, for one choice and several, before and after a migration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.engine.engine import Sampled
from shared.protocol.journal import ChoiceState, JournalState, chain, fold
from shared.protocol.messages import Job, JournalEntry, Marker, TokenLogprob, Tokens
from shared.protocol.sampling import SamplingParams
from shared.worker.jobs import (
    CacheScope,
    decode_sequences,
    events_from,
    overdue_finishes,
    prefill_sequence,
    tokens_event,
)

SCOPE = CacheScope("revision", "float32", "numerics")
PROMPT = (5, 6, 7)


def job(**params: Any) -> Job:
    sampling = SamplingParams(**({"max_tokens": 4, "seed": 1} | params))
    return Job("id", "model", PROMPT, sampling, "gateway", "prefill", "decode")


def held(*choices: list[int], finished: dict[int, str] | None = None) -> JournalState:
    """A journal in which each choice holds these tokens."""
    states = [ChoiceState(list(tokens), chain("", tokens)) for tokens in choices]
    for index, reason in (finished or {}).items():
        states[index].finish = reason
    return JournalState(states)


def sampled(*tokens: int, choice: int = 0, finish: str | None = None, logprobs: bool = False) -> list[Sampled]:
    last = len(tokens) - 1
    return [
        Sampled(choice, token, TokenLogprob(-float(token)) if logprobs else None, finish if index == last else None)
        for index, token in enumerate(tokens)
    ]


# --- prefill ----------------------------------------------------------------------------------------------------------


def test_prefill_of_a_fresh_request_samples_its_choice_after_the_prompt() -> None:
    sequence = prefill_sequence(job(), held([]), SCOPE)
    assert (sequence.tokens, sequence.prompt_len, sequence.choices) == ([5, 6, 7], 3, (0,))
    assert sequence.hold
    assert sequence.hash_root == SCOPE.root(job())


def test_sequences_have_the_priority_of_their_request() -> None:
    urgent = replace(job(n=2), priority=-7)
    assert prefill_sequence(urgent, held([], []), SCOPE).priority == -7
    assert [one.priority for one in decode_sequences(urgent, held([], []), SCOPE)] == [-7, -7]


def test_prefill_of_several_choices_computes_the_prompt_once() -> None:
    sequence = prefill_sequence(job(n=3), held([], [], []), SCOPE)
    assert (sequence.tokens, sequence.choices) == ([5, 6, 7], (0, 1, 2))


def test_prefill_after_a_migration_goes_on_behind_the_output() -> None:
    sequence = prefill_sequence(job(), held([8, 9]), SCOPE)
    assert (sequence.tokens, sequence.prompt_len, sequence.num_output) == ([5, 6, 7, 8, 9], 3, 2)
    assert sequence.choices == (0,)


@pytest.mark.parametrize("choices", [([8], [], []), ([8, 9], [8], [7]), ([], [], [1])])
def test_prefill_of_migrated_choices_computes_what_they_share_and_samples_none(choices: tuple[list[int], ...]) -> None:
    sequence = prefill_sequence(job(n=3), held(*choices), SCOPE)
    assert (sequence.tokens, sequence.choices) == ([5, 6, 7], ())


def test_a_sequence_does_not_share_its_list_with_the_journal() -> None:
    state = held([8])
    prefill_sequence(job(), state, SCOPE).tokens.append(99)
    decode_sequences(job(), state, SCOPE)[0].tokens.append(99)
    assert state.choices[0].tokens == [8]


# --- decode -----------------------------------------------------------------------------------------------------------


def test_decode_has_one_sequence_a_choice() -> None:
    sequences = decode_sequences(job(n=3), held([8], [9, 10], []), SCOPE)
    assert [sequence.choices for sequence in sequences] == [(0,), (1,), (2,)]
    assert [sequence.tokens for sequence in sequences] == [[5, 6, 7, 8], [5, 6, 7, 9, 10], [5, 6, 7]]
    assert {sequence.prompt_len for sequence in sequences} == {3}
    assert {sequence.hash_root for sequence in sequences} == {SCOPE.root(job())}
    assert not any(sequence.hold for sequence in sequences)


def test_decode_leaves_finished_choices_out() -> None:
    state = held([8], [9], [10], finished={0: "stop", 2: "length"})
    assert [sequence.choices for sequence in decode_sequences(job(n=3), state, SCOPE)] == [(1,)]
    state.choices[1].finish = "stop"
    assert decode_sequences(job(n=3), state, SCOPE) == []


# --- finishes that are overdue ----------------------------------------------------------------------------------------


def test_a_choice_that_may_go_on_is_not_overdue() -> None:
    assert overdue_finishes(job(stop_ids=(99,)), held([1, 2, 3])) == []
    assert overdue_finishes(job(), held([])) == []


@pytest.mark.parametrize(
    ("tokens", "params", "reason"),
    [
        ([1, 2, 3, 4], {}, "length"),
        ([1, 99], {"stop_ids": (99,)}, "stop"),
        ([1, 2, 3, 99], {"stop_ids": (99,)}, "stop"),
        ([1, 99], {"stop_ids": (99,), "min_tokens": 2}, "stop"),
    ],
)
def test_tokens_that_end_a_choice_make_its_finishing_event(
    tokens: list[int], params: dict[str, Any], reason: str
) -> None:
    state = held(tokens)
    (event,) = overdue_finishes(job(**params), state)
    assert (event.tokens, event.base, event.finish) == ((), len(tokens), reason)
    assert state.choices[0].accept(event) == event
    assert state.is_finished
    assert state.choices[0].tokens == tokens


def test_min_tokens_keeps_a_choice_open() -> None:
    assert overdue_finishes(job(stop_ids=(99,), min_tokens=3), held([1, 99])) == []


def test_a_finish_that_was_journaled_is_not_repeated() -> None:
    state = held([1, 2, 3, 4], [1, 2, 3, 4], finished={0: "length"})
    assert [event.choice for event in overdue_finishes(job(n=2), state)] == [1]


# --- events -----------------------------------------------------------------------------------------------------------


def test_an_event_continues_the_state_and_changes_nothing() -> None:
    state = held([8], [9])
    event = tokens_event(state, sampled(3, 4, choice=1, finish="length"))
    assert (event.choice, event.base, event.tokens, event.finish) == (1, 1, (3, 4), "length")
    assert (event.h_base, event.h) == (chain("", [9]), chain("", [9, 3, 4]))
    assert state.choices[1].tokens == [9]
    assert state.choices[1].accept(event) == event
    assert (state.choices[1].tokens, state.choices[1].finish) == ([9, 3, 4], "length")


def test_logprobs_come_one_a_token_or_not_at_all() -> None:
    assert [entry.logprob for entry in tokens_event(held([]), sampled(3, 4, logprobs=True)).logprobs] == [-3.0, -4.0]
    assert tokens_event(held([]), sampled(3, 4)).logprobs == ()


def test_prompt_logprobs_travel_with_the_first_choice_only() -> None:
    scores = (None, TokenLogprob(-1.0))
    assert tokens_event(held([], []), sampled(3), scores).prompt_logprobs == scores
    assert tokens_event(held([], []), sampled(3, choice=1), scores).prompt_logprobs == ()


@pytest.mark.parametrize("base", [0, 1, 2, 3])
def test_what_redis_forgot_is_told_again(base: int) -> None:
    ours = held([])
    ours.choices[0].accept(tokens_event(ours, sampled(3, 4, 5, finish="stop", logprobs=True)))
    behind = held([3, 4, 5][:base])
    event = events_from(ours, 0, base, ours.choices[0].finish)
    assert behind.choices[0].accept(event) == event
    assert (behind.choices[0].tokens, behind.choices[0].h) == ([3, 4, 5], ours.choices[0].h)
    assert behind.choices[0].finish == "stop"
    assert sorted(behind.choices[0].logprobs) == list(range(base, 3))


TOKENS = st.lists(st.integers(0, 500), max_size=12)


@given(before=TOKENS, steps=st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=4), max_size=6), data=st.data())
def test_events_of_many_steps_fold_to_the_same_tokens(
    before: list[int], steps: list[list[int]], data: st.DataObject
) -> None:
    """Step by step, or from any point on at once: readers end with the same choice."""
    state = held(list(before))
    entries = [JournalEntry(1, 0, Marker((0,), (tuple(before),)))]
    for number, step in enumerate(steps, 1):
        event = tokens_event(state, sampled(*step))
        assert state.choices[0].accept(event) == event
        entries.append(JournalEntry(1, number, event))
    whole = before + [token for step in steps for token in step]
    assert state.choices[0].tokens == whole
    assert fold(entries, 1).choices[0].h == state.choices[0].h
    base = data.draw(st.integers(0, len(whole)))
    again = events_from(state, 0, base, None)
    assert isinstance(again, Tokens)
    late = held(whole[:base])
    late.choices[0].accept(again)
    assert late.choices[0].tokens == whole
