"""`slipstream drain`: have workers and gateways finish what they do and leave, all at once or one after the other.

An order is a key that the process sees with its next heartbeat, so it needs neither a signal nor the process's host.
What is to run afterwards is the supervisor's business: `serve` and the compose file start another one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from services.cli.bus import deployment_bus
from shared.bus.draining import ORDER_TTL_S, DrainOrders
from shared.bus.registry import Registry
from shared.config import Settings
from shared.errors import ConfigurationError, SlipstreamError
from shared.protocol.keys import ROLES, Keys

GATEWAY = "gateway"
DRAINABLE = (*ROLES, GATEWAY)
_POLL_S = 0.2


class NotDrained(SlipstreamError):
    """A process did not leave, or was not replaced, in time."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which processes to drain: those of these ids, of a role, or all."""

    ids: tuple[str, ...] = ()
    role: str = ""
    everything: bool = False

    def check(self) -> None:
        """Raises ConfigurationError unless exactly one way of choosing was used, with a known role."""
        if (bool(self.ids), bool(self.role), self.everything).count(True) != 1:
            raise ConfigurationError("name ids, or --role, or --all: exactly one of them")
        if self.role and self.role not in DRAINABLE:
            raise ConfigurationError(f"--role must be one of {', '.join(DRAINABLE)}, it is {self.role!r}")

    def of(self, alive: dict[str, str]) -> list[str]:
        """The chosen ids among `alive` (id → role). Raises ConfigurationError for an id that is not alive."""
        unknown = [name for name in self.ids if name not in alive]
        if unknown:
            raise ConfigurationError(f"{', '.join(unknown)} is not alive; `slipstream ps` lists the workers that are")
        if self.ids:
            return list(dict.fromkeys(self.ids))
        return [name for name, role in alive.items() if self.everything or role == self.role]


class Drain:
    """Gives the orders and waits until they were followed."""

    def __init__(self, registry: Registry, orders: DrainOrders, timeout_s: float, console: Console) -> None:
        self._registry = registry
        self._orders = orders
        self._timeout_s = timeout_s
        self._console = console

    async def run(self, selection: Selection, *, rolling: bool) -> None:
        """Raises NotDrained when a process is still there, or not replaced, after the timeout."""
        chosen = selection.of(await self._alive())
        if not chosen:
            self._console.print("Nothing is alive that could drain.")
        for group in [[name] for name in chosen] if rolling else [chosen]:
            ready = await self._num_ready()
            await self._leave(group)
            if rolling:
                await self._replaced(group[0], ready)

    async def _leave(self, names: Sequence[str]) -> None:
        for name in names:
            await self._orders.give(name, max(ORDER_TTL_S, self._timeout_s))
        deadline = time.monotonic() + self._timeout_s
        left = set(names)
        while left:
            still = left & set(await self._alive())
            for name in sorted(left - still):
                self._console.print(f"{name} has left.")
            left = still
            if left and time.monotonic() > deadline:
                raise NotDrained(f"{', '.join(sorted(left))} did not leave within {self._timeout_s:g} s")
            await asyncio.sleep(_POLL_S if left else 0)

    async def _replaced(self, name: str, ready: dict[str, int]) -> None:
        """Until as many are ready in every role as before `name` left."""
        deadline = time.monotonic() + self._timeout_s
        while not _covers(await self._num_ready(), ready):
            if time.monotonic() > deadline:
                raise NotDrained(
                    f"{name} left, but nothing took its place within {self._timeout_s:g} s; the others were not drained"
                )
            await asyncio.sleep(_POLL_S)

    async def _alive(self) -> dict[str, str]:
        """Id → role of every live process, workers first."""
        alive = {beat.worker_id: beat.role for beat in await self._registry.live()}
        return alive | dict.fromkeys(sorted(await self._registry.live_gateways()), GATEWAY)

    async def _num_ready(self) -> dict[str, int]:
        ready = [beat.role for beat in await self._registry.live() if beat.state == "ready"]
        return {role: ready.count(role) for role in ROLES} | {GATEWAY: len(await self._registry.live_gateways())}


def _covers(now: dict[str, int], before: dict[str, int]) -> bool:
    return all(now[role] >= count for role, count in before.items())


async def run_drain(settings: Settings, selection: Selection, *, rolling: bool, timeout_s: float) -> int:
    """Drain what is selected; 0 once it has left. Raises ConfigurationError and NotDrained."""
    keys = Keys(settings.deployment)
    async with deployment_bus(settings) as client:
        drain = Drain(Registry(client, keys), DrainOrders(client, keys), timeout_s, Console(stderr=True))
        await drain.run(selection, rolling=rolling)
    return 0
