"""What must hold at the end of every run. Each check returns its violations in words; none means that it holds."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus.connection import as_text
from shared.protocol.keys import GROUP
from shared.protocol.messages import WorkerBeat
from tests.faults.client import FINISHED, LEFT, Record
from tests.faults.requests import Answer, differences

FIXED_KEYS = re.compile(r"\}:(work:[^@]*|workers|gateways)$")
"""Keys that live for ever: work streams but a worker's private one, the list of the dead, who ever sent a heartbeat."""

DESCRIPTOR_SLACK = 2
TASK_SLACK = 2

_METRIC = re.compile(r"^slipstream_(\w+?)(?:\{[^}]*\})? ([0-9.e+-]+)$", re.MULTILINE)


def one_ending(records: Iterable[Record]) -> list[str]:
    """Every accepted request has exactly one terminal event, and every choice of it exactly one finish."""
    problems = []
    for record in records:
        name = f"request {record.spec.number} ({record.response_id or 'no id'})"
        if len(record.ends) != 1:
            problems.append(f"{name} ended {len(record.ends)} times: {record.ends}")
        elif record.outcome not in (FINISHED, LEFT):
            problems.append(f"{name} failed: {record.error}")
        for index, choice in record.answer.items():
            count = len(choice.finish_reasons)
            if count > 1 or (record.outcome == FINISHED and count != 1):
                problems.append(f"{name} choice {index} finished {count} times")
    return problems


def token_integrity(records: Iterable[Record], references: Mapping[int, Answer]) -> list[str]:
    """No token, text or log-probability is lost, doubled, reordered or different from the undisturbed run."""
    return [
        f"request {record.spec.number} ({record.response_id}, {record.resumes} resumes): {difference}"
        for record in records
        if record.outcome == FINISHED
        for difference in differences(record.answer, references[record.spec.number])
    ]


def event_order(records: Iterable[Record]) -> list[str]:
    """The ids of a stream's events only go up, over all the connections it took."""
    problems = []
    for record in records:
        ids = [event_id for event_id, _ in record.events]
        positions = [_position(event_id) for event_id in ids]
        for before, after, event_id in zip(positions, positions[1:], ids[1:], strict=False):
            if after < before:
                problems.append(f"request {record.spec.number}: event {event_id} comes after a later one")
        doubled = [name for name, count in Counter(ids).items() if count > len(record.answer) + 1]
        problems += [f"request {record.spec.number}: event {name} came too often" for name in doubled]
    return problems


def _position(event_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", event_id))


def blocks_free(beats: Iterable[WorkerBeat]) -> list[str]:
    """At rest every KV block of every live worker is free or evictable cache, and nothing runs or waits."""
    return [
        f"{beat.worker_id} holds {beat.kv_tokens_used} KV tokens, {beat.running} running, {beat.waiting} waiting"
        for beat in beats
        if beat.kv_tokens_used or beat.running or beat.waiting
    ]


async def nothing_pending(client: Redis) -> list[str]:
    """At rest no work entry is pending or unread, on any work stream that more than one worker reads.

    A worker's own stream may hold its self-test after its death; it goes by its time to live.
    """
    problems = []
    names = [key async for key in client.scan_iter(match="*:work:*", count=500) if b"work:dead" not in key]
    for key in (key for key in names if b"@" not in key):
        try:
            pending = (await client.xpending(key, GROUP))["pending"]
        except ResponseError:
            pending = 0
        length = await client.xlen(key)
        if pending or length:
            problems.append(f"{key.decode()} has {pending} pending of {length} entries")
    return problems


async def keys_expire(client: Redis) -> list[str]:
    """Every key has a time to live, but for the few that are meant to stay."""
    problems = []
    async for key in client.scan_iter(count=500):
        name = key.decode()
        if await client.pttl(key) == -1 and not FIXED_KEYS.search(name):
            problems.append(f"{name} has no time to live")
    return problems


async def requests_ended(client: Redis, keep_ms: int = 60_000) -> list[str]:
    """At rest every request in Redis is done, and leaves within its short time to live with its journal."""
    problems = []
    async for key in client.scan_iter(match="*:req:*", count=500):
        state, ttl = as_text(await client.hget(key, "state") or b"gone"), await client.pttl(key)
        if ttl != -2 and (state != "done" or ttl > keep_ms):
            problems.append(f"{key.decode()} is {state} and lives for {ttl} ms")
    return problems


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one process holds of the system. `descriptors` leaves out links to Redis: their pool has its own bound."""

    pid: int
    descriptors: int
    threads: int
    memory_kib: int
    tasks: int = 0


def footprint(pid: int, redis_ports: Sequence[int], tasks: int = 0) -> Footprint:
    """Look at a process from outside."""
    peers = _socket_peers(pid)
    held = [_target(Path(f"/proc/{pid}/fd/{name}")) for name in os.listdir(f"/proc/{pid}/fd")]
    own = [target for target in held if target and peers.get(target) not in redis_ports]
    status = Path(f"/proc/{pid}/status").read_text()
    threads = re.search(r"Threads:\s+(\d+)", status)
    return Footprint(pid, len(own), int(threads[1]) if threads else 0, memory_kib(pid), tasks)


def memory_kib(pid: int) -> int:
    """Anonymous memory of a process. Raises OSError when there is none of that number."""
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _socket_peers(pid: int) -> dict[str, int]:
    """`socket:[inode]` to the port at the other end."""
    peers = {}
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        peers[f"socket:[{fields[9]}]"] = int(fields[2].rpartition(":")[2], 16)
    return peers


def footprints_steady(before: Iterable[Footprint], after: Iterable[Footprint]) -> list[str]:
    """Processes that lived through the run hold no more descriptors and tasks at rest than at rest before it."""
    first = {one.pid: one for one in before}
    problems = []
    for now in after:
        then = first.get(now.pid)
        if then is None:
            continue
        if now.descriptors > then.descriptors + DESCRIPTOR_SLACK:
            problems.append(f"process {now.pid} has {now.descriptors} descriptors open, {then.descriptors} before")
        if now.tasks > then.tasks + TASK_SLACK:
            problems.append(f"process {now.pid} has {now.tasks} tasks, {then.tasks} before")
    return problems


def tasks_in(log: str) -> int:
    """Number of tasks in the last dump that SIGUSR1 made a process print."""
    dumps = log.split("<Task ")[1:]
    return len(dumps)


def metrics_add_up(page: str) -> list[str]:
    """One gateway at rest: received is the sum of all outcomes, and nothing is in flight or queued."""
    sums = metric_sums(page)
    received, ended = sums["requests_received_total"], sums["requests_total"]
    problems = []
    if received != ended + sums["requests_in_flight"]:
        problems.append(f"received {received:.0f}, ended {ended:.0f}, in flight {sums['requests_in_flight']:.0f}")
    problems += [
        f"{name} is {sums[name]:.0f} at rest" for name in ("requests_in_flight", "requests_queued") if sums[name]
    ]
    return problems


def tokens_counted(pages: Iterable[str], records: Iterable[Record]) -> list[str]:
    """Tokens the gateways counted against those the clients got; for runs in which no gateway died and nobody left."""
    counted = sum(metric_sums(page)["generation_tokens_total"] for page in pages)
    received = sum(len(choice.tokens) for record in records for choice in record.answer.values())
    return [] if counted == received else [f"gateways counted {counted:.0f} tokens, clients got {received}"]


def metric_sums(page: str) -> Counter[str]:
    """Each metric summed over its labels."""
    sums: Counter[str] = Counter()
    for name, value in _METRIC.findall(page):
        sums[name] += float(value)  # type: ignore[assignment]
    return sums
