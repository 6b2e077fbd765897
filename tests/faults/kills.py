"""SIGKILL of random processes under load, at random moments; `worker_kills` and `gateway_kills` are its commands."""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.raw import write_raw
from tests.faults.campaign import Campaign, Disturbance, Plan, campaign, phase
from tests.faults.cluster import READY_TIMEOUT_S, Slot, Topology
from tests.faults.report import percentile, print_table, result
from tests.faults.spawner import ended


@dataclass(frozen=True, slots=True)
class Killing:
    """What is killed: processes of `roles`, with a random pause before each kill.

    `merciless` does not wait until the requests of the last victim go on. A request that loses two workers without
    any progress between is put away as poison, guilty or not; so such a run may end with some in `dead_letters`.
    """

    topology: Topology
    roles: tuple[str, ...]
    pause_s: tuple[float, float]
    max_tokens: tuple[int, int] = (100, 600)
    merciless: bool = False


async def kill_one(run: Campaign, killing: Killing, rng: random.Random) -> None:
    """After a pause, kill a process whose role keeps a ready one."""
    if not killing.merciless:
        await run.cluster.no_suspects()
    await asyncio.sleep(rng.uniform(*killing.pause_s))
    candidates = await _spare(run, killing.roles)
    while not candidates:
        await asyncio.sleep(0.05)
        candidates = await _spare(run, killing.roles)
    victim = rng.choice(candidates)
    child = victim.child
    assert child is not None
    now = time.monotonic()
    child.kill()
    await ended(child, READY_TIMEOUT_S)
    run.disturbances.append(Disturbance("kill", victim.name, now, now))


async def _spare(run: Campaign, roles: tuple[str, ...]) -> list[Slot]:
    """Slots whose process is ready and not the last ready one of its role."""
    pids = {beat.pid for beat in await run.cluster.beats() if beat.state == "ready"}
    ready = []
    for slot in run.cluster.of_role(*roles):
        healthy = await run.cluster.is_healthy(slot) if slot.role == "gateway" else slot.pid in pids
        ready += [slot] if healthy else []
    return [slot for slot in ready if sum(other.role == slot.role for other in ready) > 1]


async def run_seed(seed: int, kills: int, killing: Killing, folder: Path, **plan: Any) -> dict[str, Any]:
    """One cluster, its kills, its result."""
    settings = Plan(seed, killing.topology, max_tokens=killing.max_tokens, **plan)
    async with campaign(settings, folder) as run:
        await run.standard()
        rng = random.Random(seed)
        with phase(run, "fault"):
            run.load.start(run.plan.concurrency)
            for _ in range(kills):
                await kill_one(run, killing, rng)
            await run.load.stop()
        await run.recovery()
        return result(run)


async def run_seeds(kills: int, seeds: list[int], killing: Killing, folder: Path, **plan: Any) -> list[dict[str, Any]]:
    """The kills shared among clusters, one after the other."""
    shares = [kills // len(seeds) + (index < kills % len(seeds)) for index in range(len(seeds))]
    results = []
    for seed, share in zip(seeds, shares, strict=True):
        results.append(await run_seed(seed, share, killing, folder / f"seed-{seed}", **plan))
        print_table(results[-1:])
    return results


def command(killing: Killing, kills: int, description: str | None, arguments: list[str] | None) -> int:
    """Run with `--kills N --seeds 1,2 --out FILE`; 1 when anything was violated."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seeds", default="1,2", help="one cluster for each; the kills are shared among them")
    parser.add_argument("--merciless", action="store_true", help="kill again before the last victim's requests go on")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    with tempfile.TemporaryDirectory(prefix="slipstream-faults-") as folder:
        chosen = replace(killing, merciless=options.merciless)
        results = asyncio.run(run_seeds(options.kills, seeds, chosen, Path(folder)))
    summary = summarise(results)
    print(summary)
    write_raw(options.out, results, **summary)
    return 1 if any(one["violations"] for one in results) else 0


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures over all clusters."""
    recovered = [seconds for one in results for seconds in one["recovery_s"]]
    counted = ("failed_requests", "tokens_lost", "tokens_doubled", "tokens_reordered", "answers_different")
    return {
        "kills": sum(len(one["faults"]) for one in results),
        "requests": sum(row["requests"] for one in results for row in one["phases"]),
        **{name: sum(one[name] for one in results) for name in (*counted, "leaked_kv_tokens", "resumed_streams")},
        "moved_streams": len(recovered),
        "recovery_p50_s": percentile(recovered, 0.5),
        "recovery_p99_s": percentile(recovered, 0.99),
    }
