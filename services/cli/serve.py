"""`slipstream serve`: the whole topology on one machine, as separate processes, from one command.

The embedded bus is started first (unless a Redis URL is set), then workers and gateway. While models load, progress
comes from the workers' heartbeats. A worker that dies is started again; its requests were taken over meanwhile. So is
one that was told to drain and has left: `slipstream drain --all --rolling` renews all processes that way. Ctrl-C drains
from the outside in: gateway, workers, bus.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from redis.asyncio import Redis
from redis.exceptions import RedisError
from rich.console import Console

from services.cli.banner import connectable, show_ready
from services.cli.flags import environment
from services.cli.progress import LoadingProgress
from shared.bus.connection import connect
from shared.bus.embedded import EmbeddedServer
from shared.bus.local import noted
from shared.bus.registry import Registry
from shared.config import Settings
from shared.cores import VARIABLE as CORES_VARIABLE
from shared.cores import CoreBoard
from shared.errors import ConfigurationError
from shared.lifecycle import EXIT_OK, PARENT_VARIABLE
from shared.model.source import resolve
from shared.protocol.keys import Keys
from shared.protocol.messages import WorkerBeat

_POLL_S = 0.2
_RESTART_PAUSE_S = 1.0
_MAX_FAST_DEATHS = 3
_FAST_S = 20.0
_KILL_GRACE_S = 10.0


@dataclass(slots=True, eq=False)
class Child:
    """One process of the cluster; `slot` is its place on the board of cores, `fast_deaths` counts early deaths."""

    role: str
    slot: int
    process: asyncio.subprocess.Process | None = None
    started: float = 0.0
    fast_deaths: int = 0


@dataclass(slots=True)
class Cluster:
    """Owns the bus and all processes; `run` returns after everything has stopped."""

    settings: Settings
    overrides: dict[str, Any]
    num_prefill: int
    num_decode: int
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))
    children: list[Child] = field(default_factory=list)
    _board: CoreBoard = field(init=False)

    async def run(self, stop: asyncio.Event) -> None:
        """Start everything, show when it is ready, restart dead workers, drain on `stop`."""
        if self.settings.transfer.port and self.num_prefill > 1:
            raise ConfigurationError(
                "several prefill workers cannot share one --kv-port; leave it out: each takes a free one"
            )
        resolve(self.settings.model)  # a wrong model is told here, once, before anything starts
        require_free_port(self.settings.gateway.host, self.settings.gateway.port)
        async with AsyncExitStack() as stack:
            url = self._bus(stack)
            stack.enter_context(noted(self.settings.deployment, url))
            client = await stack.enter_async_context(connect(url))
            variables = self._environment(url)
            roles = ["decode"] * self.num_decode + ["prefill"] * self.num_prefill + ["gateway"]
            self.children = [Child(role, slot) for slot, role in enumerate(roles)]
            self._board = stack.enter_context(closing(CoreBoard.create()))
            stack.push_async_callback(self._stop_children)
            for child in self.children:
                await self._start(child, variables)
            await self._until_stopped(stop, client, variables)

    async def _until_stopped(self, stop: asyncio.Event, client: Redis, variables: dict[str, str]) -> None:
        stopped = asyncio.create_task(stop.wait())
        watching = asyncio.create_task(self._watch(client, variables))
        done, pending = await asyncio.wait({stopped, watching}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if watching in done:
            watching.result()
        self.console.print("Draining; press Ctrl-C again to stop at once.")

    def _bus(self, stack: AsyncExitStack) -> str:
        if self.settings.redis.url:
            return self.settings.redis.url
        return stack.enter_context(EmbeddedServer()).url

    def _environment(self, url: str) -> dict[str, str]:
        secret = self.settings.cluster_secret.get_secret_value() or secrets.token_urlsafe(32)
        quiet = {} if "log_level" in self.settings.model_fields_set else {"SLIPSTREAM_LOG_LEVEL": "warning"}
        return {
            **os.environ,
            **quiet,
            **environment(self.overrides),
            "SLIPSTREAM_REDIS__URL": url,
            "SLIPSTREAM_CLUSTER_SECRET": secret,
            PARENT_VARIABLE: str(os.getpid()),
        }

    async def _start(self, child: Child, variables: dict[str, str]) -> None:
        child.started = time.monotonic()
        self._board.clear(child.slot)
        child.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.cli", child.role),
            env=variables | {CORES_VARIABLE: f"{self._board.descriptor}:{child.slot}"},
            pass_fds=(self._board.descriptor,),
            start_new_session=True,
        )

    async def _watch(self, client: Redis, variables: dict[str, str]) -> None:
        """Wait for readiness, tell the user, then keep every process running."""
        registry = Registry(client, Keys(self.settings.deployment))
        with LoadingProgress(self.console) as progress:
            while not self._is_ready(beats := await _beats(registry)):
                progress.update(beats)
                await self._revive(variables)
                await asyncio.sleep(_POLL_S)
        await self._wait_for_gateway(variables)
        show_ready(self.console, self.settings, await _beats(registry))
        while True:
            await self._revive(variables)
            await asyncio.sleep(_POLL_S)

    def _is_ready(self, beats: list[WorkerBeat]) -> bool:
        ready = [beat.role for beat in beats if beat.state == "ready"]
        return ready.count("prefill") >= self.num_prefill and ready.count("decode") >= self.num_decode

    async def _wait_for_gateway(self, variables: dict[str, str]) -> None:
        gateway = self.settings.gateway
        url = f"http://{connectable(gateway.host)}:{gateway.port}/health"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(url) as response:
                        if response.status == 200:
                            return
                await self._revive(variables)
                await asyncio.sleep(_POLL_S)

    async def _revive(self, variables: dict[str, str]) -> None:
        """Start dead children again; one that keeps dying right away ends the cluster with its own message above."""
        for child in self.children:
            process = child.process
            if process is None or process.returncode is None:
                continue
            if process.returncode == EXIT_OK:
                self.console.print(f"The {child.role} process (pid {process.pid}) has drained; starting another.")
                await self._start(child, variables)
                continue
            lived = time.monotonic() - child.started
            child.fast_deaths = child.fast_deaths + 1 if lived < _FAST_S else 0
            if (process.returncode in (1, 2) and lived < _FAST_S) or child.fast_deaths >= _MAX_FAST_DEATHS:
                raise ConfigurationError(f"the {child.role} process ended with status {process.returncode}; see above")
            self.console.print(f"The {child.role} process (pid {process.pid}) died; starting another.")
            await asyncio.sleep(_RESTART_PAUSE_S)
            await self._start(child, variables)

    async def _stop_children(self) -> None:
        """Drain the gateway first, so that its streams still have workers; kill what outlives its time."""
        for roles in ({"gateway"}, {"prefill", "decode"}):
            running = [child.process for child in self.children if child.role in roles and child.process]
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
            await asyncio.gather(*(self._await_end(process) for process in running))

    async def _await_end(self, process: asyncio.subprocess.Process) -> None:
        try:
            async with asyncio.timeout(self.settings.drain_timeout_s + _KILL_GRACE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _beats(registry: Registry) -> list[WorkerBeat]:
    try:
        return await registry.live()
    except (RedisError, OSError):
        return []


def require_free_port(host: str, port: int) -> None:
    """Raises ConfigurationError when the port is taken; 0 is refused, because the box could not show it."""
    if port == 0:
        raise ConfigurationError("serve needs a fixed port: set --port or SLIPSTREAM_GATEWAY__PORT")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --port"
            ) from None
