"""SIGKILL of random gateways under load: `python -m tests.faults.gateway_kills --kills 50 --seeds 1,2 --out FILE`.

Clients whose gateway died go on at another one with `Last-Event-ID`; recovery is not measured, for no worker changes.
"""

from __future__ import annotations

from tests.faults.cluster import Topology
from tests.faults.kills import Killing, command

GATEWAY_KILLS = Killing(Topology(gateways=3, prefill=1, decode=1), ("gateway",), pause_s=(0.3, 2.0))


def main(arguments: list[str] | None = None) -> int:
    return command(GATEWAY_KILLS, 50, __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
