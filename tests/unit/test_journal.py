"""Folding journals: continuation by length and hash, epochs, choices, stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.protocol.journal import ChoiceState, Divergence, Gap, JournalState, chain, fold
from shared.protocol.messages import End, JournalEntry, Marker, TokenLogprob, Tokens

sequences = st.lists(st.integers(0, 2**31 - 1), max_size=12)


def event(held: list[int], new: list[int], choice: int = 0, finish: str | None = None) -> Tokens:
    h = chain("", held)
    return Tokens(choice, len(held), h, chain(h, new), tuple(new), finish=finish)


def entries(*events: Marker | Tokens | End, epoch: int = 1) -> list[JournalEntry]:
    return [JournalEntry(epoch, ev, item) for ev, item in enumerate(events)]


def test_the_chain_is_64_bits_of_hex_and_pinned() -> None:
    """A change of this value breaks every rolling upgrade."""
    assert chain("", []) == ""
    assert chain("", [7]) == "13dad0674837bf31"
    assert chain("", [7, 8, 9]) == "20ca96cce3d96a12"


@given(sequences, sequences)
def test_the_chain_depends_on_the_whole_sequence(first: list[int], second: list[int]) -> None:
    assert chain(chain("", first), second) == chain("", first + second)
    assert (chain("", first) == chain("", second)) == (first == second)


@given(sequences, st.lists(st.integers(0, 12), max_size=6))
def test_any_cutting_with_repeats_folds_to_the_sequence(tokens: list[int], cuts: list[int]) -> None:
    """Pieces may overlap what is there already: nothing is doubled."""
    state = JournalState.empty(1)
    state.accept(JournalEntry(1, 0, Marker((0,))))
    for ev, cut in enumerate([*sorted(cuts), len(tokens)], 1):
        held = len(state.choices[0].tokens)
        start = max(0, held - cut % 3)
        state.accept(JournalEntry(1, ev, event(tokens[:start], tokens[start : max(held, cut)])))
    assert state.choices[0].tokens == tokens
    assert state.choices[0].h == chain("", tokens)


def test_a_gap_changes_nothing() -> None:
    state = fold(entries(Marker((0,)), event([], [1, 2])), 1)
    with pytest.raises(Gap, match="starts at token 3"):
        state.accept(JournalEntry(1, 9, event([1, 2, 3], [4])))
    assert (state.choices[0].tokens, state.ev) == ([1, 2], 1)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(event([1, 5], [3]), id="other prefix"),
        pytest.param(event([1], [5, 6]), id="other tokens"),
        pytest.param(Tokens(0, 2, chain("", [1, 2]), "0" * 16, (3,)), id="wrong hash"),
    ],
)
def test_other_tokens_diverge(bad: Tokens) -> None:
    choice = ChoiceState()
    choice.extend([1, 2])
    with pytest.raises(Divergence):
        choice.accept(bad)
    assert choice.tokens == [1, 2]


def test_only_what_is_new_is_returned_with_its_logprobs() -> None:
    choice = ChoiceState()
    choice.accept(event([], [1, 2]))
    logprobs = tuple(TokenLogprob(-float(i)) for i in (2, 3, 4))
    h = chain("", [1])
    new = choice.accept(Tokens(0, 1, h, chain(h, [2, 3, 4]), (2, 3, 4), logprobs))
    assert new is not None
    assert (new.base, new.tokens, new.logprobs) == (2, (3, 4), logprobs[1:])
    assert choice.logprobs == {2: logprobs[1], 3: logprobs[2]}
    assert choice.accept(event([1], [2, 3])) is None


def test_a_marker_cuts_and_extends() -> None:
    state = fold(
        [
            *entries(Marker((0, 0)), event([], [1, 2, 3], 0), event([], [5], 1, "stop")),
            JournalEntry(2, 0, Marker((2, 0), ((9,), (5, 6)))),
            JournalEntry(2, 1, event([1, 2, 9], [4], 0)),
        ],
        2,
    )
    assert [choice.tokens for choice in state.choices] == [[1, 2, 9, 4], [5, 6]]
    assert [choice.finish for choice in state.choices] == [None, None]
    assert (state.epoch, state.ev) == (2, 1)


def test_a_marker_that_keeps_more_than_there_is_is_a_gap() -> None:
    with pytest.raises(Gap, match="keeps 3 tokens"):
        fold(entries(Marker((3,))), 1)


def test_finishes_are_per_choice_and_the_end_is_last() -> None:
    events: list[Marker | Tokens | End] = [
        Marker((0, 0)),
        event([], [1], 0, "stop"),
        event([], [2, 3], 1),
        event([2, 3], [], 1, "length"),
    ]
    assert not fold(entries(*events[:3]), 2).is_finished
    assert fold(entries(*events), 2).is_finished
    assert fold(entries(*events), 2).end is None
    assert fold(entries(*events, End("finished")), 2).end == End("finished")


def test_a_stop_string_cuts_a_choice_and_later_tokens_are_ignored() -> None:
    state = fold(entries(Marker((0,)), event([], [1, 2, 3, 4])), 1)
    state.accept(JournalEntry(1, 2, event([1, 2], [], 0, "stop")))
    assert (state.choices[0].tokens, state.choices[0].finish) == ([1, 2], "stop")
    assert state.accept(JournalEntry(1, 3, event([1, 2], [3]))) == []


def test_prompt_logprobs_are_kept_once() -> None:
    first = Tokens(0, 0, "", chain("", [1]), (1,), prompt_logprobs=(None, TokenLogprob(-1.0)))
    assert fold(entries(Marker((0,)), first), 1).prompt_logprobs == (None, TokenLogprob(-1.0))


def test_a_journal_of_other_shape_is_refused() -> None:
    with pytest.raises(ProtocolError, match="choice 3"):
        fold(entries(Marker((0,)), event([], [1], 3)), 1)
    with pytest.raises(ProtocolError, match="2 choices"):
        fold(entries(Marker((0, 0))), 1)


@pytest.mark.parametrize("logprobs", [(), (TokenLogprob(-0.5, ((7, -0.5),)), TokenLogprob(-1.5, ()))])
@pytest.mark.parametrize("finish", [None, "stop"])
def test_taking_what_continues_is_accepting_it(logprobs: tuple[TokenLogprob, ...], finish: str | None) -> None:
    taking, accepting = ChoiceState(), ChoiceState()
    for choice in (taking, accepting):
        choice.extend([1, 2, 3])
    h = taking.h
    event = Tokens(0, 3, h, chain(h, (7, 8)), (7, 8), logprobs, finish)
    taking.take(event)
    assert accepting.accept(event) == event
    assert taking == accepting
