"""The `data:` events of a stream of server-sent events, cut from the bytes as they arrive.

Bytes are taken as the socket gives them and not line by line: on the machine under measurement, time spent on reading
is time taken from the server.
"""

from __future__ import annotations

import json
from typing import Any

MAX_LINE = 1 << 20


class StreamError(Exception):
    """The server answered, but not with a whole stream."""


class EventParser:
    """`feed` it the bytes; nothing comes after [DONE]."""

    def __init__(self) -> None:
        self._rest = b""
        self.is_done = False

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The events that are whole now. Raises StreamError for one that is no JSON object."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            raise StreamError(f"a line has more than {MAX_LINE} bytes")
        return self._events(lines)

    def end(self) -> list[dict[str, Any]]:
        """The bytes have ended: an event whose line was not."""
        rest, self._rest = self._rest, b""
        return self._events([rest])

    def _events(self, lines: list[bytes]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        for line in lines:
            if self.is_done or not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                self.is_done = True
            else:
                events.append(_object(data))
        return events


def _object(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise StreamError("an event is not a JSON object")
    return event
