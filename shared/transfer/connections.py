"""Who is connected to a listener: strangers, few and briefly, and links, whose peers proved the secret.

Anyone who reaches the port can open connections. Were there one bound for all of them, silent strangers would
keep the workers out; so strangers have a bound of their own, and the newest one displaces the oldest. An honest
peer proves the secret within milliseconds and is hardly ever the oldest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

MAX_STRANGERS = 32


class Connections:
    """Tasks that serve one connection each; used on the event loop only."""

    def __init__(self, max_links: int, max_strangers: int = MAX_STRANGERS) -> None:
        self._max_links = max_links
        self._max_strangers = max_strangers
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._links: set[asyncio.Task[None]] = set()

    @property
    def num_strangers(self) -> int:
        return len(self._strangers)

    @property
    def num_links(self) -> int:
        return len(self._links)

    def serve(self, connection: Coroutine[None, None, None], writer: asyncio.StreamWriter) -> None:
        """Run `connection`, whose peer is a stranger until the task says `prove`."""
        while len(self._strangers) >= self._max_strangers:
            self._strangers.pop(next(iter(self._strangers))).transport.abort()
        task = asyncio.get_running_loop().create_task(connection)
        self._tasks.add(task)
        self._strangers[task] = writer
        task.add_done_callback(self._forget)

    def prove(self) -> bool:
        """The current task's peer has proved the secret; False when there are as many links as there may be."""
        task = asyncio.current_task()
        if task not in self._tasks:
            raise RuntimeError("only the task of a connection may say that its peer is proven")
        self._strangers.pop(task, None)
        if len(self._links) >= self._max_links:
            return False
        self._links.add(task)
        return True

    async def close(self, timeout_s: float) -> None:
        """Wait for all to end by themselves, then cancel them; returns when none is left."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._links.discard(task)
        self._strangers.pop(task, None)
