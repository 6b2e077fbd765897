"""Rolling restarts under load, SIGTERM for each process in turn: `python -m tests.faults.rolling --rounds N --out F`.

The next process is told to drain once the supervisor has replaced the one before and all are ready.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.raw import write_raw
from tests.faults.campaign import Disturbance, Plan, campaign, phase
from tests.faults.cluster import Topology
from tests.faults.report import print_table, result
from tests.faults.schedule import drain_slot

TOPOLOGY = Topology(gateways=2, prefill=2, decode=2)
ORDER = ("prefill-0", "prefill-1", "decode-0", "decode-1", "gateway-0", "gateway-1")


async def run(seed: int, rounds: int, folder: Path, **plan: Any) -> dict[str, Any]:
    """One cluster; every process is restarted `rounds` times while the load goes on."""
    async with campaign(Plan(**{"seed": seed, "topology": TOPOLOGY, **plan}), folder) as campaigning:
        await campaigning.standard()
        with phase(campaigning, "fault"):
            campaigning.load.start(campaigning.plan.concurrency)
            for name in ORDER * rounds:
                (slot,) = [slot for slot in campaigning.cluster.slots if slot.name == name]
                began = time.monotonic()
                await drain_slot(slot)
                await campaigning.cluster.ready()
                campaigning.disturbances.append(Disturbance("drain", name, began, time.monotonic()))
            await campaigning.load.stop()
        await campaigning.recovery()
        return result(campaigning)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="slipstream-faults-") as folder:
        one = asyncio.run(run(options.seed, options.rounds, Path(folder)))
    print_table([one])
    write_raw(options.out, [one])
    if one["violations"] or one["failed_requests"]:
        print(f"rolling: violated with --seed {options.seed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
