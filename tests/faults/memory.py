"""Whether a process keeps memory of the requests it served.

Memory that is taken once looks like a leak for a while. A worker compiles a kernel for every number of rows it meets, a
gateway's tokenizer remembers words, Python's allocator keeps its peak. All of it comes in steps or ever more slowly; a
leak comes with every request. So growth is counted per request, the first requests are left out, and what came after
them is cut into parts: a process leaks if it grew in every single one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

WARM_UP_REQUESTS = 3000
"""Measured: a gateway takes 1 to 3 KiB a request for about that long, and less than 0.1 afterwards."""

MIN_REQUESTS = 2000
PARTS = 5
MIN_SAMPLES = 4 * PARTS
MAX_KIB_PER_1000_REQUESTS = 128.0


@dataclass(slots=True)
class MemoryTrace:
    """Anonymous memory of one process: (requests served by the whole cluster so far, KiB), oldest first.

    A forked process has its parent's pages from the beginning, so copying them on write is no growth; shared memory,
    where the KV pool lies, is not counted.
    """

    pid: int
    name: str
    samples: list[tuple[int, int]] = field(default_factory=list)

    def kib_per_1000_requests(self) -> float | None:
        """The least growth from one part to the next; None when too little was seen after the warm-up."""
        if not self.samples:
            return None
        first = self.samples[0][0] + WARM_UP_REQUESTS
        warm = [sample for sample in self.samples if sample[0] >= first]
        if len(warm) < MIN_SAMPLES or warm[-1][0] - warm[0][0] < MIN_REQUESTS:
            return None
        middles = [_middle(part) for part in _parts(warm)]
        return min(
            1000 * (kib - kib_before) / (requests - requests_before)
            for (requests_before, kib_before), (requests, kib) in pairwise(middles)
        )


def memory_flat(traces: Iterable[MemoryTrace], limit: float = MAX_KIB_PER_1000_REQUESTS) -> list[str]:
    """No process that served enough requests keeps memory of them."""
    return [
        f"{trace.name} (process {trace.pid}) grows by {growth:.0f} KiB per 1000 requests"
        for trace in traces
        if (growth := trace.kib_per_1000_requests()) is not None and growth > limit
    ]


def _parts(samples: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Samples by equal shares of the requests; a share in which nobody looked is left out."""
    first, last = samples[0][0], samples[-1][0]
    parts: list[list[tuple[int, int]]] = [[] for _ in range(PARTS)]
    for sample in samples:
        parts[min(PARTS - 1, PARTS * (sample[0] - first) // (last - first))].append(sample)
    return [part for part in parts if part]


def _middle(part: Sequence[tuple[int, int]]) -> tuple[float, float]:
    return median(requests for requests, _ in part), median(kib for _, kib in part)
