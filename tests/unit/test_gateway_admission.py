"""Slots: the bound, the queue's bound, fairness between keys, and nothing lost when a waiter leaves."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from services.gateway.admission import Admission
from services.gateway.errors import RateLimited
from shared.errors import InvalidRequest, Overloaded


class Crowd:
    """Clients that enter and stay until told to leave; `order` is who got in when."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.order: list[str] = []
        self.leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, key: str = "", weight: int = 1) -> None:
        self.leave[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._stay(name, key, weight))
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

    async def _stay(self, name: str, key: str, weight: int) -> None:
        async with self.admission.slot(key, weight):
            self.order.append(name)
            await self.leave[name].wait()


async def test_requests_wait_for_a_slot_in_order() -> None:
    crowd = Crowd(Admission(1, 10, 10, 30))
    for name in "abc":
        await crowd.come(name)
    assert (crowd.order, crowd.admission.queued) == (["a"], 2)
    await crowd.go("a")
    assert crowd.order == ["a", "b"]
    await crowd.go("b")
    assert crowd.order == ["a", "b", "c"]
    await crowd.empty()


async def test_keys_take_turns() -> None:
    crowd = Crowd(Admission(1, 10, 10, 30))
    for name, key in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("b2", "b")):
        await crowd.come(name, key)
    for name in ("a1", "a2", "b1", "a3"):
        await crowd.go(name)
    assert crowd.order == ["a1", "a2", "b1", "a3", "b2"]
    await crowd.empty()


async def test_a_full_queue_is_overload() -> None:
    crowd = Crowd(Admission(1, 10, 1, 30))
    await crowd.come("a")
    await crowd.come("b")
    with pytest.raises(Overloaded) as caught:
        async with crowd.admission.slot(""):
            pass
    assert caught.value.retry_after >= 1
    await crowd.empty()


async def test_a_wait_has_an_end_and_leaves_nothing_behind() -> None:
    crowd = Crowd(Admission(1, 10, 10, 0.02))
    await crowd.come("a")
    with pytest.raises(Overloaded):
        async with crowd.admission.slot("b"):
            pass
    assert (crowd.admission.in_flight, crowd.admission.queued) == (1, 0)
    await crowd.empty()


async def test_a_key_over_its_share_is_limited_and_others_are_not() -> None:
    crowd = Crowd(Admission(10, 2, 10, 30))
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
        async with Admission(4, 10, 10, 30).slot("", 5):
            pass
    assert caught.value.param == "prompt"


async def test_a_heavy_request_is_not_overtaken_for_ever() -> None:
    crowd = Crowd(Admission(2, 10, 10, 30))
    await crowd.come("a")
    await crowd.come("heavy", weight=2)
    await crowd.come("light")
    assert crowd.order == ["a"], "the light one waits behind the heavy one"
    await crowd.go("a")
    assert crowd.order == ["a", "heavy"]
    await crowd.empty()


async def test_a_waiter_that_leaves_frees_its_place() -> None:
    crowd = Crowd(Admission(1, 10, 10, 30))
    for name in "abc":
        await crowd.come(name)
    await crowd.cancel("b")
    assert crowd.admission.queued == 1
    await crowd.go("a")
    assert crowd.order == ["a", "c"]
    await crowd.empty()


async def test_a_waiter_cancelled_in_the_moment_it_is_let_in_passes_the_slot_on() -> None:
    crowd = Crowd(Admission(1, 10, 10, 30))
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
    crowd = Crowd(Admission(1, 10, 10, 30))
    for name in "abc":
        await crowd.come(name)
    crowd.tasks["b"].cancel()
    crowd.leave["a"].set()
    await crowd.settle()
    assert crowd.order == ["a", "c"]
    await crowd.empty()


async def test_slots_come_back_when_the_holder_fails() -> None:
    admission = Admission(1, 1, 1, 30)
    async with AsyncExitStack() as stack:
        with pytest.raises(ValueError, match="boom"):
            async with admission.slot("k"):
                raise ValueError("boom")
        await stack.enter_async_context(admission.slot("k"))
        assert admission.in_flight == 1
    assert admission.in_flight == 0
