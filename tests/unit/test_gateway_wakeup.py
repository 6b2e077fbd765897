"""One timer for many waits: it must neither ring early nor be forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import uvloop

from services.gateway.wakeup import Wakeup

Loop = Callable[[], asyncio.AbstractEventLoop]
LONG_S = 60.0


async def woken_soon(wakeup: Wakeup, timeout_s: float) -> bool:
    """A wait that somebody ends once it has begun."""
    waiting = asyncio.ensure_future(wakeup.wait(timeout_s))
    await asyncio.sleep(0)
    assert not waiting.done()
    wakeup.wake()
    return await waiting


async def test_a_wake_up_before_the_wait_is_kept_once() -> None:
    wakeup = Wakeup()
    wakeup.wake()
    wakeup.wake()
    assert await wakeup.wait(LONG_S)
    assert not await wakeup.wait(0.001), "both were for the first wait"


async def test_whoever_waits_is_woken() -> None:
    wakeup = Wakeup()
    assert await woken_soon(wakeup, LONG_S)
    wakeup.close()


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_nobody_waits_less_than_asked_for(make_loop: Loop) -> None:
    """The timer of a wait that was woken rings within the next one, which still has its whole time."""

    async def main() -> None:
        wakeup, loop = Wakeup(), asyncio.get_running_loop()
        for _ in range(3):
            assert await woken_soon(wakeup, 0.02)
            began = loop.time()
            assert not await wakeup.wait(0.05)
            assert loop.time() >= began + 0.05, "compared as sums: a difference of rounded times may come out smaller"

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(main())


async def test_a_shorter_wait_is_not_held_up_by_the_timer_of_a_longer_one() -> None:
    wakeup = Wakeup()
    assert await woken_soon(wakeup, LONG_S)
    async with asyncio.timeout(LONG_S / 2):
        assert not await wakeup.wait(0.001)


async def test_a_timer_that_rings_while_nobody_waits_does_not_end_the_next_wait() -> None:
    wakeup, loop = Wakeup(), asyncio.get_running_loop()
    assert await woken_soon(wakeup, 0.001)
    rung = asyncio.Event()
    loop.call_later(0.01, rung.set)
    await rung.wait()
    assert await woken_soon(wakeup, LONG_S)
    wakeup.close()


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    wakeup = Wakeup()
    waiting = asyncio.ensure_future(wakeup.wait(LONG_S))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    wakeup.wake()
    assert await wakeup.wait(LONG_S)
    wakeup.close()
