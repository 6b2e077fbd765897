"""The faults of the protocol model between two steps: processes, connections, deadlines, and what Redis loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.integration.protocol_gateways import moved
from tests.integration.protocol_parts import Client

if TYPE_CHECKING:
    from tests.integration.protocol_model import World


class Disturbance:
    """Strikes as `World.faults` says, and keeps the snapshot that Redis may go back to."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._snapshot: tuple[dict[str, bytes], dict[str, str]] | None = None

    async def strike(self) -> None:
        world, faults = self._world, self._world.faults
        workers = [p for p in world.processes.values() if p.role != "gateway"]
        if world.chance(faults.crash):
            world.crash(world.random.choice(workers))
        if world.chance(faults.pause):
            world.random.choice(workers).paused_until = world.step_number + world.random.randint(5, 120)
        if world.chance(faults.gateway_crash):
            await self._crash_gateway(world.random.choice(world.gateways))
        if world.chance(faults.reconnect):
            await self._reconnect(world.random.choice(list(world.clients.values())))
        await self._disturb_redis()
        for client in world.clients.values():
            client.cancelled = client.cancelled or world.chance(faults.cancel)

    async def _disturb_redis(self) -> None:
        world, faults = self._world, self._world.faults
        if faults.restore and world.chance(0.05):
            self._snapshot = await self._dump()
        if self._snapshot is not None and world.chance(faults.restore):
            await self._restore(*self._snapshot)
        if world.chance(faults.wipe):
            await self._restore({}, {})
        if world.chance(faults.expire):
            await self._expire(world.random.choice(list(world.clients)))
        if world.chance(faults.overdue):
            client = world.random.choice(list(world.clients.values()))
            key = world.keys.request(client.job.request_id)
            if await world.client.hget(key, "state") not in (None, b"done"):
                client.overdue = True
                await world.client.hset(key, "deadline", "1")

    async def _crash_gateway(self, name: str) -> None:
        """Its clients resume at another one or never, unless Redis has forgotten their request too."""
        world = self._world
        held = [client for client in world.clients.values() if client.gateway == name and client.is_reading]
        if not all([await self._is_known(client) for client in held]):
            return
        del world.processes[name]
        world.dead_gateways[name] = world.step_number
        world.start("gateway")
        for client in held:
            client.has_left = client.is_open and world.chance(world.faults.leave)
            moved(
                client,
                world.random.choice(world.gateways),
                world.step_number + world.random.choice([0, 0, 30, 90]),
            )

    async def _reconnect(self, client: Client) -> None:
        """The client's connection breaks, and it goes on at another gateway while the first one lives."""
        world = self._world
        if client.is_reading and client.is_open and await self._is_known(client):
            world.left_behind.add((client.gateway, client.job.request_id))
            moved(client, next(name for name in world.gateways if name != client.gateway))

    async def _is_known(self, client: Client) -> bool:
        world = self._world
        request_id = client.job.request_id
        names = (world.keys.request(request_id), world.keys.log(request_id))
        return not client.is_open or await world.client.exists(*names) == 2

    async def _expire(self, request_id: str) -> None:
        """Redis forgot a request, or the journal of a live one, while a gateway has it."""
        world = self._world
        client, key = world.clients[request_id], world.keys.request(request_id)
        if not client.is_open or client.gateway not in world.processes:
            return
        world.lossy = True
        if world.chance(0.5) and await world.client.hget(key, "state") not in (None, b"done"):
            await world.client.delete(world.keys.log(request_id))
        else:
            await world.client.delete(key, world.keys.log(request_id))
            world.book.owners.pop(request_id, None)

    async def _dump(self) -> tuple[dict[str, bytes], dict[str, str]]:
        world = self._world
        names = [
            key.decode() async for key in world.client.scan_iter(match=_escaped(world.keys.prefix) + "*", count=1000)
        ]
        values = {name: await world.client.dump(name) for name in names}
        return {name: value for name, value in values.items() if value is not None}, dict(world.book.owners)

    async def _restore(self, values: dict[str, bytes], owners: dict[str, str]) -> None:
        world = self._world
        world.lossy = True
        names = [key async for key in world.client.scan_iter(match=_escaped(world.keys.prefix) + "*", count=1000)]
        if names:
            await world.client.delete(*names)
        for name, value in values.items():
            await world.client.restore(name, 60_000, value)
        world.book.owners = dict(owners)


def _escaped(prefix: str) -> str:
    return prefix.replace("[", "\\[").replace("*", "\\*").replace("?", "\\?")
