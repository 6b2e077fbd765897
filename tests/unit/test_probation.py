"""Turns of requests whose worker died: alone, in order, for no longer than their start."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.worker.probation import Probation, Start


def is_in(start: Start) -> bool:
    return start._turn.is_set() and not start._is_over


def is_closed(probation: Probation) -> bool:
    return probation.is_closed


def ask(probation: Probation, kinds: str) -> list[Start]:
    """A start for each letter: o ordinary, s suspect."""
    return [probation.ask(suspect=kind == "s") for kind in kinds]


def test_ordinary_requests_start_side_by_side() -> None:
    assert all(map(is_in, ask(probation := Probation(), "ooo")))
    assert not is_closed(probation)


def test_a_suspect_waits_for_those_inside_and_holds_off_those_after_it() -> None:
    probation = Probation()
    first, second, suspect, later = ask(probation, "oos" + "o")
    assert [is_in(start) for start in (first, second, suspect, later)] == [True, True, False, False]
    assert is_closed(probation)
    first.over()
    assert not is_in(suspect)
    second.over()
    assert (is_in(suspect), is_in(later)) == (True, False)
    suspect.over()
    assert is_in(later)
    assert not is_closed(probation)


def test_suspects_start_one_at_a_time() -> None:
    starts = ask(Probation(), "sss")
    for index in range(3):
        assert [is_in(start) for start in starts] == [other == index for other in range(3)]
        starts[index].over()


def test_a_suspect_that_gives_up_waiting_lets_the_others_in() -> None:
    inside, suspect, later = ask(Probation(), "oso")
    suspect.over()
    assert is_in(later)
    inside.over()
    assert not is_in(suspect), "a turn that was given up never comes"


def test_a_start_is_over_once() -> None:
    probation = Probation()
    first, second, suspect = ask(probation, "oos")
    first.over()
    first.over()
    assert not is_in(suspect)
    second.over()
    assert is_in(suspect)


async def test_waiting_tells_when_the_turn_came_and_keeps_the_place() -> None:
    probation = Probation()
    inside, suspect = ask(probation, "os")
    assert await inside.admitted()
    assert not await suspect.admitted(0)
    later = probation.ask(suspect=True)
    inside.over()
    assert await suspect.admitted(0)
    assert not await later.admitted(0)


async def test_a_handler_that_is_cancelled_while_it_waits_leaves_no_trace() -> None:
    probation = Probation()
    (inside,) = ask(probation, "o")

    async def handle() -> None:
        with probation.ask(suspect=True) as start:
            await start.admitted()

    task = asyncio.create_task(handle())
    await asyncio.sleep(0)
    assert is_closed(probation)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not is_closed(probation)
    inside.over()


@given(st.lists(st.one_of(st.sampled_from("os"), st.integers(0, 20)), max_size=60))
def test_any_order_of_arrivals_and_leavings(steps: list[str | int]) -> None:
    """A suspect is alone, nobody overtakes, and whoever asked gets in once those before have left."""
    probation = Probation()
    starts: list[Start] = []
    for step in steps:
        if isinstance(step, str):
            starts.append(probation.ask(suspect=step == "s"))
        elif step < len(starts):
            starts[step].over()
        inside = [start for start in starts if is_in(start)]
        assert len(inside) <= 1 or not any(start.suspect for start in inside)
        waiting = [start for start in starts if not start._is_over and not is_in(start)]
        assert not waiting or inside, "somebody waits for nobody"
        asked = [start for start in starts if not start._is_over]
        assert asked[: len(inside)] == inside, "somebody was overtaken"
        assert is_closed(probation) == any(start.suspect for start in asked)
    for start in starts:
        assert start._is_over or is_in(start), "those before have left, so it is this one's turn"
        start.over()
