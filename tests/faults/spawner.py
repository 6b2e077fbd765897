"""The harness's side of the zygote: start processes, hear of their end, leave none behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.faults.zygote import ONE_THREAD

START_TIMEOUT_S = 60.0
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(slots=True, eq=False)
class Child:
    """One process; `ended` holds its exit status, minus the signal's number when one killed it."""

    pid: int
    log: Path
    ended: asyncio.Future[int]
    stopped: bool = field(default=False, init=False)

    @property
    def is_alive(self) -> bool:
        return not self.ended.done()

    @property
    def is_running(self) -> bool:
        """Alive and not standing still."""
        return self.is_alive and not self.stopped

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """SIGSTOP: it stands still until `go_on`, and does not know it."""
        self.stopped = True
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.stopped = False
        self._signal(signal.SIGCONT)

    def print_tasks(self) -> None:
        """SIGUSR1: the process prints all its tasks into its log."""
        self._signal(signal.SIGUSR1)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def _signal(self, number: signal.Signals) -> None:
        if self.is_alive:
            os.kill(self.pid, number)


class Spawner:
    """One zygote and its children; an async context manager that ends with all of them gone."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._started: asyncio.Queue[int] = asyncio.Queue()
        self._children: dict[int, Child] = {}
        self._early: dict[int, int] = {}
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.faults.zygote"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**inherited, **ONE_THREAD},
            cwd=_ROOT,
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            if not await self._process.stdout.readline():
                raise RuntimeError("the forking process did not start; its message is on standard error")
        self._reading = asyncio.create_task(self._read(self._process.stdout))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._reading is not None
        self._process.stdin.close()
        await self._process.wait()
        await self._reading

    async def start(self, command: Sequence[str], environment: dict[str, str], log: Path) -> Child:
        """Start a process; a command of one word that is a service's name is forked, others are executed."""
        assert self._process is not None
        assert self._process.stdin is not None
        async with self._lock:
            order = {"command": list(command), "environment": environment, "log": str(log)}
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            await self._process.stdin.drain()
            async with asyncio.timeout(START_TIMEOUT_S):
                pid = await self._started.get()
        child = Child(pid, log, asyncio.get_running_loop().create_future())
        self._children[pid] = child
        if pid in self._early:
            child.ended.set_result(self._early.pop(pid))
        return child

    async def _read(self, lines: asyncio.StreamReader) -> None:
        while line := await lines.readline():
            match json.loads(line):
                case {"started": int(pid)}:
                    self._started.put_nowait(pid)
                case {"ended": int(pid), "status": int(status)} if pid in self._children:
                    self._children.pop(pid).ended.set_result(status)
                case {"ended": int(pid), "status": int(status)}:
                    self._early[pid] = status


async def ended(child: Child, timeout_s: float) -> int | None:
    """The exit status, or None when the process still runs after `timeout_s`."""
    done, _ = await asyncio.wait({child.ended}, timeout=timeout_s)
    return child.ended.result() if done else None
