"""Many streams of completions at once, read as cheaply as Python can: when each event arrived, and nothing else.

    python -m benchmarks.stream_client --port 8000 --streams 32 --output-len 128 --out arrivals.json

Writes, for each stream, the time (monotonic clock) at which each journal event arrived, by its number. The prompt of
stream i begins with token i, so that whoever generates knows which one it is. Ends with status 1 when a stream is not
answered with 200 or does not come to its end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import cast

import uvloop

PROMPT_LEN = 64
EVENT_ID = re.compile(rb"id: [0-9]+-([0-9]+)\n")
DONE = b"data: [DONE]\n\n"
KEPT = 64
"""Bytes of what was read that may belong to an id or an end that has not come whole."""
STATUS = b"HTTP/1.1 200"


class Stream(asyncio.Protocol):
    """One connection with one request; `arrivals` [(event number, time)], `ended` once the server closed it."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._rest = b""
        self._is_answered = False
        self.arrivals: list[tuple[int, float]] = []
        self.is_complete = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        data = self._rest + data
        self._is_answered = self._is_answered or data.startswith(STATUS)
        taken = 0
        for match in EVENT_ID.finditer(data):
            self.arrivals.append((int(match[1]), now))
            taken = match.end()
        self.is_complete = self.is_complete or (self._is_answered and DONE in data)
        self._rest = data[max(taken, len(data) - KEPT) :]

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set_result(None)


def request(port: int, stream: int, output_len: int) -> bytes:
    """A whole HTTP request; the server closes the connection after its answer."""
    body = json.dumps(
        {
            "prompt": [stream] * PROMPT_LEN,
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


async def read_all(port: int, streams: int, output_len: int) -> list[Stream]:
    loop = asyncio.get_running_loop()
    opened = []
    for index in range(streams):
        make_stream = partial(Stream, request(port, index, output_len))
        _, stream = await loop.create_connection(make_stream, "127.0.0.1", port)
        opened.append(stream)
    for stream in opened:
        await stream.ended
    return opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--output-len", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        streams = runner.run(read_all(options.port, options.streams, options.output_len))
    options.out.write_text(json.dumps([stream.arrivals for stream in streams]))
    sys.exit(0 if all(stream.is_complete for stream in streams) else 1)


if __name__ == "__main__":
    main()
