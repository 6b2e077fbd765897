"""What a client gets, whatever order and loss its events come with."""

from __future__ import annotations

import random

import pytest

from shared.bus.delivery import Delivery, Verdict
from shared.protocol.journal import chain
from shared.protocol.messages import End, JournalEntry, Marker, TokenLogprob, Tokens


def tokens(held: list[int], new: list[int], choice: int = 0, finish: str | None = None) -> Tokens:
    h = chain("", held)
    return Tokens(choice, len(held), h, chain(h, new), tuple(new), finish=finish)


JOURNAL = [
    JournalEntry(1, 0, Marker((0,))),
    JournalEntry(2, 0, Marker((0,))),
    JournalEntry(2, 1, tokens([], [1])),
    JournalEntry(2, 2, tokens([1], [2, 3])),
    JournalEntry(3, 0, Marker((3,))),
    JournalEntry(3, 1, tokens([1, 2, 3], [4], finish="length")),
    JournalEntry(3, 2, End("finished")),
]


def drained(delivery: Delivery) -> tuple[list[int], int]:
    """All tokens put out, and how many Ends; bases must be consecutive."""
    got: list[int] = []
    ends = 0
    while delivery.out:
        _, event = delivery.out.popleft()
        if isinstance(event, End):
            ends += 1
        else:
            assert event.base == len(got)
            got.extend(event.tokens)
    return got, ends


@pytest.mark.parametrize("seed", range(30))
def test_lost_doubled_and_shuffled_events_and_a_replay(seed: int) -> None:
    delivery = Delivery(1)
    generator = random.Random(seed)
    for entry in generator.choices(JOURNAL, k=generator.randint(0, 20)):
        delivery.accept(entry)
    delivery.replay(JOURNAL)
    delivery.replay(JOURNAL)
    assert drained(delivery) == ([1, 2, 3, 4], 1)


def test_in_order_no_journal_is_needed() -> None:
    delivery = Delivery(1)
    assert [delivery.accept(entry) for entry in JOURNAL] == [Verdict.TAKEN] * len(JOURNAL)
    assert drained(delivery) == ([1, 2, 3, 4], 1)
    assert (delivery.emax, delivery.last_id) == (3, "3-2")


def test_an_end_before_its_tokens_waits_for_the_journal() -> None:
    delivery = Delivery(1)
    assert delivery.accept(JOURNAL[-1]) is Verdict.REPLAY
    assert delivery.end is None
    assert delivery.accept(JournalEntry(3, 2, End("error", "x"))) is Verdict.REPLAY


def test_a_conflict_puts_nothing_out() -> None:
    delivery = Delivery(1)
    delivery.accept(JournalEntry(2, 1, tokens([], [9, 9])))
    delivery.out.clear()
    assert delivery.replay(JOURNAL) is Verdict.CONFLICT
    assert not delivery.out
    assert delivery.end is None


def test_a_journal_that_lost_its_last_writes_takes_nothing_back() -> None:
    delivery = Delivery(1)
    for entry in JOURNAL[:4]:
        delivery.accept(entry)
    assert delivery.replay(JOURNAL[:3]) is Verdict.TAKEN
    assert drained(delivery)[0] == [1, 2, 3]
    again = JournalEntry(3, 1, tokens([1], [2, 3, 4]))
    assert delivery.accept(again) is Verdict.TAKEN
    assert delivery.tokens == [[1, 2, 3, 4]]


def test_a_finished_journal_shorter_than_what_was_delivered_is_a_conflict_only_when_open() -> None:
    delivery = Delivery(1)
    for entry in JOURNAL[:4]:
        delivery.accept(entry)
    cut = [*JOURNAL[:4], JournalEntry(2, 3, tokens([1], [], finish="stop")), JournalEntry(2, 4, End("finished"))]
    assert delivery.replay(cut) is Verdict.TAKEN
    assert delivery.end == End("finished")
    assert delivery.finished == {0: "stop"}


def test_a_stop_string_by_event_finishes_without_taking_back() -> None:
    delivery = Delivery(1)
    delivery.accept(JournalEntry(2, 1, tokens([], [1, 2, 3])))
    assert delivery.accept(JournalEntry(2, 2, tokens([1], [], finish="stop"))) is Verdict.TAKEN
    assert delivery.is_complete
    assert delivery.tokens == [[1, 2, 3]]
    assert delivery.accept(JournalEntry(2, 3, End("finished"))) is Verdict.TAKEN
    assert delivery.end is not None


def test_choices_are_independent() -> None:
    delivery = Delivery(2)
    assert delivery.accept(JournalEntry(2, 1, tokens([], [5], 1, "stop"))) is Verdict.TAKEN
    assert delivery.accept(JournalEntry(2, 3, tokens([1], [2], 0))) is Verdict.REPLAY
    assert delivery.accept(JournalEntry(2, 4, tokens([], [5], 7))) is Verdict.REPLAY
    assert delivery.tokens == [[], [5]]


def test_logprobs_come_with_a_replay() -> None:
    h = chain("", [1, 2])
    logprobs = (TokenLogprob(-1.0), TokenLogprob(-2.0))
    journal = [
        JournalEntry(1, 0, Marker((0,))),
        JournalEntry(1, 1, Tokens(0, 0, "", h, (1, 2), logprobs, prompt_logprobs=(None, TokenLogprob(-3.0)))),
    ]
    delivery = Delivery(1)
    delivery.replay(journal)
    _, event = delivery.out.popleft()
    assert isinstance(event, Tokens)
    assert event.logprobs == logprobs
    assert event.prompt_logprobs == (None, TokenLogprob(-3.0))


def test_closing_twice_ends_once() -> None:
    delivery = Delivery(1)
    delivery.close(End("cancelled"))
    delivery.close(End("error"))
    assert drained(delivery) == ([], 1)
    assert delivery.replay(JOURNAL) is Verdict.TAKEN
    assert not delivery.out
