"""The figures of `benchmarks.peers` as a picture: one group of bars a column, one bar a server, ratios to Slipstream's.

    python -m benchmarks.plot docs/data/peers.json docs/peers.svg

Needs matplotlib (`pip install matplotlib`), which nothing else here does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

from benchmarks.peers import columns
from benchmarks.server import OURS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("The plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "slipstream"  # the same figures give the same file
    from matplotlib import pyplot

    table = columns(json.loads(options.raw.read_text())["runs"])
    servers = list(dict.fromkeys(server for by_server in table.values() for server in by_server))
    figure, axes = pyplot.subplots(figsize=(11, 4.2), layout="constrained")
    width = 0.8 / len(servers)
    for index, server in enumerate(servers):
        ratios = [median(by_server[server]) / median(by_server[OURS]) for by_server in table.values()]
        places = [column + index * width for column in range(len(table))]
        axes.bar(places, ratios, width, label=server)
        for place, by_server, ratio in zip(places, table.values(), ratios, strict=True):
            axes.text(place, ratio, f"{median(by_server[server]):.0f}", ha="center", va="bottom", fontsize=7)
    centre = 0.4 - width / 2
    axes.set_xticks([column + centre for column in range(len(table))], [name.replace(", ", "\n") for name in table])
    axes.tick_params(axis="x", labelsize=7)
    axes.axhline(1, color="grey", linewidth=0.7)
    axes.set_ylabel("ratio to Slipstream")
    axes.legend()
    figure.savefig(options.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
