"""Gaps of running streams while long prompts arrive, in one engine that is not split: ourselves as our own rival.

    python -m benchmarks.unsplit --out docs/data/unsplit.json

8 streams run, and 2048-token prompts arrive one after the other. Unsplit: in one process, one engine with the native
kernels on all cores computes the prompts in chunks beside the decodes. There is no bus, no gateway, no hand-off and no
client on the same cores, so this is the best that an unsplit server made of these kernels could do, and a comparison
in our disfavour. A gap is the time of a step, which gives each stream one token. Each round measures every chunk size
once, on an engine of its own. What `slipstream serve` does over HTTP is in
`benchmarks.peers`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

from benchmarks.raw import write_raw
from services.bench.report import percentile
from shared.cores import CoreBoard, CoreShare
from shared.engine.engine import Engine
from shared.engine.runner import NativeRunner
from shared.engine.scheduler import SchedulerLimits
from shared.engine.sequence import Sequence, Status
from shared.kernels.library import Library, load_library
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.model.registry import load_native
from shared.model.source import ModelSource, resolve
from shared.protocol.sampling import SamplingParams
from shared.worker.build import num_threads, set_torch_threads

CHUNKS = (512, 256, 128, 64, 32, 16)
"""Prompt tokens a step computes at most, beside the running streams' one each."""

STREAMS, PROMPT_LEN = 8, 64
ROUNDS = 2
ARRIVALS, ARRIVING = 2, 2048
"""Prompts a round, and the tokens of each."""

STEPS_ALONE = 100
WARM_STEPS = 10
ENDLESS = 1 << 20
BLOCK_SIZE, KV_TOKENS = 16, 16384


class Unsplit:
    """One engine with all streams decoding."""

    def __init__(self, runner: NativeRunner, chunk: int) -> None:
        limits = SchedulerLimits(max_num_seqs=STREAMS + 1, max_num_batched_tokens=chunk + STREAMS)
        self._engine = Engine(runner, limits)
        self._random = random.Random(chunk)
        self._streams = [self._add(PROMPT_LEN, ENDLESS) for _ in range(STREAMS)]
        while any(stream.num_output < WARM_STEPS for stream in self._streams):
            self._engine.step()

    def alone(self) -> list[float]:
        """Seconds of each gap while only the streams run."""
        return [self._gap() for _ in range(STEPS_ALONE)]

    def arrival(self) -> list[float]:
        """Seconds of each gap from a long prompt's arrival to its first token; their sum is that token's time."""
        sequence = self._add(ARRIVING, 1)
        gaps = []
        while sequence.status is not Status.FINISHED:
            gaps.append(self._gap())
        return gaps

    def _gap(self) -> float:
        """One step. Raises RuntimeError when a stream got no token in it."""
        held = [stream.num_output for stream in self._streams]
        begun = time.perf_counter()
        self._engine.step()
        seconds = time.perf_counter() - begun
        if any(stream.num_output != before + 1 for stream, before in zip(self._streams, held, strict=True)):
            raise RuntimeError("a stream was left out of a step, so nothing was measured")
        return seconds

    def _add(self, length: int, max_tokens: int) -> Sequence:
        params = SamplingParams(max_tokens, seed=1, temperature=0.0)
        sequence = Sequence("", params, self._random.choices(range(100, 40000), k=length), length, (0,), b"bench")
        self._engine.add(sequence)
        return sequence


def make_runner(source: ModelSource, library: Library) -> NativeRunner:
    """The model on all cores, its threads placed as `serve` places those of a worker that computes alone."""
    threads = num_threads(None)
    set_torch_threads(1)  # as workers do
    config = source.config
    layout = KVLayout(
        config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, "bfloat16", k_transposed=True
    )
    cache = KVCache(layout, 1 + layout.num_blocks(KV_TOKENS))
    cache.zero(range(cache.num_blocks))  # every page is there before the first step
    decoder = load_native(source, library, layout, threads)
    return NativeRunner(decoder, cache, CoreShare(CoreBoard.create(), 0, threads))


def measure(runner: NativeRunner, chunk: int, number: int) -> dict[str, Any]:
    """Milliseconds of the gaps before the arrivals and beside them, and of the arrivals' first tokens."""
    engine = Unsplit(runner, chunk)
    alone = engine.alone()
    arrivals = [engine.arrival() for _ in range(ARRIVALS)]
    return {
        "chunk": chunk,
        "round": number,
        "alone_gap_ms": summary(alone),
        "beside_gap_ms": summary([gap for gaps in arrivals for gap in gaps]),
        "arrivals_ttft_ms": summary([sum(gaps) for gaps in arrivals]),
    }


def summary(seconds: Items[float]) -> dict[str, float | None]:
    """Count, extremes and percentiles, in milliseconds."""
    ms = [1000 * value for value in seconds]
    shares = {f"p{share}": percentile(ms, share) for share in (50, 99)}
    return {"count": len(ms), "min": min(ms), "max": max(ms), **shares}


COLUMNS = {
    "gap p50 alone": ("alone_gap_ms", "p50", "p50"),
    "gap p99 alone": ("alone_gap_ms", "p99", "p99"),
    "gap p50 beside": ("beside_gap_ms", "p50", "p50"),
    "gap p99 beside": ("beside_gap_ms", "p99", "p99"),
    "first token of a prompt": ("arrivals_ttft_ms", "min", "max"),
}
"""Heading → what is measured, and which figures of the rounds bound it."""


def table(runs: Items[dict[str, Any]]) -> str:
    """One line a chunk size, in milliseconds: least and greatest of the rounds."""
    lines = [["chunk", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for chunk in CHUNKS:
        rounds = [run for run in runs if run["chunk"] == chunk]
        bounds = [
            (min(run[name][low] for run in rounds), max(run[name][high] for run in rounds))
            for name, low, high in COLUMNS.values()
        ]
        lines.append([str(chunk), *(f"{low:.0f}-{high:.0f}" for low, high in bounds)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def unsplit_runs(model: str) -> list[dict[str, Any]]:
    """All rounds in this process."""
    library = load_library()
    if library is None:
        sys.exit("The native kernels were not built; install Slipstream where there is a C++ compiler.")
    runner = make_runner(resolve(model), library)
    return [measure(runner, chunk, number) for number in range(ROUNDS) for chunk in CHUNKS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = unsplit_runs(options.model)
    print(table(runs))
    write_raw(options.out, runs)


if __name__ == "__main__":
    main()
