"""What a streamed token costs the gateway: processor time, delay and memory, at several numbers of streams.

    python -m benchmarks.gateway --rounds 3 --out docs/data/gateway.json

A gateway process of its own, the embedded server of `serve`, a client process, and a worker that computes nothing
(`canned_worker.py`). While all streams run in step at an even pace, the gateway's processor time is read before and
after; requests begin and end outside of that. Each cell is the median over rounds with minimum and maximum.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.canned_worker import CannedWorker
from benchmarks.raw import write_raw
from benchmarks.server import becomes_healthy
from shared.bus.embedded import EmbeddedServer
from shared.lifecycle import PARENT_VARIABLE
from shared.protocol.keys import Keys

STREAMS = (1, 8, 32, 128, 512)
EVENTS_PER_S = 2000
"""All streams together, at most: a pace that leaves two cores idle time, so that delays are no queues."""
MIN_INTERVAL_S = 0.01
MEASURED_S = 4.0
WARM_STREAMS = 8
WARM_STEPS = 4
TAIL_STEPS = 2
SETTLE_S = 0.3
START_TIMEOUT_S = 60.0
TEXT = "The river runs past the old stone bridge, and in winter its water is as grey as the sky above the market town. "
LIMITS = {"MAX_IN_FLIGHT": "1024", "MAX_IN_FLIGHT_PER_KEY": "1024", "MAX_QUEUED_PER_KEY": "1024"}


@dataclass(frozen=True, slots=True)
class Pace:
    """How the streams of one measurement run."""

    streams: int

    @property
    def interval_s(self) -> float:
        return max(MIN_INTERVAL_S, self.streams / EVENTS_PER_S)

    @property
    def steps(self) -> int:
        """Steps within the measurement."""
        return int(MEASURED_S / self.interval_s)

    @property
    def output_len(self) -> int:
        return WARM_STEPS + self.steps + TAIL_STEPS


class Gateway:
    """The process under measurement."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self._process = process
        self.port = port

    def cpu_s(self) -> float:
        """Processor time of all its threads, to the nanosecond."""
        tasks = Path(f"/proc/{self._process.pid}/task")
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9

    def private_bytes(self) -> int:
        """Memory that is the process's alone."""
        lines = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

    def tokens(self, text: str) -> list[int]:
        """Ids of a text in the gateway's vocabulary."""
        body = json.dumps({"prompt": text, "add_special_tokens": False}).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}/tokenize", body, headers)
        with urllib.request.urlopen(asked, timeout=10) as response:
            found: list[int] = json.load(response)["tokens"]
        return found

    def wait_ready(self) -> None:
        """Until it sees the worker. Raises RuntimeError."""
        if not becomes_healthy(self._process, self.port):
            raise RuntimeError("the gateway did not become ready")


@contextmanager
def running_gateway(model: str, redis_url: str, port: int) -> Iterator[Gateway]:
    settings = {f"SLIPSTREAM_GATEWAY__{name}": value for name, value in LIMITS.items()}
    settings |= {"SLIPSTREAM_REDIS__URL": redis_url, "SLIPSTREAM_GATEWAY__PORT": str(port), "SLIPSTREAM_MODEL": model}
    command = [sys.executable, "-m", "services.cli", "gateway"]
    environment = {**os.environ, **settings, PARENT_VARIABLE: str(os.getpid())}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield Gateway(process, port)
        finally:
            process.terminate()


async def measure(gateway: Gateway, worker: CannedWorker, pace: Pace, arrivals: Path) -> dict[str, Any]:
    """One run of so many streams; their client writes `arrivals`. Raises RuntimeError when a stream fails."""
    flags = ["--port", gateway.port, "--streams", pace.streams, "--output-len", pace.output_len, "--out", arrivals]
    memory = gateway.private_bytes()
    client = await asyncio.create_subprocess_exec(*(sys.executable, "-m", "benchmarks.stream_client", *map(str, flags)))
    await worker.wait_for(pace.streams, START_TIMEOUT_S)
    await worker.steps(WARM_STEPS, pace.interval_s)
    await asyncio.sleep(SETTLE_S)
    before = gateway.cpu_s()
    await worker.steps(pace.steps, pace.interval_s)
    await asyncio.sleep(SETTLE_S)
    spent = gateway.cpu_s() - before
    memory = gateway.private_bytes() - memory
    await worker.steps(TAIL_STEPS, pace.interval_s)
    if await client.wait() != 0:
        raise RuntimeError("a stream was not answered to its end, so nothing was measured")
    events = pace.streams * pace.steps
    return {
        "streams": pace.streams,
        "events": events,
        "events_per_s": 1 / pace.interval_s * pace.streams,
        "cpu_us_per_event": 1e6 * spent / events,
        "events_per_core_s": events / spent,
        "memory_bytes_per_stream": memory / pace.streams,
        **delays_ms(json.loads(await asyncio.to_thread(arrivals.read_text)), worker.dismiss()),
    }


def delays_ms(arrivals: Sequence[Sequence[tuple[int, float]]], sent: dict[int, list[float]]) -> dict[str, float]:
    """From handing a token to the bus to its event at the client; event n brings token n - 1."""
    found = [
        1000 * (at - sent[stream][event - 1])
        for stream, events in enumerate(arrivals)
        for event, at in events
        if WARM_STEPS < event <= len(sent[stream]) - TAIL_STEPS
    ]
    cuts = quantiles(found, n=100)
    return {"delay_p50_ms": cuts[49], "delay_p99_ms": cuts[98], "delays": len(found)}


async def one_round(options: argparse.Namespace, redis_url: str) -> list[dict[str, Any]]:
    """Every number of streams once, the largest first: memory that other streams left behind would hide its own."""
    paces = [Pace(streams) for streams in sorted(options.streams, reverse=True)]
    with (
        tempfile.TemporaryDirectory(prefix="slipstream-gateway-") as folder,
        running_gateway(options.model, redis_url, options.port) as gateway,
    ):
        arrivals = Path(folder) / "arrivals.json"
        async with CannedWorker(redis_url, Keys("default"), options.model) as worker:
            await asyncio.to_thread(gateway.wait_ready)
            worker.use(await asyncio.to_thread(gateway.tokens, TEXT))
            await measure(gateway, worker, Pace(WARM_STREAMS), arrivals)
            return [await measure(gateway, worker, pace, arrivals) for pace in paces]


COLUMNS = {
    "gateway µs per token": ("cpu_us_per_event", "{:.0f}"),
    "tokens/s per gateway core": ("events_per_core_s", "{:.0f}"),
    "delay p50, ms": ("delay_p50_ms", "{:.2f}"),
    "delay p99, ms": ("delay_p99_ms", "{:.2f}"),
}


def render(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: one line a number of streams."""
    lines = ["| streams | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for streams in sorted({result["streams"] for result in results}):
        of_these = [result for result in results if result["streams"] == streams]
        cells = [_cell([result[field] for result in of_these], form) for field, form in COLUMNS.values()]
        lines.append(f"| {streams} | " + " | ".join(cells) + " |")
    most = max(result["streams"] for result in results)
    memory = median(result["memory_bytes_per_stream"] for result in results if result["streams"] == most)
    return "\n".join([*lines, "", f"Memory of an open stream, at {most}: {memory / 1024:.1f} KiB"])


def _cell(values: Sequence[float], form: str) -> str:
    middle, low, high = (form.format(value) for value in (median(values), min(values), max(values)))
    return f"{middle} [{low}-{high}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--model", default="smollm2", help="whose vocabulary the gateway uses")
    parser.add_argument("--port", type=int, default=18961)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with EmbeddedServer() as server:
        for number in range(options.rounds):
            results += [{"round": number, **one} for one in asyncio.run(one_round(options, server.url))]
    print(render(results))
    write_raw(options.out, results, table=render(results).splitlines())


if __name__ == "__main__":
    main()
