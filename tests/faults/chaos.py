"""A random walk through all faults: `python -m tests.faults.chaos --seed S --minutes M [--kinds a,b] --out FILE`.

`make chaos SEED=S MINUTES=M` does the same.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.raw import write_raw
from tests.faults.campaign import Plan, campaign, phase
from tests.faults.cluster import Topology
from tests.faults.report import print_table, result
from tests.faults.schedule import KINDS, make_schedule, run_step

TOPOLOGY = Topology(gateways=3, prefill=3, decode=3, proxied=True, veterans=True)
MAX_STEPS = 100_000


async def walk(
    seed: int, seconds: float, kinds: Sequence[str], folder: Path, max_steps: int = MAX_STEPS, **plan: Any
) -> dict[str, Any]:
    """One cluster and its random walk, of so many seconds or steps."""
    settings = Plan(**{"seed": seed, "topology": TOPOLOGY, "leaving": True, **plan})
    async with campaign(settings, folder) as run:
        await run.standard()
        deadline = time.monotonic() + seconds
        with phase(run, "fault"):
            run.load.start(run.plan.concurrency)
            for step in make_schedule(kinds, seed, max_steps):
                if time.monotonic() > deadline:
                    break
                await run_step(run, step)
                print(f"{run.disturbances[-1].kind}: {run.disturbances[-1].target}", file=sys.stderr, flush=True)
            await run.load.stop()
        await run.recovery()
        return result(run)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated; all of them when left out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - KINDS.keys():
        parser.error(f"unknown kinds {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="slipstream-faults-") as folder:
        one = asyncio.run(walk(options.seed, options.minutes * 60, kinds, Path(folder)))
    print_table([one])
    print("faults:", dict(Counter(fault["kind"] for fault in one["faults"])))
    write_raw(options.out, [one])
    if one["violations"]:
        print(f"chaos: violated with --seed {options.seed}", file=sys.stderr)
    return 1 if one["violations"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
