"""Who may start here now: a request whose worker died before starts alone, so that the guilty one is known.

The start of a request is what a crash points at. Ordinary requests start side by side; a suspect starts when nobody
else does, and nobody else starts until it is through. A worker that dies meanwhile names the culprit. Requests
that are through their start go on beside it, so a suspect costs the others a short wait and never its whole life.

Turns are given in the order they were asked for. So a suspect is not overtaken by later requests, and these wait for
no more than the suspects before them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType


class Start:
    """One request's turn. A context manager: leaving it ends the start, or gives up waiting for it."""

    def __init__(self, probation: Probation, *, suspect: bool) -> None:
        self.suspect = suspect
        self._probation = probation
        self._turn = asyncio.Event()
        self._is_over = False

    async def admitted(self, timeout_s: float | None = None) -> bool:
        """Wait for the turn; False when it has not come in time. The place in the queue is kept."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._turn.wait()
        except TimeoutError:
            return False
        return True

    def admit(self) -> None:
        self._turn.set()

    def over(self) -> None:
        """The request is through its start; the next ones may come. May be repeated."""
        if not self._is_over:
            self._is_over = True
            self._probation.leave(self)

    def __enter__(self) -> Start:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over()


class Probation:
    """The queue of starts in one worker; used on its event loop only."""

    def __init__(self) -> None:
        self._inside: set[Start] = set()
        self._waiting: deque[Start] = deque()

    @property
    def is_closed(self) -> bool:
        """A suspect starts, or waits to: what is claimed now would have to wait, so leave it to a peer."""
        return bool(self._waiting) or any(start.suspect for start in self._inside)

    def ask(self, *, suspect: bool) -> Start:
        """Queue for a start. `with probation.ask(...) as start: await start.admitted()`."""
        start = Start(self, suspect=suspect)
        self._waiting.append(start)
        self._admit()
        return start

    def leave(self, start: Start) -> None:
        if start in self._inside:
            self._inside.remove(start)
        else:
            self._waiting.remove(start)
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0]):
            start = self._waiting.popleft()
            self._inside.add(start)
            start.admit()

    def _fits(self, start: Start) -> bool:
        return not self._inside if start.suspect else not any(other.suspect for other in self._inside)
