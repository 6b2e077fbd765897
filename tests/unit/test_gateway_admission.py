"""Slots: the bound, the queue's bound, fairness between keys, and nothing lost when a waiter leaves."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from typing import Any

import pytest

from services.gateway.admission import Admission, AdmissionLimits, Share
from services.gateway.errors import DeadlineExceeded, RateLimited
from services.gateway.pace import Pace
from shared.errors import InvalidRequest, Overloaded


def make(
    in_flight: int, per_key: int, queued: int, wait_s: float, queued_per_key: int = 10_000, **parts: Any
) -> Admission:
    return Admission(AdmissionLimits(in_flight, per_key, queued, queued_per_key, wait_s), **parts)


class Crowd:
    """Clients that enter and stay until told to leave; `order` is who got in when, `first` who is to go first."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.order: list[str] = []
        self.first: set[str] = set()
        self.leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, key: str = "", weight: int = 1, **how: Any) -> None:
        self.leave[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._stay(name, key, weight, how))
        await self.settle()

    async def go(self, name: str) -> None:
        self.leave[name].set()
        await self.settle()

    async def cancel(self, name: str) -> None:
        self.tasks[name].cancel()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def empty(self) -> None:
        for event in self.leave.values():
            event.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        assert (self.admission.in_flight, self.admission.queued) == (0, 0)
        async with asyncio.timeout(1):
            await self.admission.wait_idle()

    async def _stay(self, name: str, key: str, weight: int, how: dict[str, Any]) -> None:
        async with self.admission.slot(key, weight, **how) as goes_first:
            self.order.append(name)
            if goes_first:
                self.first.add(name)
            await self.leave[name].wait()


async def test_requests_wait_for_a_slot_in_order() -> None:
    crowd = Crowd(make(1, 10, 10, 30))
    for name in "abc":
        await crowd.come(name)
    assert (crowd.order, crowd.admission.queued) == (["a"], 2)
    await crowd.go("a")
    assert crowd.order == ["a", "b"]
    await crowd.go("b")
    assert crowd.order == ["a", "b", "c"]
    await crowd.empty()


async def test_keys_take_turns() -> None:
    crowd = Crowd(make(1, 10, 10, 30))
    for name, key in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("b2", "b")):
        await crowd.come(name, key)
    for name in ("a1", "b1", "a2", "b2"):
        await crowd.go(name)
    assert crowd.order == ["a1", "b1", "a2", "b2", "a3"]
    await crowd.empty()


async def test_a_full_queue_is_overload() -> None:
    crowd = Crowd(make(1, 10, 1, 30))
    await crowd.come("a")
    await crowd.come("b")
    with pytest.raises(Overloaded) as caught:
        async with crowd.admission.slot(""):
            pass
    assert caught.value.retry_after >= 1
    await crowd.empty()


async def test_a_wait_has_an_end_and_leaves_nothing_behind() -> None:
    crowd = Crowd(make(1, 10, 10, 0.02))
    await crowd.come("a")
    with pytest.raises(Overloaded):
        async with crowd.admission.slot("b"):
            pass
    assert (crowd.admission.in_flight, crowd.admission.queued) == (1, 0)
    await crowd.empty()


async def test_a_key_over_its_share_is_limited_and_others_are_not() -> None:
    crowd = Crowd(make(10, 2, 10, 30))
    await crowd.come("a", "k")
    await crowd.come("b", "k")
    with pytest.raises(RateLimited):
        async with crowd.admission.slot("k"):
            pass
    await crowd.come("c", "other")
    assert crowd.order == ["a", "b", "c"]
    await crowd.go("a")
    await crowd.come("d", "k")
    assert crowd.order == ["a", "b", "c", "d"]
    await crowd.empty()


async def test_what_could_never_fit_is_the_callers_fault() -> None:
    with pytest.raises(InvalidRequest) as caught:
        async with make(4, 10, 10, 30).slot("", 5):
            pass
    assert caught.value.param == "prompt"


async def test_a_heavy_request_is_not_overtaken_for_ever() -> None:
    crowd = Crowd(make(2, 10, 10, 30))
    await crowd.come("a")
    await crowd.come("heavy", weight=2)
    await crowd.come("light")
    assert crowd.order == ["a"], "the light one waits behind the heavy one"
    await crowd.go("a")
    assert crowd.order == ["a", "heavy"]
    await crowd.empty()


async def test_a_waiter_that_leaves_frees_its_place() -> None:
    crowd = Crowd(make(1, 10, 10, 30))
    for name in "abc":
        await crowd.come(name)
    await crowd.cancel("b")
    assert crowd.admission.queued == 1
    await crowd.go("a")
    assert crowd.order == ["a", "c"]
    await crowd.empty()


async def test_a_waiter_cancelled_in_the_moment_it_is_let_in_passes_the_slot_on() -> None:
    crowd = Crowd(make(1, 10, 10, 30))
    for name in "abc":
        await crowd.come(name)
    crowd.leave["a"].set()
    while crowd.admission.queued == 2:
        await asyncio.sleep(0)
    crowd.tasks["b"].cancel()
    await crowd.settle()
    assert crowd.order in (["a", "c"], ["a", "b", "c"])
    assert crowd.admission.in_flight == 1
    await crowd.empty()


async def test_a_cancelled_waiter_that_has_not_run_yet_is_skipped() -> None:
    crowd = Crowd(make(1, 10, 10, 30))
    for name in "abc":
        await crowd.come(name)
    crowd.tasks["b"].cancel()
    crowd.leave["a"].set()
    await crowd.settle()
    assert crowd.order == ["a", "c"]
    await crowd.empty()


async def test_slots_come_back_when_the_holder_fails() -> None:
    admission = make(1, 1, 1, 30)
    async with AsyncExitStack() as stack:
        with pytest.raises(ValueError, match="boom"):
            async with admission.slot("k"):
                raise ValueError("boom")
        await stack.enter_async_context(admission.slot("k"))
        assert admission.in_flight == 1
    assert admission.in_flight == 0


async def test_priority_orders_a_keys_own_requests_only() -> None:
    crowd = Crowd(make(1, 10, 10, 30))
    await crowd.come("a1", "a")
    await crowd.come("b1", "b")
    await crowd.come("b2", "b")
    await crowd.come("a2", "a", priority=5)
    await crowd.come("a3", "a", priority=-5)
    for _ in range(4):
        await crowd.go(crowd.order[-1])
    assert crowd.order == ["a1", "b1", "a3", "b2", "a2"]
    await crowd.empty()


async def test_costly_requests_take_fewer_turns() -> None:
    crowd = Crowd(make(1, 20, 20, 30))
    await crowd.come("first", "other")
    for number in range(6):
        await crowd.come(f"a{number}", "a", cost=300)
        await crowd.come(f"b{number}", "b", cost=100)
    for _ in range(8):
        await crowd.go(crowd.order[-1])
    assert sum(name.startswith("b") for name in crowd.order) == 6
    await crowd.empty()


async def test_weights_come_from_the_key() -> None:
    shares = {"big": Share(weight=3.0), "small": Share()}
    crowd = Crowd(make(1, 20, 40, 30, share_of=lambda key: shares.get(key, Share())))
    await crowd.come("first", "other")
    for number in range(12):
        await crowd.come(f"big{number}", "big")
        await crowd.come(f"small{number}", "small")
    for _ in range(12):
        await crowd.go(crowd.order[-1])
    assert sum(name.startswith("big") for name in crowd.order) == 9
    await crowd.empty()


async def test_a_key_has_its_own_limit_when_the_file_says_so() -> None:
    crowd = Crowd(make(10, 10, 10, 30, share_of=lambda _: Share(max_in_flight=1)))
    await crowd.come("a", "k")
    with pytest.raises(RateLimited):
        crowd.admission.check("k")
    crowd.admission.check("other")
    await crowd.empty()


async def test_a_full_queue_of_a_key_is_its_own_matter() -> None:
    crowd = Crowd(make(1, 100, 10, 30, queued_per_key=2))
    for name in ("a1", "a2", "a3"):
        await crowd.come(name, "a")
    with pytest.raises(RateLimited):
        crowd.admission.check("a")
    with pytest.raises(RateLimited):
        async with crowd.admission.slot("a"):
            pass
    crowd.admission.check("b")
    await crowd.come("b1", "b")
    await crowd.go("a1")
    assert crowd.order == ["a1", "b1"]
    await crowd.empty()


async def test_check_refuses_at_once_what_slot_would() -> None:
    crowd = Crowd(make(1, 10, 1, 30))
    crowd.admission.check("a")
    await crowd.come("a", "a")
    crowd.admission.check("b")
    await crowd.come("b", "b")
    with pytest.raises(Overloaded):
        crowd.admission.check("c")
    await crowd.empty()


async def test_the_bound_follows_the_workers() -> None:
    crowd = Crowd(make(4, 10, 10, 30))
    crowd.admission.resize(1)
    for name in "abcdef":
        await crowd.come(name)
    assert crowd.order == ["a"]
    crowd.admission.resize(3)
    await crowd.settle()
    assert crowd.order == ["a", "b", "c"]
    crowd.admission.resize(100)
    await crowd.settle()
    assert crowd.admission.in_flight == 4, "never above the operator's own bound"
    crowd.admission.resize(0)
    assert crowd.admission.limit == 1, "something always runs"
    crowd.admission.resize(None)
    assert crowd.admission.limit == 4
    await crowd.empty()


async def test_a_request_of_more_prompts_than_there_is_room_for_goes_alone() -> None:
    crowd = Crowd(make(8, 10, 10, 30))
    crowd.admission.resize(2)
    await crowd.come("light")
    await crowd.come("heavy", weight=5)
    await crowd.come("next")
    assert crowd.order == ["light"]
    await crowd.go("light")
    assert crowd.order == ["light", "heavy"]
    await crowd.go("heavy")
    assert crowd.order == ["light", "heavy", "next"]
    await crowd.empty()


async def test_the_requests_own_deadline_ends_its_wait() -> None:
    crowd = Crowd(make(1, 10, 10, 30))
    await crowd.come("a")
    with pytest.raises(DeadlineExceeded):
        async with crowd.admission.slot("b", wait_s=0.02):
            pass
    assert (crowd.admission.in_flight, crowd.admission.queued) == (1, 0)
    await crowd.empty()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def one_a_second(clock: Clock, seconds: int = 60) -> Pace:
    pace = Pace(clock)
    for _ in range(seconds):
        clock.now += 1
        pace.count()
    return pace


async def test_nobody_queues_for_nothing() -> None:
    clock = Clock()
    crowd = Crowd(make(1, 100, 100, 30, pace=one_a_second(clock)))
    for number in range(10):
        await crowd.come(f"a{number}", "a")
    with pytest.raises(Overloaded, match="timeout") as caught:
        async with crowd.admission.slot("a", wait_s=5):
            pass
    assert 7 <= caught.value.retry_after <= 12
    waiting = asyncio.create_task(crowd._stay("patient", "a", 1, {"wait_s": 25}))
    newcomer = asyncio.create_task(crowd._stay("newcomer", "b", 1, {"wait_s": 5}))
    await crowd.settle()
    assert crowd.admission.queued == 11, "ten seconds fit into 25, and another key does not wait for this one's queue"
    for task in (waiting, newcomer):
        task.cancel()
    await asyncio.gather(waiting, newcomer, return_exceptions=True)
    await crowd.empty()


def test_the_pace_is_what_was_seen_lately() -> None:
    clock = Clock()
    pace = one_a_second(clock)
    assert pace.per_second == pytest.approx(1, rel=0.1)
    assert pace.retry_after(7) == pytest.approx(7, abs=1)
    assert (pace.retry_after(0), pace.retry_after(10_000)) == (1, 30)
    clock.now += 100
    assert pace.per_second < 0.01, "nothing ends any more"


def test_a_pace_is_not_made_up() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.count()
    assert (pace.per_second, pace.retry_after(50), pace.wait_s(50)) == (0, 1, 0)
    for _ in range(3):
        clock.now += 0.5
        pace.count()
    assert pace.per_second == pytest.approx(2.5, rel=0.5), "a young average is corrected for its age"


async def test_readers_that_join_count_for_their_key_and_take_no_room() -> None:
    crowd = Crowd(make(1, 2, 10, 30))
    await crowd.come("a", "k")
    async with crowd.admission.joined("k", 1):
        with pytest.raises(RateLimited):
            crowd.admission.check("k")
        with pytest.raises(RateLimited):
            async with crowd.admission.joined("k", 1):
                pass
        await crowd.go("a")
        await crowd.come("b", "other")
        assert crowd.order == ["a", "b"]
        await crowd.go("b")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await crowd.admission.wait_idle()
    await crowd.empty()


async def test_waits_are_told() -> None:
    waits: list[float] = []
    crowd = Crowd(make(1, 10, 10, 30, on_wait=waits.append))
    await crowd.come("a")
    await crowd.come("b")
    assert len(waits) == 1
    await crowd.go("a")
    assert len(waits) == 2
    assert waits[0] <= waits[1]
    await crowd.empty()


@pytest.mark.parametrize("seed", range(10))
async def test_slots_add_up_whatever_happens(seed: int) -> None:
    """Comings, goings, cancellations and resizes in any order: no slot is lost or given twice."""
    rng = random.Random(seed)
    crowd = Crowd(make(4, 50, 50, 30))
    for number in range(150):
        act = rng.random()
        if act < 0.5:
            crowd.leave[str(number)] = asyncio.Event()
            how = {"cost": rng.randint(0, 9), "priority": rng.randint(-1, 1)}
            coming = crowd._stay(str(number), rng.choice("abc"), rng.choice([1, 1, 1, 2, 3]), how)
            crowd.tasks[str(number)] = asyncio.create_task(coming)
        elif crowd.tasks and act < 0.75:
            crowd.leave[rng.choice(list(crowd.leave))].set()
        elif crowd.tasks and act < 0.9:
            crowd.tasks[rng.choice(list(crowd.tasks))].cancel()
        else:
            crowd.admission.resize(rng.choice([1, 2, 4, None]))
        for _ in range(rng.randint(0, 3)):
            await asyncio.sleep(0)
        assert 0 <= crowd.admission.in_flight <= 4
    await crowd.empty()
