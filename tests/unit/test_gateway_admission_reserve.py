"""The reserve above the limit: newcomers do not wait, it is never exceeded, and a crowd cannot use it."""

from __future__ import annotations

import asyncio
import random

import pytest

from services.gateway.admission import RESERVE_SHARE
from services.gateway.errors import Draining, RateLimited
from shared.errors import Overloaded
from tests.unit.test_gateway_admission import Crowd, make

ROOM = 2 * RESERVE_SHARE
"""So many slots below the limit have a reserve of two."""


async def full(max_in_flight: int = 100, queued: int = 5, max_queued: int = 50) -> Crowd:
    """A crowd of one key that has every slot below the limit, and requests of it that wait."""
    crowd = Crowd(make(max_in_flight, 100, max_queued, 30))
    crowd.admission.resize(ROOM)
    for number in range(ROOM + queued):
        await crowd.come(f"crowd-{number}", "crowd", cost=10)
    assert (crowd.admission.in_flight, crowd.admission.queued) == (ROOM, queued)
    return crowd


async def test_a_newcomer_does_not_wait_for_a_slot() -> None:
    crowd = await full()
    await crowd.come("new", "quiet", cost=10)
    assert crowd.order[-1] == "new"
    assert crowd.first == {"new"}
    assert crowd.admission.in_flight == ROOM + 1
    await crowd.empty()


async def test_what_the_reserve_lent_comes_back_before_anybody_else_is_let_in() -> None:
    crowd = await full()
    await crowd.come("new", "quiet", cost=10)
    await crowd.go("crowd-0")
    assert (crowd.order[-1], crowd.admission.in_flight) == ("new", ROOM)
    await crowd.go("crowd-1")
    assert (crowd.order[-1], crowd.admission.in_flight) == (f"crowd-{ROOM}", ROOM)
    await crowd.empty()


async def test_a_key_uses_it_again_only_when_the_others_had_as_much() -> None:
    crowd = await full()
    await crowd.come("new-1", "quiet", cost=15)
    await crowd.go("new-1")
    await crowd.come("new-2", "quiet", cost=15)
    assert "new-2" not in crowd.order, "it owes what it took"
    await crowd.go("crowd-0")
    assert crowd.order[-1] == f"crowd-{ROOM}", "the other key had less"
    await crowd.go("crowd-1")
    assert crowd.order[-1] == "new-2", "and now it had more"
    await crowd.go("new-2")
    for number in range(2, 6):
        await crowd.go(f"crowd-{number}")
    await crowd.come("new-3", "quiet", cost=15)
    assert crowd.order[-1] == "new-3"
    assert crowd.first == {"new-1", "new-3"}
    await crowd.empty()


async def test_many_new_keys_share_the_reserve() -> None:
    """Keys cost nothing to somebody who has many: all of them together get no more than the reserve."""
    crowd = await full()
    for number in range(10):
        await crowd.come(f"new-{number}", f"key-{number}", cost=10)
    assert [name for name in crowd.order if name.startswith("new")] == ["new-0", "new-1"]
    assert crowd.admission.in_flight == crowd.admission.limit_of_newcomers == ROOM + 2
    await crowd.go("new-0")
    assert crowd.order[-1] == "new-2", "the others in turn"
    assert crowd.admission.in_flight == ROOM + 2
    await crowd.empty()


async def test_newcomers_pass_a_turn_of_the_same_virtual_time() -> None:
    """Two keys that both wait, at equal costs, leave the virtual time at the second one's turn."""
    crowd = await full(queued=0)
    for number in range(4):
        await crowd.come(f"other-{number}", "other", cost=10)
        await crowd.come(f"more-{number}", "crowd", cost=10)
    for number in range(4):
        await crowd.go(f"crowd-{number}")
        await crowd.come(f"new-{number}", f"key-{number}", cost=10)
        assert crowd.order[-1] == f"new-{number}"
        await crowd.go(f"new-{number}")
    await crowd.empty()


async def test_the_operators_bound_is_above_the_reserve() -> None:
    crowd = await full(max_in_flight=ROOM)
    await crowd.come("new", "quiet")
    assert "new" not in crowd.order
    await crowd.go("crowd-0")
    assert crowd.order[-1] == "new", "its turn is the next one"
    assert crowd.first == {"new"}
    await crowd.empty()


async def test_a_request_of_more_prompts_than_the_reserve_waits() -> None:
    crowd = await full()
    await crowd.come("heavy", "quiet", weight=3)
    assert "heavy" not in crowd.order
    await crowd.go("crowd-0")
    assert crowd.order[-1] == "heavy"
    assert crowd.admission.in_flight == ROOM + 2
    await crowd.empty()


async def test_nobody_goes_first_where_nobody_runs() -> None:
    crowd = Crowd(make(100, 100, 50, 30))
    crowd.admission.resize(ROOM)
    await crowd.come("a", "a")
    await crowd.come("b", "b")
    assert crowd.first == {"b"}
    await crowd.empty()


async def test_without_keys_nobody_goes_first() -> None:
    crowd = Crowd(make(100, 100, 50, 30))
    crowd.admission.resize(ROOM)
    for number in range(2 * ROOM):
        await crowd.come(str(number))
    assert crowd.first == set()
    assert crowd.admission.in_flight == ROOM
    await crowd.empty()


async def test_a_full_queue_does_not_turn_a_newcomer_away() -> None:
    crowd = await full(max_queued=5)
    crowd.admission.check("quiet")
    with pytest.raises(Overloaded):
        crowd.admission.check("crowd")
    for number in range(2):
        await crowd.come(f"new-{number}", f"key-{number}")
    assert crowd.order[-2:] == ["new-0", "new-1"]
    with pytest.raises(Overloaded):
        crowd.admission.check("quiet")
    await crowd.empty()


async def test_those_sent_away_have_an_error_each() -> None:
    crowd = await full(queued=3)
    crowd.admission.refuse_waiting(lambda: Draining("Not here.", 2))
    await crowd.settle()
    refused = [crowd.tasks[f"crowd-{ROOM + number}"].exception() for number in range(3)]
    assert [type(error) for error in refused] == [Draining] * 3
    assert len(set(map(id, refused))) == 3
    await crowd.empty()


@pytest.mark.parametrize("seed", range(10))
async def test_neither_bound_is_passed_whatever_happens(seed: int) -> None:
    """Keys that come once and keys that crowd, with one prompt or more, and clients that leave at any moment."""
    rng = random.Random(seed)
    crowd = Crowd(make(100, 30, 60, 30))
    crowd.admission.resize(ROOM)
    for number in range(200):
        act = rng.random()
        if act < 0.6:
            key = rng.choice(["crowd", "crowd", "other", f"once-{number}"])
            crowd.leave[str(number)] = asyncio.Event()
            how = {"cost": rng.randint(1, 9), "priority": rng.randint(-1, 1)}
            coming = crowd._stay(str(number), key, rng.choice([1, 1, 1, 2, 3]), how)
            crowd.tasks[str(number)] = asyncio.create_task(coming)
        elif crowd.tasks and act < 0.85:
            crowd.leave[rng.choice(list(crowd.leave))].set()
        elif crowd.tasks:
            crowd.tasks[rng.choice(list(crowd.tasks))].cancel()
        before = crowd.admission.in_flight
        for _ in range(rng.randint(0, 3)):
            await asyncio.sleep(0)
        assert 0 <= crowd.admission.in_flight <= crowd.admission.limit_of_newcomers
        if crowd.admission.in_flight > max(before, crowd.admission.limit):
            assert crowd.first, "above the limit are newcomers only"
    await crowd.empty()
    refused = [task.exception() for task in crowd.tasks.values() if not task.cancelled()]
    assert {type(error) for error in refused} <= {type(None), RateLimited, Overloaded}
