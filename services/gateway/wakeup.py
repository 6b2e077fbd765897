"""Waiting for the next token, for as long as a client is left without a sign of life.

A timeout of its own for every token would cost more than the token: each is a timer made and thrown away. Here one
timer serves many waits. It is not moved while tokens come; when it rings too early, it is set to the time left.
"""

from __future__ import annotations

import asyncio


class Wakeup:
    """One task waits, anybody wakes it; a wake-up while nobody waits is kept for the next wait."""

    def __init__(self) -> None:
        self._is_awake = False
        self._waiter: asyncio.Future[None] | None = None
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0

    def wake(self) -> None:
        self._is_awake = True
        self._release()

    async def wait(self, timeout_s: float) -> bool:
        """Until somebody wakes it; False after `timeout_s` in which nobody did."""
        if not self._is_awake:
            loop = asyncio.get_running_loop()
            self._deadline = loop.time() + timeout_s
            if self._timer is None or self._rings_at > self._deadline:
                self._set_timer(loop)
            self._waiter = loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        was_woken, self._is_awake = self._is_awake, False
        return was_woken

    def close(self) -> None:
        """Nobody will wait any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self.close()
        self._rings_at = self._deadline
        self._timer = loop.call_at(self._deadline, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._waiter is None:
            return
        if loop.time() < self._deadline:
            self._set_timer(loop)
        else:
            self._release()

    def _release(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
