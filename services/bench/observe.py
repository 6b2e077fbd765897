"""What a run costs besides time: Redis commands and the memory of each process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType

import psutil
from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.errors import ConfigurationError

ROLES = ("serve", "gateway", "prefill", "decode")
_SERVERS = ("valkey-server", "redis-server")
_OWN_COMMANDS = ("info",)


class RedisCounter:
    """Counts what every client together asked of one Redis between entering and `delta`.

    Commands that a script calls are counted too, as Redis does; `evalsha` alone is the number of
    script calls. Without a URL it counts nothing and `delta` is empty.
    """

    def __init__(self, url: str) -> None:
        self._redis: Redis | None = Redis.from_url(url, socket_timeout=5, decode_responses=True) if url else None
        self._before: dict[str, int] = {}

    async def __aenter__(self) -> RedisCounter:
        if self._redis is not None:
            try:
                self._before = await self._calls(self._redis)
            except (RedisError, OSError) as exc:
                await self._redis.aclose()
                raise ConfigurationError(f"--redis-url cannot be used: {exc}") from exc
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._redis is not None:
            await self._redis.aclose()

    async def delta(self) -> dict[str, int]:
        """Calls per command since entering, most frequent first."""
        if self._redis is None:
            return {}
        after = await self._calls(self._redis)
        grown = {name: calls - self._before.get(name, 0) for name, calls in after.items()}
        return dict(sorted(((n, c) for n, c in grown.items() if c > 0), key=lambda item: (-item[1], item[0])))

    @staticmethod
    async def _calls(redis: Redis) -> dict[str, int]:
        stats = await redis.info("commandstats")
        calls = {name.removeprefix("cmdstat_"): int(fields["calls"]) for name, fields in stats.items()}
        return {name: count for name, count in calls.items() if name not in _OWN_COMMANDS}


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Memory of one process in bytes: highest resident size seen, and at the end the size with shared pages divided.

    `pss` is None where the system does not tell it.
    """

    pid: int
    role: str
    peak_rss: int
    pss: int | None


class ProcessWatch:
    """Follows the memory of some processes; one that ends during the run keeps its last figures."""

    def __init__(self, processes: Sequence[tuple[psutil.Process, str]]) -> None:
        self._processes = processes
        self._peak: dict[int, int] = {}

    def sample(self) -> None:
        for process, _ in self._processes:
            try:
                rss = process.memory_info().rss
            except psutil.Error:
                continue
            self._peak[process.pid] = max(rss, self._peak.get(process.pid, 0))

    def finish(self) -> list[ProcessMemory]:
        self.sample()
        return [
            ProcessMemory(process.pid, role, self._peak[process.pid], _pss(process))
            for process, role in self._processes
            if process.pid in self._peak
        ]


def find_processes(pids: Iterable[int] = ()) -> list[tuple[psutil.Process, str]]:
    """Slipstream's processes on this machine with their roles, or exactly `pids` when given."""
    wanted = set(pids)
    found = []
    for process in psutil.process_iter():
        if wanted and process.pid not in wanted:
            continue
        try:
            role = role_of(process.cmdline()) or _bus_role(process)
            name = process.name()
        except psutil.Error:
            continue
        if wanted or role:
            found.append((process, role or name))
    missing = wanted - {process.pid for process, _ in found}
    if missing:
        raise ConfigurationError(f"--pid {min(missing)}: no such process, or not one this user may look at")
    return sorted(found, key=lambda item: (item[1], item[0].pid))


def role_of(cmdline: Sequence[str]) -> str:
    """The role in `... slipstream ROLE ...` or `python -m services.cli ROLE ...`; empty for other commands."""
    for program, argument in pairwise(cmdline):
        if os.path.basename(program) in ("slipstream", "services.cli", "cli.py") and argument in ROLES:
            return argument
    return ""


def _bus_role(process: psutil.Process) -> str:
    """`redis` for the embedded server: a Redis or Valkey whose parent is one of Slipstream's processes."""
    if not process.name().startswith(_SERVERS):
        return ""
    parent = process.parent()
    return "redis" if parent is not None and role_of(parent.cmdline()) else ""


def _pss(process: psutil.Process) -> int | None:
    try:
        return getattr(process.memory_full_info(), "pss", None)
    except psutil.Error:
        return None
