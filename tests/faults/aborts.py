"""Aborts at every state of hand-off and generation: `python -m tests.faults.aborts --aborts 1000 --out FILE`.

Workers run in this process, so that a request can be aborted at exactly the moment it passes a fault point. After
each batch the free blocks of both workers must be what they were at the start, and Redis must hold no work.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import secrets
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from benchmarks.raw import write_raw
from shared import faultpoints
from shared.bus.connection import connect
from shared.bus.embedded import EmbeddedServer
from shared.engine.engine import Engine
from shared.observability.logging import configure_logging
from tests.faults import invariants
from tests.inprocess import Bench, workers
from tests.tiny_model import NAME, VOCAB, write_tiny_model

QUEUED = "queued"
STATES = (QUEUED, *(name for name in faultpoints.POINTS if not name.startswith("gateway.")))
BATCH = 25
_READ_WITHIN_S = 10.0
_DELAYS_S = (0.0, 0.0, 0.001, 0.005, 0.02)


@dataclass(slots=True)
class Watcher:
    """Stands in for `fault_point`: sets an event when the awaited point is passed for the awaited time."""

    loop: asyncio.AbstractEventLoop
    state: str = ""
    passes: int = 0
    reached: asyncio.Event = field(default_factory=asyncio.Event)

    def expect(self, state: str, passes: int) -> asyncio.Event:
        self.state, self.passes, self.reached = state, passes, asyncio.Event()
        return self.reached

    def __call__(self, name: str) -> None:
        """Called on the event loop, or on an engine's thread."""
        if name != self.state:
            return
        self.passes -= 1
        if self.passes == 0:
            self.loop.call_soon_threadsafe(self.reached.set)


@dataclass(slots=True)
class Tally:
    """What happened: aborts by state, how the requests ended, and free blocks after each batch."""

    aborted: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    free_blocks: list[list[int]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


async def abort_one(bench: Bench, watcher: Watcher, state: str, rng: random.Random, tally: Tally) -> None:
    """Run one request and abort it in that state; it ends by itself when it never comes there."""
    prompt = [rng.randrange(3, VOCAB - 4) for _ in range(rng.randint(20, 300))]
    repeated = state in ("prefill.chunk_exported", "decode.frame_landed", "decode.appended", "engine.step")
    reached = watcher.expect(state, rng.randint(1, 4) if repeated else 1)
    params = {"n": rng.choice((1, 1, 3)), "max_tokens": rng.randint(4, 40), "temperature": 1.0}
    job = await bench.submit(prompt, **params)
    ended = asyncio.create_task(bench.ended(job))
    if state != QUEUED:
        waiting = asyncio.create_task(reached.wait())
        await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
    if state == QUEUED or reached.is_set():
        await asyncio.sleep(rng.choice(_DELAYS_S))
        tally.aborted[state] += 1
        await bench.store.cancel(job.request_id, "client_gone", force=rng.random() < 0.8)
    journal = await ended
    assert journal.end is not None
    tally.outcomes[journal.end.outcome] += 1
    ends = sum(entry.event == journal.end for entry in (await bench.store.poll(job.request_id, "test")).entries)  # type: ignore[union-attr]
    if ends != 1:
        tally.violations.append(f"{job.request_id} aborted at {state} has {ends} terminal entries")


def free_blocks(bench: Bench) -> list[int]:
    """Free or evictable blocks of each worker."""
    return [engine.blocks.num_free for engine in engines(bench)]


def engines(bench: Bench) -> list[Engine]:
    return [service.engine for service in bench.prefill] + [service.engine for service in bench.decode]


async def run(aborts: int, seed: int, folder: Path) -> Tally:
    """All aborts, the states in turn, in batches."""
    rng, tally = random.Random(seed), Tally()
    model = write_tiny_model(folder / NAME)
    engine = {"max_num_batched_tokens": 32, "kv_cache_tokens": 2048}
    with EmbeddedServer() as server:
        async with workers(server.url, f"aborts-{secrets.token_hex(4)}", model, engine=engine) as bench:
            start = free_blocks(bench)
            watcher, nothing = Watcher(asyncio.get_running_loop()), faultpoints.fault_point
            faultpoints.fault_point = watcher
            try:
                for number in itertools.count():
                    if number % BATCH == 0:
                        await check_batch(bench, start, tally)
                    if tally.aborted.total() >= aborts:
                        break
                    await abort_one(bench, watcher, STATES[number % len(STATES)], rng, tally)
                await check_batch(bench, start, tally)
            finally:
                faultpoints.fault_point = nothing
    return tally


async def check_batch(bench: Bench, start: list[int], tally: Tally) -> None:
    """Everything is given back: blocks, references to them, work entries."""
    try:
        await bench.nothing_leaks()
    except TimeoutError:
        tally.violations.append(f"free blocks {free_blocks(bench)} instead of {start}")
    tally.free_blocks.append(free_blocks(bench))
    for engine in engines(bench):
        engine.check_integrity()
    async with connect(bench.settings.redis.url) as client:
        tally.violations += await entries_left(client)


async def entries_left(client: Redis) -> list[str]:
    """Work entries nobody takes away. One of a request that ended before it was read goes when it is read."""
    deadline = time.monotonic() + _READ_WITHIN_S
    while (left := await invariants.nothing_pending(client)) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return left


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--aborts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    configure_logging("error", "json")
    with tempfile.TemporaryDirectory(prefix="slipstream-faults-") as folder:
        tally = asyncio.run(run(options.aborts, options.seed, Path(folder)))
    summary: dict[str, Any] = {
        "seed": options.seed,
        "aborts": tally.aborted.total(),
        "requests": tally.outcomes.total(),
        "outcomes": dict(tally.outcomes),
        "free_blocks_at_start": tally.free_blocks[0],
        "free_blocks_at_end": tally.free_blocks[-1],
    }
    for state in STATES:
        print(f"{state:>28} {tally.aborted[state]:>6} aborted")
    print(summary)
    for violation in tally.violations:
        print("VIOLATED:", violation)
    states = {state: tally.aborted[state] for state in STATES}
    write_raw(
        options.out,
        [{"by_state": states, "free_blocks": tally.free_blocks, "violations": tally.violations}],
        **summary,
    )
    return 1 if tally.violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
