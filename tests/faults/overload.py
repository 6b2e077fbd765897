"""Overload at three times the capacity: `python -m tests.faults.overload --seconds 20 --out FILE`.

First a closed loop finds the peak: requests finished a second with every place taken. Then an open loop offers three
times that, by a Poisson process and from several keys. Promised: refusals come fast and say when to come again, and
what is finished a second stays near the peak.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.raw import write_raw
from tests.faults.cluster import KEYS, FaultCluster, Topology
from tests.faults.report import percentile
from tests.tiny_model import NAME, write_tiny_model

API_KEYS = ("key-one", "key-two", "key-three", "key-four")
FACTOR = 3.0
MAX_REFUSAL_P99_S = 0.1
MIN_GOODPUT = 0.9
_PLACES = 8
_SETTINGS = {
    KEYS: ",".join(API_KEYS),
    "SLIPSTREAM_ENGINE__MAX_NUM_SEQS": str(_PLACES),
    "SLIPSTREAM_GATEWAY__MAX_IN_FLIGHT": str(_PLACES + 2),
    "SLIPSTREAM_GATEWAY__MAX_QUEUED": str(2 * _PLACES),
    "SLIPSTREAM_LOG_LEVEL": "error",
}
_REFUSED = (429, 503)


@dataclass(frozen=True, slots=True)
class Reply:
    """One request's fate; times are seconds of the monotonic clock."""

    key: str
    status: int
    started: float
    ended: float
    retry_after: bool


class Offering:
    """Sends requests and notes what becomes of them."""

    def __init__(self, http: aiohttp.ClientSession, url: str, seed: int) -> None:
        self.replies: list[Reply] = []
        self._http = http
        self._url = url
        self._random = random.Random(seed)
        self._keys = itertools.cycle(API_KEYS)

    async def ask(self) -> None:
        key = next(self._keys)
        prompt = [self._random.randint(3, 508) for _ in range(32)]
        body = {"prompt": prompt, "max_tokens": 96, "ignore_eos": True, "seed": 1}
        started = time.monotonic()
        headers = {"Authorization": f"Bearer {key}"}
        async with self._http.post(f"{self._url}/v1/completions", json=body, headers=headers) as response:
            await response.read()
            told = "Retry-After" in response.headers
        self.replies.append(Reply(key, response.status, started, time.monotonic(), told))

    async def closed_loop(self, concurrency: int, seconds: float) -> None:
        """So many requests in flight at any time."""
        deadline = time.monotonic() + seconds

        async def one_after_another() -> None:
            while time.monotonic() < deadline:
                await self.ask()

        await asyncio.gather(*(one_after_another() for _ in range(concurrency)))

    async def open_loop(self, rate: float, seconds: float) -> None:
        """Requests at random moments, `rate` a second, whatever becomes of those before."""
        async with asyncio.TaskGroup() as group:
            deadline = time.monotonic() + seconds
            due = time.monotonic()
            while due < deadline:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(self.ask())
                due += self._random.expovariate(rate)


def finished_a_second(replies: Sequence[Reply], began: float, ended: float) -> float:
    """Goodput within a window."""
    return sum(reply.status == 200 and began <= reply.ended <= ended for reply in replies) / (ended - began)


async def run(seconds: float, seed: int, folder: Path, least_rate: float = 0.0) -> dict[str, Any]:
    """Calibrate, overload, judge. `least_rate`: requests a second offered at least, where the calibration is short."""
    model = write_tiny_model(folder / "models" / NAME)
    async with (
        FaultCluster(folder / "cluster", str(model), Topology(settings=_SETTINGS)) as cluster,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        url = cluster.of_role("gateway")[0].url
        warm, calibration, overload = (Offering(http, url, seed + index) for index in range(3))
        await warm.closed_loop(_PLACES, 1.0)
        peak = 0.0
        while not peak:  # a machine busy with other things may finish nothing in so short a time
            began = time.monotonic()
            await calibration.closed_loop(2 * _PLACES, seconds)
            peak = finished_a_second(calibration.replies, began, began + seconds)
        began = time.monotonic()
        await overload.open_loop(max(FACTOR * peak, least_rate), seconds)
        goodput = finished_a_second(overload.replies, began + min(1.0, seconds / 4), began + seconds)
        return judge(overload.replies, peak, goodput)


def judge(replies: Sequence[Reply], peak: float, goodput: float) -> dict[str, Any]:
    """Figures and violations."""
    refused = [reply for reply in replies if reply.status in _REFUSED]
    p99 = percentile((reply.ended - reply.started for reply in refused), 0.99)
    unexpected = Counter(reply.status for reply in replies if reply.status not in (200, *_REFUSED))
    untold = sum(not reply.retry_after for reply in refused)
    checks: list[tuple[Callable[[], bool], str]] = [
        (lambda: not refused, "nothing was refused: this was no overload"),
        (lambda: (p99 or 0) > MAX_REFUSAL_P99_S, f"p99 of refusals is {p99} s"),
        (lambda: goodput < MIN_GOODPUT * peak, f"goodput {goodput:.1f} of a peak of {peak:.1f} requests a second"),
        (lambda: bool(unexpected), f"unexpected answers: {dict(unexpected)}"),
        (lambda: bool(untold), f"{untold} refusals do not say when to come again"),
    ]
    served = Counter(reply.key for reply in replies if reply.status == 200)
    return {
        "peak_requests_per_s": round(peak, 2),
        "goodput_requests_per_s": round(goodput, 2),
        "goodput_share": round(goodput / peak, 3) if peak else 0.0,
        "offered": len(replies),
        "refused": len(refused),
        "refusal_p50_s": percentile((reply.ended - reply.started for reply in refused), 0.5),
        "refusal_p99_s": p99,
        "served_by_key": [served[key] for key in API_KEYS],
        "violations": [text for is_violated, text in checks if is_violated()],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each of the two loops")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="slipstream-faults-") as folder:
        one = asyncio.run(run(options.seconds, options.seed, Path(folder)))
    for name, value in one.items():
        print(f"{name:>24} {value}")
    write_raw(options.out, [one])
    return 1 if one["violations"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
