"""Ending background tasks for sure.

On Python 3.11 the Redis client can swallow a cancellation: it sends commands under `asyncio.wait_for`, which forgets a
cancellation that arrives just as the bytes are out, and below 3.11.3 (Debian 12's own) its timeouts do so too while a
connection is tidied up. The task then goes on as if nothing had happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_CANCEL_AGAIN_S = 0.5


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended, however often that takes; their results and errors are dropped."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        done, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)
        for task in done:
            if not task.cancelled():
                task.exception()  # taken notice of, so that it is not reported as never retrieved


def heed_cancellation() -> None:
    """Raise a cancellation of this task that a client library swallowed.

    For endless loops inside a task group: a group passes a cancellation on only once, so `end_tasks` cannot help there.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
