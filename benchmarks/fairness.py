"""How long one key waits for its first token while another key has a thousand requests queued.

    python -m benchmarks.fairness --queued 1000 --out docs/data/fairness.json

Real processes on a small model. The quiet key's time to first token is measured alone, then with the other key's queue
full, then alone again; the ratio of the medians is what fair turns leave of the load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from benchmarks.raw import write_raw
from tests.cluster import Cluster
from tests.tiny_model import NAME, write_tiny_model

QUIET, GREEDY = "key-of-the-quiet-one", "key-of-the-greedy-one"
BODY = {"prompt": [3 + 7 * i % 500 for i in range(64)], "max_tokens": 64, "ignore_eos": True, "temperature": 0}
PROBES = 20


@dataclass(frozen=True, slots=True)
class Caller:
    """One key's requests."""

    session: aiohttp.ClientSession
    url: str
    key: str

    async def first_token_s(self) -> float:
        """Seconds to the first event of a stream; the rest is read to its end."""
        began = time.perf_counter()
        async with self._post(stream=True) as response:
            response.raise_for_status()
            await response.content.readuntil(b"\n\n")
            first = time.perf_counter() - began
            await response.read()
        return first

    async def whole(self) -> int:
        """The status of one request."""
        async with self._post(stream=False) as response:
            await response.read()
            status: int = response.status
        return status

    def _post(self, *, stream: bool) -> Any:
        headers = {"Authorization": f"Bearer {self.key}"}
        return self.session.post(f"{self.url}/v1/completions", json={**BODY, "stream": stream}, headers=headers)


async def probe(caller: Caller) -> list[float]:
    return [await caller.first_token_s() for _ in range(PROBES)]


async def measure(url: str, queued: int) -> dict[str, Any]:
    """Alone, beside the greedy key, alone again."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        quiet, greedy = Caller(session, url, QUIET), Caller(session, url, GREEDY)
        await probe(quiet)
        before = await probe(quiet)
        flood = [asyncio.create_task(greedy.whole()) for _ in range(queued)]
        await asyncio.sleep(1.0)
        beside = await probe(quiet)
        unserved = sum(not task.done() for task in flood)
        statuses = await asyncio.gather(*flood)
        after = await probe(quiet)
    alone = median(before + after)
    return {
        "queued": queued,
        "still_queued_at_the_last_probe": unserved,
        "greedy_answers": {str(status): statuses.count(status) for status in sorted(set(statuses))},
        "alone_ms": round(alone * 1000, 1),
        "beside_ms": round(median(beside) * 1000, 1),
        "beside_max_ms": round(max(beside) * 1000, 1),
        "ratio": round(median(beside) / alone, 2),
        "raw_s": {"before": before, "beside": beside, "after": after},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queued", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    room = str(options.queued + 100)
    settings = {
        "SLIPSTREAM_API_KEYS": f"{QUIET},{GREEDY}",
        "SLIPSTREAM_GATEWAY__MAX_QUEUED": room,
        "SLIPSTREAM_GATEWAY__MAX_QUEUED_PER_KEY": room,
        "SLIPSTREAM_GATEWAY__MAX_IN_FLIGHT_PER_KEY": room,
    }
    with tempfile.TemporaryDirectory(prefix="slipstream-fairness-") as folder:
        model = write_tiny_model(Path(folder) / NAME)
        with Cluster(Path(folder) / "cluster", str(model), api_key=QUIET, settings=settings) as cluster:
            result = asyncio.run(measure(cluster.url, options.queued))
    print(json.dumps({name: value for name, value in result.items() if name != "raw_s"}, indent=1))
    write_raw(options.out, [result])


if __name__ == "__main__":
    main()
