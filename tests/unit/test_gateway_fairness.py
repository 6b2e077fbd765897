"""The fair queue against its slow version, and the properties it is there for."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.fairness import FairQueue, Ticket

FLOWS = "abc"


@dataclass
class SlowQueue:
    """Start-time fair queueing as the paper writes it: look at everything, every time."""

    waiting: list[tuple[str, float, float, int, int]] = field(default_factory=list)
    starts: dict[str, float] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)
    now: float = 0.0
    clock: int = 0

    def push(self, name: int, flow: str, cost: float, weight: float, priority: int) -> None:
        if self.starts.get(flow, 0.0) < self.now:
            self.starts[flow] = self.now
        self.starts.setdefault(flow, self.now)
        self.waiting = [
            (one, old_cost, weight if one == flow else old, p, n) for one, old_cost, old, p, n in self.waiting
        ]
        self.waiting.append((flow, cost, weight, priority, name))

    def least(self) -> float:
        return min(self.starts[flow] for flow, *_ in self.waiting)

    def pop(self, flow: str) -> int:
        """Let the first request of a flow go."""
        entry = min((one for one in self.waiting if one[0] == flow), key=lambda one: (one[3], one[4]))
        self.waiting.remove(entry)
        self.now = self.starts[flow]
        self.starts[flow] += entry[1] / entry[2]
        return entry[4]

    def remove(self, name: int) -> None:
        self.waiting = [one for one in self.waiting if one[4] != name]


pushes = st.tuples(st.just("push"), st.sampled_from(FLOWS), st.integers(1, 50), st.integers(-2, 2))
steps = st.lists(pushes | st.tuples(st.just("pop")) | st.tuples(st.just("remove"), st.integers(0, 99)), max_size=120)
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}


@given(steps)
def test_it_agrees_with_the_slow_version(steps: list[tuple[object, ...]]) -> None:
    """At each turn the flow has the least start, and of that flow the right request goes; the counts agree."""
    queue: FairQueue[int] = FairQueue()
    slow = SlowQueue()
    tickets: list[Ticket[int]] = []
    for step in steps:
        if step[0] == "push":
            _, flow, cost, priority = step
            assert isinstance(flow, str)
            assert isinstance(cost, int)
            assert isinstance(priority, int)
            tickets.append(queue.push(len(tickets), flow, cost, WEIGHTS[flow], priority))
            slow.push(len(tickets) - 1, flow, cost, WEIGHTS[flow], priority)
        elif step[0] == "remove" and tickets:
            assert isinstance(step[1], int)
            ticket = tickets[step[1] % len(tickets)]
            assert queue.remove(ticket) == any(one[4] == ticket.item for one in slow.waiting)
            slow.remove(ticket.item)
        elif step[0] == "pop":
            peeked = queue.peek()
            popped = queue.pop()
            assert popped is peeked
            assert (popped is None) == (not slow.waiting)
            if popped is not None:
                assert slow.starts[popped.flow] == pytest.approx(slow.least())
                assert slow.pop(popped.flow) == popped.item
        assert len(queue) == len(slow.waiting)
        for flow in FLOWS:
            assert queue.waiting(flow) == sum(one[0] == flow for one in slow.waiting)


@given(st.lists(st.tuples(st.sampled_from(FLOWS), st.integers(1, 40)), max_size=60))
def test_it_conserves_work_and_loses_nothing(items: list[tuple[str, int]]) -> None:
    queue: FairQueue[int] = FairQueue()
    for number, (flow, cost) in enumerate(items):
        queue.push(number, flow, cost)
    gone = [ticket.item for _ in items if (ticket := queue.pop()) is not None]
    assert sorted(gone) == list(range(len(items)))
    assert queue.pop() is None


@given(
    st.lists(st.integers(1, 40), min_size=40, max_size=40),
    st.lists(st.integers(1, 40), min_size=40, max_size=40),
    st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    st.integers(0, 39),
)
def test_two_waiting_flows_share_by_weight(ours: list[int], theirs: list[int], weight: float, until: int) -> None:
    """The bound of the paper: served cost over weight differs by at most one request of each."""
    queue: FairQueue[int] = FairQueue()
    for one, other in zip(ours, theirs, strict=True):
        queue.push(one, "ours", one, weight)
        queue.push(other, "theirs", other)
    served = {"ours": 0.0, "theirs": 0.0}
    for _ in range(until):
        ticket = queue.pop()
        assert ticket is not None
        served[ticket.flow] += ticket.cost
    assert abs(served["ours"] / weight - served["theirs"]) <= max(ours) / weight + max(theirs)


@given(st.integers(0, 200), st.integers(1, 5), st.integers(1, 50))
def test_a_newcomer_waits_for_one_request_of_each_flow_at_most(gone: int, flows: int, cost: int) -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(1000):
        queue.push("crowd", f"crowd-{number % flows}", cost)
    for _ in range(gone):
        queue.pop()
    queue.push("new", "new", 10_000)
    order = [ticket.item for _ in range(flows + 1) if (ticket := queue.pop()) is not None]
    assert "new" in order


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40))
def test_within_a_flow_priority_then_arrival(priorities: list[int]) -> None:
    queue: FairQueue[tuple[int, int]] = FairQueue()
    for number, priority in enumerate(priorities):
        queue.push((priority, number), "a", 5, priority=priority)
    order = [ticket.item for _ in priorities if (ticket := queue.pop()) is not None]
    assert order == sorted(order)


def test_priority_does_not_pass_another_flow() -> None:
    turns = {}
    for priority in (0, -1000):
        queue: FairQueue[str] = FairQueue()
        for _ in range(20):
            queue.push("a", "a", 3)
            queue.push("b", "b", 3, priority=priority)
        turns[priority] = [ticket.item for _ in range(40) if (ticket := queue.pop()) is not None]
    assert turns[0] == turns[-1000]


def test_unused_turns_are_neither_saved_nor_owed() -> None:
    """A flow that was alone for long is not held back afterwards, and one that was away has no claim."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(500):
        queue.push("busy", "busy", 10)
        queue.pop()
    for _ in range(10):
        queue.push("busy", "busy", 10)
        queue.push("away", "away", 10)
    order = [ticket.item for _ in range(10) if (ticket := queue.pop()) is not None]
    assert sorted(order) == ["away"] * 5 + ["busy"] * 5


def test_leaving_costs_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("b", "b", 1)
    for _ in range(50):
        assert queue.remove(queue.push("a", "a", 1000))
    queue.push("a", "a", 1)
    assert {queue.pop().item, queue.pop().item} == {"a", "b"}  # type: ignore[union-attr]  # both are there


def test_how_many_go_before() -> None:
    queue: FairQueue[str] = FairQueue()
    assert queue.ahead("a", 1) == 0
    for _ in range(10):
        queue.push("b", "b", 1)
    assert queue.ahead("a", 1) == 0, "a newcomer's turn is next"
    assert queue.ahead("b", 1) == 10
    for _ in range(4):
        queue.push("a", "a", 1)
    assert queue.ahead("a", 1) == 8, "four of its own, and as many of the other's"


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_comings_and_goings_leave_nothing_behind(seed: int) -> None:
    """Churn while nobody's turn comes does not make the heaps grow, and idle flows are forgotten."""
    rng = random.Random(seed)
    queue: FairQueue[int] = FairQueue()
    held = [queue.push(0, f"flow-{number % 7}", 5) for number in range(20)]
    for _ in range(2000):
        queue.remove(held.pop(rng.randrange(len(held))))
        held.append(queue.push(0, f"flow-{rng.randrange(7)}", 5))
    assert len(queue._turns) + len(queue._idle) <= 14
    assert sum(len(flow.waiting) for flow in queue._flows.values()) <= 2 * 20 + 8 * 7
    while queue.pop() is not None:
        pass
    for _ in range(30):
        queue.push(0, "last", 5)
        queue.pop()
    assert set(queue._flows) == {"last"}


@pytest.mark.parametrize(("cost", "weight"), [(0, 1), (-1, 1), (1, 0), (1, -2)])
def test_nonsense_is_refused(cost: float, weight: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        FairQueue[int]().push(1, "a", cost, weight)


def test_what_a_newcomer_took_it_owes() -> None:
    """It is one again once the others had as much; while it owes, its turns are like theirs."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(9):
        queue.push("crowd", "crowd", 5)
    queue.pop()
    assert queue.is_newcomer("quiet")
    assert not queue.is_newcomer("crowd")
    queue.push("quiet", "quiet", 12)
    assert queue.pop().item == "quiet"  # type: ignore[union-attr]  # it is there
    owing = []
    while queue.pop() is not None:
        owing.append(not queue.is_newcomer("quiet"))
    assert owing == [True, True] + [False] * 6, "three turns of 5 make up for 12"


def test_a_newcomer_goes_before_turns_of_the_same_start() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in ("a", "b", "a", "b"):
        queue.push(name, name, 5)
    assert queue.pop().item == "a"  # type: ignore[union-attr]
    assert queue.pop().item == "b"  # type: ignore[union-attr]
    assert queue.pop().item == "a"  # type: ignore[union-attr]
    assert not queue.is_newcomer("b"), "it has waited, so its turn is an ordinary one"
    queue.push("new", "new", 5)
    assert queue.is_newcomer("new")
    assert [queue.pop().item, queue.pop().item] == ["new", "b"]  # type: ignore[union-attr]


@given(st.lists(st.tuples(st.sampled_from(["x", "y"]), st.integers(1, 20)), min_size=1, max_size=60))
def test_newcomers_hold_up_a_crowd_by_no_more_than_their_share(arrivals: list[tuple[str, int]]) -> None:
    """Two flows that only ever take newcomers' turns, between turns of a crowd that always waits."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(1000):
        queue.push("crowd", "crowd", 4)
    served = {"crowd": 0.0, "x": 0.0, "y": 0.0}
    for flow, cost in arrivals:
        if queue.is_newcomer(flow):
            queue.push(flow, flow, cost)
        ticket = queue.pop()
        assert ticket is not None
        served[ticket.flow] += ticket.cost
        assert max(served["x"], served["y"]) <= served["crowd"] + 20


def test_a_new_beginning_forgets_every_debt() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a", 1000)
    queue.pop()
    assert not queue.is_newcomer("a")
    queue.forget()
    assert queue.is_newcomer("a")
    queue.push("a", "a", 5)
    queue.push("b", "b", 5)
    assert [queue.pop().item, queue.pop().item] == ["a", "b"]  # type: ignore[union-attr]
