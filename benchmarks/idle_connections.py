"""Thousands of connections that say nothing, and what they cost a gateway that serves others meanwhile.

    python -m benchmarks.idle_connections --pid PID --connections 10000 --out idle.json

Run it against a running gateway, on the same machine when `--pid` is given for its memory. One canary request after
another is timed before and while the connections are open. With more connections than `gateway.max_connections` the
longest idle ones are closed for newer ones; with fewer, all are held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp
import psutil

from benchmarks.raw import write_raw

BATCH = 200
SETTLE_S = 1.0


async def open_idle(host: str, port: int, count: int) -> list[asyncio.StreamWriter]:
    """Connections on which nothing is sent."""
    writers: list[asyncio.StreamWriter] = []
    while len(writers) < count:
        size = min(BATCH, count - len(writers))
        pairs = await asyncio.gather(*(asyncio.open_connection(host, port) for _ in range(size)))
        writers += [writer for _, writer in pairs]
    return writers


async def canary(session: aiohttp.ClientSession, url: str, body: dict[str, Any] | None, count: int) -> list[float]:
    """Seconds that each of `count` requests took, each on a new connection."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        path = url + ("/live" if body is None else "/v1/chat/completions")
        async with session.request("GET" if body is None else "POST", path, json=body) as response:
            response.raise_for_status()
            await response.read()
        times.append(time.perf_counter() - began)
    return times


def summary(times: list[float]) -> dict[str, float]:
    return {
        "requests": len(times),
        "median_ms": round(median(times) * 1000, 2),
        "p99_ms": round(quantiles(times, n=100)[98] * 1000, 2),
        "max_ms": round(max(times) * 1000, 2),
    }


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    host, _, port = arguments.url.removeprefix("http://").partition(":")
    body = json.loads(arguments.body) if arguments.body else None
    process = psutil.Process(arguments.pid) if arguments.pid else None
    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        alone = await canary(session, arguments.url, body, arguments.canaries)
        before = process.memory_info().rss if process else 0
        writers = await open_idle(host, int(port), arguments.connections)
        await asyncio.sleep(SETTLE_S)
        beside = await canary(session, arguments.url, body, arguments.canaries)
        held = sum(not writer.is_closing() and not _at_eof(writer) for writer in writers)
        after = process.memory_info().rss if process else 0
        for writer in writers:
            writer.close()
    return {
        "opened": len(writers),
        "held": held,
        "bytes_per_connection": round((after - before) / held) if process and held else None,
        "canary_alone": summary(alone),
        "canary_beside": summary(beside),
    }


def _at_eof(writer: asyncio.StreamWriter) -> bool:
    """Whether the gateway has closed the connection."""
    protocol: Any = writer.transport.get_protocol()
    reader: asyncio.StreamReader | None = protocol._stream_reader
    return reader is None or reader.at_eof()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--canaries", type=int, default=200)
    parser.add_argument("--body", default="", help="JSON of a chat request as the canary; GET /live when empty")
    parser.add_argument("--pid", type=int, default=0, help="the gateway's process, for its memory")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    result = asyncio.run(measure(arguments))
    write_raw(arguments.out, [result])
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
