"""The suffix automaton and its proposer, against scanning the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.engine.proposer import Ask
from shared.speculative.suffix import MAX_STORED_TOKENS, MAX_TENANTS, SuffixProposer
from shared.speculative.suffix_automaton import ROOT, SuffixAutomaton
from tests.engine_fakes import make_sequence

texts = st.lists(st.integers(0, 3), max_size=60)


def occurs_before(text: list[int], suffix: list[int]) -> bool:
    return any(text[i : i + len(suffix)] == suffix for i in range(len(text) - len(suffix)))


def longest_repeated(text: list[int]) -> int:
    return max((n for n in range(len(text)) if n and occurs_before(text, text[-n:])), default=0)


@given(texts)
def test_the_longest_repeated_suffix_and_a_place_where_it_ended(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for at, token in enumerate(text):
        automaton.append(token)
        length, end = automaton.repeated()
        assert length == longest_repeated(text[: at + 1])
        assert not length or end < at
        assert text[end + 1 - length : end + 1] == text[at + 1 - length : at + 1]


@given(texts, texts)
def test_reading_another_text_finds_its_longest_match(text: list[int], other: list[int]) -> None:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.append(token)
    state, length = ROOT, 0
    for at, token in enumerate(other):
        state, length = automaton.advance(state, length, token)
        read = other[: at + 1]
        inside = [n for n in range(1, len(read) + 1) if any(text[i : i + n] == read[-n:] for i in range(len(text)))]
        assert length == max(inside, default=0)
        end = automaton.end_of(state)
        assert text[end + 1 - length : end + 1] == read[len(read) - length :]


def test_a_continuation_at_the_end_of_the_text_repeats_itself() -> None:
    automaton = SuffixAutomaton()
    for token in [1, 2, 3, 1, 2, 3]:
        automaton.append(token)
    length, end = automaton.repeated()
    assert (length, end) == (3, 2)
    assert automaton.continuation(end, 7) == [1, 2, 3, 1, 2, 3, 1]


def test_what_followed_in_the_prompt_is_guessed() -> None:
    proposer = SuffixProposer()
    sequence = make_sequence([10, 11, 12, 13, 14, 20, 11, 12])
    (draft,) = proposer.propose([Ask(sequence, 3)])
    assert draft.tokens == (13, 14, 20)
    assert list(draft.confidences) == sorted(draft.confidences)


def test_nothing_is_guessed_from_nothing() -> None:
    (draft,) = SuffixProposer().propose([Ask(make_sequence([1, 2, 3, 4]), 4)])
    assert draft.tokens == ()


def test_answers_serve_the_next_request_of_their_tenant_only() -> None:
    proposer = SuffixProposer()
    first = make_sequence([1, 2])
    proposer.propose([Ask(first, 4)])
    first.tokens += [30, 31, 32, 33]
    proposer.forget(first)
    second, stranger = make_sequence([5, 30, 31]), make_sequence([5, 30, 31])
    stranger.hash_root = b"another tenant"
    drafts = proposer.propose([Ask(second, 4), Ask(stranger, 4)])
    assert [draft.tokens for draft in drafts] == [(32, 33), ()], "and nothing across the answer's end"


def test_stores_are_bounded() -> None:
    proposer = SuffixProposer()
    for tenant in range(MAX_TENANTS + 2):
        for part in range(4):
            sequence = make_sequence([1])
            sequence.hash_root = bytes([tenant])
            proposer.propose([Ask(sequence, 1)])
            sequence.tokens += [1000 * part + i % 1000 for i in range(MAX_STORED_TOKENS // 2)]
            proposer.forget(sequence)
    stores = proposer._stores
    assert list(stores) == [bytes([tenant]) for tenant in range(2, MAX_TENANTS + 2)]
    for store in stores.values():
        assert sum(map(len, store.generations)) <= 2 * MAX_STORED_TOKENS


def test_a_long_prompt_is_read_over_several_steps_and_then_guessed_from() -> None:
    proposer = SuffixProposer()
    sequence = make_sequence([*range(2000), 5, 6, 7])
    drafts = [proposer.propose([Ask(sequence, 2)])[0] for _ in range(4)]
    assert [draft.tokens for draft in drafts] == [(), (), (), (8, 9)]


@pytest.mark.parametrize("length", [0, 5])
def test_forgetting_twice_does_no_harm(length: int) -> None:
    proposer = SuffixProposer()
    sequence = make_sequence([1, 2, 3])
    proposer.propose([Ask(sequence, 2)])
    sequence.tokens += list(range(length))
    proposer.forget(sequence)
    proposer.forget(sequence)
    assert proposer._readers == {}
