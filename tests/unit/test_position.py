"""Positions in a journal: foreign text in, and whether a journal knows them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolError
from shared.protocol.journal import chain
from shared.protocol.messages import JournalEntry, Marker, Tokens
from shared.protocol.position import MAX_NUMBER, START, WHOLE, Position, Standing, standing
from shared.protocol.sampling import MAX_CHOICES

numbers = st.integers(0, MAX_NUMBER)
positions = st.builds(Position, numbers, numbers, st.just(WHOLE)) | st.builds(
    Position, numbers, st.just(0), st.integers(0, MAX_CHOICES - 1)
)


@given(positions)
def test_text_and_back(position: Position) -> None:
    assert Position.parse(str(position)) == position


@given(st.text() | st.from_regex(r"[0-9]{0,30}[-.,][0-9]{0,30}[-.,]?[0-9]{0,3}\n?", fullmatch=True))
def test_any_text_is_a_position_or_refused(text: str) -> None:
    try:
        position = Position.parse(text)
    except ProtocolError:
        return
    assert str(position) == text


@pytest.mark.parametrize(
    "text", ["", "1", "1-", "-1", "1-2-3", " 1-2", "1-2\n", "01-2", "1-1.0", "1-0.64", "1-0.", "\uff11-2", f"{2**53}-0"]
)
def test_what_is_no_position(text: str) -> None:
    with pytest.raises(ProtocolError):
        Position.parse(text)


def test_positions_are_ordered_as_the_journal_is() -> None:
    texts = ["0-0", "1-0", "1-1", "1-12", "2-0.0", "2-0.1", "2-0", "2-1", "10-0"]
    assert [str(one) for one in sorted(map(Position.parse, reversed(texts)))] == texts
    assert Position(2, 3).follows(Position(2, 2))
    assert not Position(3, 1).follows(Position(2, 9))
    assert Position(2, 1).follows(Position(2, 0))


def tokens(held: list[int], new: list[int], choice: int = 0, finish: str | None = None) -> Tokens:
    h = chain("", held)
    return Tokens(choice, len(held), h, chain(h, new), tuple(new), finish=finish)


JOURNAL = [
    JournalEntry(1, 0, Marker((0, 0))),
    JournalEntry(2, 0, Marker((0, 0))),
    JournalEntry(2, 1, tokens([], [1], 0)),
    JournalEntry(2, 2, tokens([], [5], 1)),
    JournalEntry(3, 0, Marker((0, 0), ((1, 2), (5,)))),
    JournalEntry(3, 1, tokens([1, 2], [3], 0)),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-0", Standing.KNOWN),
        ("1-0", Standing.KNOWN),
        ("2-2", Standing.KNOWN),
        ("3-0.0", Standing.KNOWN),
        ("3-0.1", Standing.KNOWN),
        ("3-0", Standing.KNOWN),
        ("3-1", Standing.KNOWN),
        ("3-2", Standing.AHEAD),
        ("4-0", Standing.AHEAD),
        ("2-3", Standing.LOST),
        ("1-1", Standing.LOST),
        ("3-0.2", Standing.LOST),
    ],
)
def test_what_a_journal_says_of_a_position(text: str, expected: Standing) -> None:
    assert standing(Position.parse(text), JOURNAL, 2) is expected


def test_a_position_is_lost_when_the_journal_holds_other_tokens_now() -> None:
    """Redis lost writes; what the client got at 2-2 is not what the request went on with."""
    journal = [
        JournalEntry(2, 0, Marker((0,))),
        JournalEntry(2, 1, tokens([], [1])),
        JournalEntry(2, 2, tokens([1], [7])),
        JournalEntry(3, 0, Marker((0,), ((1, 2),))),
    ]
    assert standing(Position(2, 1), journal, 1) is Standing.KNOWN
    assert standing(Position(2, 2), journal, 1) is Standing.LOST
    assert standing(Position(3, 0, 0), journal, 1) is Standing.KNOWN


def test_a_stop_string_that_cut_below_the_position_does_not_matter() -> None:
    journal = [
        JournalEntry(2, 0, Marker((0,))),
        JournalEntry(2, 1, tokens([], [1, 2, 3])),
        JournalEntry(2, 2, tokens([1, 2], [], finish="stop")),
    ]
    assert standing(Position(2, 1), journal, 1) is Standing.KNOWN
    assert standing(Position(2, 1), journal[:2], 1) is Standing.KNOWN
    assert standing(Position(2, 1), [], 1) is Standing.LOST
    assert standing(START, [], 1) is Standing.KNOWN
    assert WHOLE == MAX_CHOICES
