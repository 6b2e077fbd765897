"""Many short requests and no fault: `python -m tests.faults.soak --requests 20000 --out FILE`.

Shows for each process, the Redis too, what it keeps of a request: KiB per 1000 requests, early and late.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.raw import write_raw
from tests.faults.campaign import REDIS, Plan, campaign, phase
from tests.faults.cluster import Topology
from tests.faults.memory import memory_flat
from tests.faults.report import print_table, result

TOPOLOGY = Topology(settings={"SLIPSTREAM_GATEWAY__RESUME_TTL_S": "5", "SLIPSTREAM_GATEWAY__REQUEST_TIMEOUT_S": "20"})
"""Journals leave Redis 5 s after their end, what names an answer 25 s after it began: soon it holds as many as ever."""

MAX_TOKENS = (2, 12)
SHARES = 10


async def soak(num_requests: int, folder: Path, **plan: Any) -> dict[str, Any]:
    """One cluster under a steady load of short requests."""
    settings = Plan(**{"seed": 1, "topology": TOPOLOGY, "max_tokens": MAX_TOKENS, "num_specs": 64, **plan})
    async with campaign(settings, folder) as run:
        await run.standard()
        with phase(run, "load"):
            run.load.start(run.plan.concurrency)
            while len(run.load.records) < num_requests:
                await asyncio.sleep(0.5)
            await run.load.stop()
        await run.recovery()
        run.violations += memory_flat(trace for trace in run.memory.values() if trace.name == REDIS)
        found = result(run)
        found["memory"] = {trace.name: table(trace.samples) for trace in run.memory.values()}
        return found


def table(samples: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
    """Memory at the end of each tenth of the requests, and its growth since the one before."""
    rows: list[dict[str, float]] = []
    requests_before, kib_before = samples[0]
    last = samples[-1][0]
    for share in range(1, SHARES + 1):
        requests, kib = next(sample for sample in samples if SHARES * sample[0] >= share * last)
        growth = 1000 * (kib - kib_before) / max(1, requests - requests_before)
        rows.append({"requests": requests, "kib": kib, "kib_per_1000_requests": round(growth, 1)})
        requests_before, kib_before = requests, kib
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="slipstream-faults-") as folder:
        one = asyncio.run(soak(options.requests, Path(folder), concurrency=options.concurrency))
    print_table([one])
    for name, rows in one["memory"].items():
        print(f"{name:>12} KiB {[row['kib'] for row in rows]}")
        print(f"{'':>12} per 1000 requests {[row['kib_per_1000_requests'] for row in rows]}")
    write_raw(options.out, [one])
    return 1 if one["violations"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
