"""Priority in the engine: who goes first, who is preempted, and that neither changes a token."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.engine.sequence import Sequence, Status
from tests.engine_fakes import expected_tokens, make_engine, make_sequence, output_of


def sequence(number: int, priority: int = 0, length: int = 3, max_tokens: int = 8) -> Sequence:
    made = make_sequence([(number + i) % 50 for i in range(length)], name=str(number), max_tokens=max_tokens)
    made.priority = priority
    return made


def expected(one: Sequence) -> list[int]:
    return expected_tokens(one.tokens[: one.prompt_len], one.params)


arrivals = st.lists(
    st.tuples(st.integers(-2, 2), st.integers(1, 14), st.integers(1, 16), st.integers(0, 3)), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(arrivals, st.integers(8, 14), st.integers(1, 5))
def test_tokens_do_not_change_and_everything_ends(
    arrivals: list[tuple[int, int, int, int]], num_blocks: int, max_num_seqs: int
) -> None:
    """In a pool that is too small for all; the first in rank of those that run is never preempted."""
    engine, _ = make_engine(num_blocks=num_blocks + 1, max_num_seqs=max_num_seqs, reserve_blocks=0)
    scheduler = engine.scheduler
    sequences = []
    for number, (priority, length, max_tokens, steps) in enumerate(arrivals):
        sequences.append(sequence(number, priority, length, max_tokens))
        engine.add(sequences[-1])
        for _ in range(steps):
            engine.step()
    for _ in range(3000):
        if not engine.has_work:
            break
        first = scheduler.running[0] if scheduler.running else None
        before = first.num_preemptions if first else 0
        assert engine.step(), "there is work, so something is computed"
        engine.check_integrity()
        assert first is None or first.num_preemptions == before
        assert scheduler.running == sorted(scheduler.running, key=lambda one: one.rank)
        assert scheduler.waiting == sorted(scheduler.waiting, key=lambda one: one.rank)
    for one in sequences:
        assert one.status is Status.FINISHED
        assert output_of(one) == expected(one)
    assert engine.blocks.num_free == engine.blocks.num_usable


def test_the_lower_number_waits_less() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    order = []
    for number, priority in enumerate([0, 5, -5, 0, 5]):
        engine.add(sequence(number, priority, max_tokens=2))
    while engine.has_work:
        for output in engine.step():
            if output.sequence.status is Status.FINISHED:
                order.append(output.sequence.request_id)
    assert order == ["0", "2", "3", "1", "4"], "the first runs already; arrival decides among equals"


def test_the_lowest_priority_is_preempted_and_of_those_the_newest() -> None:
    engine, _ = make_engine(num_blocks=7, reserve_blocks=0)
    members = [sequence(number, priority, max_tokens=12) for number, priority in enumerate([5, 0, 5, 0])]
    for one in members:
        engine.add(one)
    seen: list[str] = []
    while engine.has_work:
        before = {one.request_id: one.num_preemptions for one in members}
        engine.step()
        seen += [one.request_id for one in members if one.num_preemptions > before[one.request_id]]
    assert seen[:2] == ["2", "0"], "the newest of the low, then the older one"
    assert members[1].num_preemptions == 0, "the first in rank never"
    assert all(output_of(one) == expected(one) for one in members)


def test_a_preempted_sequence_comes_back_at_its_old_place() -> None:
    engine, _ = make_engine(num_blocks=7, reserve_blocks=0)
    members = [sequence(number, max_tokens=12) for number in range(3)]
    for one in members:
        engine.add(one)
    while not engine.scheduler.num_preemptions:
        engine.step()
    preempted = next(one for one in members if one.num_preemptions)
    engine.add(sequence(9))
    assert engine.scheduler.waiting[0] is preempted
    engine.add(sequence(10, -1))
    assert [one.request_id for one in engine.scheduler.waiting][:2] == ["10", preempted.request_id]
