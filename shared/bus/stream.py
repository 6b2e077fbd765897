"""The gateway's side of a request: submit it and yield its tokens until the one terminal event.

(Signature sketch; the body follows.)
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from shared.protocol.messages import End, Job, Tokens


class StreamHandle(Protocol):
    """Events of one request: validated Tokens in order, then exactly one End."""

    request_id: str
    epoch: int
    last_event_id: str

    def __aiter__(self) -> AsyncIterator[Tokens | End]: ...
    async def cancel(self, reason: str, force: bool = False, upto: int | dict[int, int] | None = None) -> None: ...


class RequestStreams:
    """`async with RequestStreams(...) as streams: handle = await streams.open(job)`."""

    async def open(self, job: Job) -> StreamHandle:
        raise NotImplementedError
