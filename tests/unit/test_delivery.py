"""What a client gets, whatever order and loss its events come with."""

from __future__ import annotations

import random

import pytest

from shared.bus.delivery import MAX_AHEAD, Delivery, Verdict
from shared.protocol.journal import chain, fold
from shared.protocol.messages import End, JournalEntry, Marker, TokenLogprob, Tokens
from shared.protocol.position import Position


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
    """All tokens put out, and how many Ends; bases must be consecutive, positions may not go back."""
    got: list[int] = []
    ends = 0
    positions = [position for position, _ in delivery.history]
    assert positions == sorted(positions)
    for _, event in delivery.history:
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
    assert (delivery.emax, str(delivery.position)) == (3, "3-2")


def test_an_end_before_its_tokens_waits_for_the_journal() -> None:
    delivery = Delivery(1)
    assert delivery.accept(JOURNAL[-1]) is Verdict.REPLAY
    assert delivery.end is None
    assert delivery.accept(JournalEntry(3, 2, End("error", "x"))) is Verdict.REPLAY


def test_a_conflict_puts_nothing_out() -> None:
    delivery = Delivery(1)
    delivery.accept(JournalEntry(2, 1, tokens([], [9, 9])))
    assert delivery.replay(JOURNAL) is Verdict.CONFLICT
    assert len(delivery.history) == 1
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


def test_of_several_choices_only_the_direct_successor_counts() -> None:
    """What is missing may be another choice's, which length and hash of this one cannot tell."""
    delivery = Delivery(2)
    first = JournalEntry(2, 1, tokens([], [5], 1, "stop"))
    assert delivery.accept(first) is Verdict.REPLAY, "2-0 was not seen"
    assert delivery.history == []
    assert delivery.replay([JournalEntry(1, 0, Marker((0, 0))), JournalEntry(2, 0, Marker((0, 0)))]) is Verdict.TAKEN
    assert delivery.tokens == [[], [5]], "what came too early follows now"
    assert delivery.accept(JournalEntry(2, 3, tokens([], [1], 0))) is Verdict.REPLAY, "2-2 was not seen"
    assert delivery.accept(JournalEntry(2, 2, tokens([], [], 7))) is Verdict.REPLAY, "there is no choice 7"
    assert delivery.accept(first) is Verdict.TAKEN, "it came twice"
    assert delivery.tokens == [[], [5]]


def test_an_old_number_with_new_tokens_means_that_redis_lost_writes() -> None:
    delivery = Delivery(2)
    delivery.replay([JournalEntry(1, 0, Marker((0, 0))), JournalEntry(1, 1, tokens([], [5], 1))])
    assert delivery.accept(JournalEntry(1, 1, tokens([], [4], 0))) is Verdict.REPLAY


def test_a_replay_delivers_entry_by_entry_each_under_its_own_position() -> None:
    delivery = Delivery(2)
    journal = [
        JournalEntry(1, 0, Marker((0, 0))),
        JournalEntry(2, 0, Marker((0, 0))),
        JournalEntry(2, 1, tokens([], [1], 0)),
        JournalEntry(2, 2, tokens([], [5], 1)),
        JournalEntry(2, 3, tokens([1], [2, 3], 0, "stop")),
        JournalEntry(3, 0, Marker((3, 1))),
        JournalEntry(3, 1, tokens([5], [6], 1, "length")),
        JournalEntry(3, 2, End("finished")),
    ]
    delivery.replay(journal)
    events = [(str(position), event) for position, event in delivery.history]
    assert [name for name, _ in events] == ["2-1", "2-2", "2-3", "3-1", "3-2"]
    assert [event.tokens for _, event in events if isinstance(event, Tokens)] == [(1,), (5,), (2, 3), (6,)]


def test_a_marker_with_tokens_has_one_position_a_choice() -> None:
    delivery = Delivery(3)
    journal = [
        JournalEntry(7, 0, Marker((0, 0, 0), ((1, 2), (), (5,)))),
        JournalEntry(7, 1, tokens([5], [], 2, "stop")),
    ]
    delivery.replay(journal)
    assert [str(position) for position, _ in delivery.history] == ["7-0.0", "7-0.2", "7-1"]
    assert delivery.tokens == [[1, 2], [], [5]]
    assert delivery.position == Position(7, 1)


def test_tokens_that_the_rest_of_the_journal_takes_back_are_never_delivered() -> None:
    """Redis lost writes, another attempt sampled otherwise, and the client's gateway had it repaired."""
    journal = [
        JournalEntry(2, 0, Marker((0,))),
        JournalEntry(2, 1, tokens([], [1])),
        JournalEntry(2, 2, tokens([1], [7, 8], finish="stop")),
        JournalEntry(3, 0, Marker((0,), ((1, 2),))),
        JournalEntry(3, 1, tokens([1, 2], [3], finish="stop")),
    ]
    delivery = Delivery(1)
    delivery.replay(journal)
    assert [(str(position), event.tokens) for position, event in delivery.history if isinstance(event, Tokens)] == [
        ("2-1", (1,)),
        ("3-0.0", (2,)),
        ("3-1", (3,)),
    ]


def test_tokens_beyond_a_stop_string_are_not_delivered_again() -> None:
    delivery = Delivery(1)
    delivery.replay([*JOURNAL[:4], JournalEntry(2, 3, tokens([1, 2], [], finish="stop"))])
    assert delivery.tokens == [[1, 2]]
    assert delivery.finished == {0: "stop"}


@pytest.mark.parametrize("num_choices", [1, 2])
def test_what_comes_while_the_journal_is_read_is_not_lost(num_choices: int) -> None:
    """A reading of the journal is out of date when it arrives; what was published meanwhile continues it."""
    journal = [JournalEntry(1, 0, Marker((0,) * num_choices))]
    journal += [JournalEntry(1, ev, tokens(list(range(1, ev)), [ev])) for ev in range(1, 10)]
    delivery = Delivery(num_choices)
    verdicts = [delivery.accept(entry) for entry in journal[4:8]]
    assert verdicts == [Verdict.REPLAY] * 4
    delivery.replay(journal[:5])
    assert delivery.tokens[0] == list(range(1, 8)), "the journal had four"
    assert [delivery.accept(entry) for entry in journal[8:]] == [Verdict.TAKEN] * 2
    assert [str(position) for position, _ in delivery.history] == [f"1-{ev}" for ev in range(1, 10)]


def test_what_is_kept_ahead_is_bounded() -> None:
    delivery = Delivery(2)
    for ev in range(2, MAX_AHEAD + 100):
        delivery.accept(JournalEntry(1, ev, tokens([1], [2])))
    assert len(delivery._ahead) <= MAX_AHEAD


def test_following_takes_what_comes_next_in_the_journal() -> None:
    delivery = Delivery(1)
    assert delivery.follow(JOURNAL[:3]) is Verdict.TAKEN
    assert delivery.follow(JOURNAL[3:]) is Verdict.TAKEN
    assert drained(delivery) == ([1, 2, 3, 4], 1)
    late = Delivery(1)
    assert late.follow([JournalEntry(3, 0, Marker((3,)))]) is Verdict.REPLAY
    assert late.follow([JournalEntry(3, 0, Marker((0,), ((1,),)))]) is Verdict.REPLAY
    assert late.follow([JournalEntry(3, 1, End("error", "x"))]) is Verdict.REPLAY, "read whole, it may be the end"


@pytest.mark.parametrize("seed", range(20))
def test_whoever_was_given_an_event_was_given_every_entry_up_to_its_position(seed: int) -> None:
    """The law that lets another gateway continue from an event id, for any way the entries came."""
    generator = random.Random(seed)
    journal = [JournalEntry(1, 0, Marker((0, 0)))]
    held: list[list[int]] = [[], []]
    for ev in range(1, 12):
        choice = generator.randrange(2)
        new = [generator.randrange(100) for _ in range(generator.randint(1, 3))]
        journal.append(JournalEntry(1, ev, tokens(held[choice], new, choice)))
        held[choice] = held[choice] + new
    delivery = Delivery(2)
    for upto in sorted(generator.choices(range(len(journal) + 1), k=4)):
        for entry in generator.choices(journal[:upto], k=5) if upto else []:
            delivery.accept(entry)
        if generator.random() < 0.7:
            delivery.replay(journal[:upto])
    delivery.replay(journal)
    given: list[list[int]] = [[], []]
    for position, event in delivery.history:
        assert isinstance(event, Tokens)
        given[event.choice] += event.tokens
        before = [entry for entry in journal if Position.of(entry) <= position]
        assert given == [choice.tokens for choice in fold(before, 2).choices]


def test_logprobs_come_with_a_replay() -> None:
    h = chain("", [1, 2])
    logprobs = (TokenLogprob(-1.0), TokenLogprob(-2.0))
    journal = [
        JournalEntry(1, 0, Marker((0,))),
        JournalEntry(1, 1, Tokens(0, 0, "", h, (1, 2), logprobs, prompt_logprobs=(None, TokenLogprob(-3.0)))),
    ]
    delivery = Delivery(1)
    delivery.replay(journal)
    _, event = delivery.history[0]
    assert isinstance(event, Tokens)
    assert event.logprobs == logprobs
    assert event.prompt_logprobs == (None, TokenLogprob(-3.0))


def test_closing_twice_ends_once() -> None:
    delivery = Delivery(1)
    delivery.close(End("cancelled"))
    delivery.close(End("error"))
    assert drained(delivery) == ([], 1)
    assert delivery.replay(JOURNAL) is Verdict.TAKEN
    assert len(delivery.history) == 1
