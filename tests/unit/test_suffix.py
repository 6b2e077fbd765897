"""Guesses by repetition, and the text they are found in, against comparing every place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.engine.proposer import Ask
from shared.speculative.suffix import MAX_OWN_TOKENS, MAX_STORED_TOKENS, MAX_TENANTS, SuffixProposer
from shared.speculative.token_text import LONGEST, TokenText
from tests.engine_fakes import make_sequence

texts = st.lists(st.integers(0, 3), max_size=60) | st.lists(st.integers(0, 1), max_size=120)


def text_of(tokens: list[int], capacity: int = 1000) -> TokenText:
    text = TokenText(capacity)
    text.extend(tokens)
    return text


def latest_longest(text: list[int], ending: list[int]) -> tuple[int, int]:
    """Length of the longest end of `ending` in `text`, and the last place where it ends."""
    for length in range(min(LONGEST, len(ending)), 0, -1):
        for end in range(len(text) - 1, length - 2, -1):
            if text[end + 1 - length : end + 1] == ending[-length:]:
                return length, end
    return 0, -1


@given(texts)
def test_the_longest_repeated_end_and_the_latest_place_of_it(tokens: list[int]) -> None:
    text = TokenText(1000)
    assert text.repeated() == (0, -1)
    for at, token in enumerate(tokens):
        text.extend([token])
        assert text.repeated() == latest_longest(tokens[:at], tokens[: at + 1])


@given(texts, texts)
def test_the_end_of_another_text_is_found(tokens: list[int], other: list[int]) -> None:
    assert text_of(tokens).find(text_of(other).ending()) == latest_longest(tokens, other)


@given(st.lists(st.lists(st.integers(-1, 3), max_size=9), max_size=12), st.integers(1, 12))
def test_a_full_text_keeps_the_latest_tokens(parts: list[list[int]], capacity: int) -> None:
    text, everything = TokenText(capacity), list[int]()
    for part in parts:
        before = len(text)
        text.extend(part)
        everything += part
        assert len(text) == before + len(part) or capacity // 2 <= len(text) <= max(1, capacity // 2)
    kept = everything[len(everything) - len(text) :]
    assert len(text) <= capacity
    assert text.num_read == len(everything)
    assert text.repeated() == latest_longest(kept[:-1], kept)


def test_large_token_ids_are_told_apart() -> None:
    tokens = [0xD7FF, 0xDFFF, 0x10FFFE, 7, 0xD7FF, 0xDFFF]
    text = text_of(tokens)
    assert text.repeated() == (2, 1)
    assert text.continuation(1, 2) == [0x10FFFE, 7]


def test_a_continuation_at_the_end_of_the_text_repeats_itself() -> None:
    text = text_of([1, 2, 3, 1, 2, 3])
    length, place = text.repeated()
    assert (length, place) == (3, 2)
    assert text.continuation(place, 7) == [1, 2, 3, 1, 2, 3, 1]


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
    assert all(MAX_STORED_TOKENS // 2 <= len(store) <= MAX_STORED_TOKENS for store in stores.values())


def test_a_prompt_too_long_to_keep_is_guessed_from_where_it_is_kept() -> None:
    proposer = SuffixProposer()
    late, early = MAX_OWN_TOKENS + 50, 5
    for place, expected in ((late, (late + 3, late + 4)), (early, ())):
        sequence = make_sequence([*range(MAX_OWN_TOKENS + 100), place, place + 1, place + 2])
        assert proposer.propose([Ask(sequence, 2)])[0].tokens == expected


@pytest.mark.parametrize("length", [0, 5])
def test_forgetting_twice_does_no_harm(length: int) -> None:
    proposer = SuffixProposer()
    sequence = make_sequence([1, 2, 3])
    proposer.propose([Ask(sequence, 2)])
    sequence.tokens += list(range(length))
    proposer.forget(sequence)
    proposer.forget(sequence)
    assert proposer._texts == {}
