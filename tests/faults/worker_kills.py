"""SIGKILL of random workers under load: `python -m tests.faults.worker_kills --kills 200 --seeds 1,2,3,4 --out FILE`.

A worker is killed only while another of its role is ready. Recovery is the time from the kill to the next token.
"""

from __future__ import annotations

from tests.faults.cluster import Topology
from tests.faults.kills import Killing, command

WORKER_KILLS = Killing(Topology(gateways=1, prefill=2, decode=2), ("prefill", "decode"), pause_s=(0.2, 4.0))


def main(arguments: list[str] | None = None) -> int:
    return command(WORKER_KILLS, 200, __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
