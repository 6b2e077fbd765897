"""The gateways of the protocol model: they submit, adopt, deliver, find stop strings, recover and cancel."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shared.bus.delivery import Verdict
from shared.bus.events import _decoded
from shared.bus.results import Conflict, Polled
from shared.protocol.messages import OUTCOME_CANCELLED, End
from tests.integration.protocol_parts import Actor, Client

if TYPE_CHECKING:
    from tests.integration.protocol_model import World


class Gateways:
    """Actors of the gateways; every process has an id of its own, also the one that replaces a dead one."""

    def __init__(self, world: World) -> None:
        self._world = world

    def actor(self, name: str) -> Actor:
        world = self._world
        while True:
            for client in self._mine(name):
                if not client.is_open:
                    yield from self._open(client, name)
            message = yield lambda: world.client.lpop(f"net:{world.keys.tokens(name)}")
            if message is not None and not world.chance(world.faults.lost_event):
                for request_id, entry in _decoded(message):
                    client = world.clients[request_id]
                    if client.gateway == name and client.is_open:
                        verdict = client.delivery.accept(entry)
                        yield from self._stop(client, name)
                        if verdict is Verdict.REPLAY:
                            yield from self._recover(client, name)
            if message is None:
                yield from self._tend(name)

    def _mine(self, name: str) -> list[Client]:
        now = self._world.step_number
        clients = self._world.clients.values()
        return [c for c in clients if c.gateway == name and c.is_reading and c.away_until <= now]

    def _tend(self, name: str) -> Actor:
        world = self._world
        mine = [client for client in self._mine(name) if client.is_open and client.delivery.end is None]
        if mine and world.chance(0.3):
            yield from self._recover(world.random.choice(mine), name)
        for gateway, request_id in sorted(world.left_behind):
            client = world.clients[request_id]
            if gateway == name and client.is_open and world.chance(0.2):
                world.left_behind.discard((gateway, request_id))
                if client.gateway != name and not world.lossy:
                    yield lambda r=request_id: world.book.cancel(r, name, True)  # type: ignore[misc]

    def _open(self, client: Client, name: str) -> Actor:
        """Submit, or adopt when the client came over from another gateway."""
        world, job, delivery = self._world, client.job, client.delivery
        found = yield lambda: world.store.adopt(job.request_id, name)
        if client.delivery is not delivery:
            return
        if found is not None:
            client.is_open = True
            client.resume(found[1].entries, may_be_lost=world.lossy, from_start=world.from_start)
            self._replayed(client, found[1])
            return
        client.forget()
        answer = yield lambda: world.book.submit(job, delivery.tokens, delivery.emax, delivery.finished)
        if client.delivery is delivery:
            client.is_open = True
            if isinstance(answer, Conflict):
                yield from self._recover(client, name)

    def _stop(self, client: Client, name: str) -> Actor:
        """Cut the choices whose text now holds their stop string, whatever their worker is doing."""
        stops = client.open_stops()
        if stops:
            yield lambda: self._world.book.stop(client.job.request_id, name, stops)

    def _recover(self, client: Client, name: str) -> Actor:
        world, request_id, job, delivery = self._world, client.job.request_id, client.job, client.delivery
        if client.cancelled:
            answer = yield lambda: world.book.cancel(request_id, name, world.random.random() < 0.5)
            if answer == "gone" and client.delivery is delivery:
                delivery.close(End(OUTCOME_CANCELLED))
        yield from self._stop(client, name)
        if world.chance(0.3):
            yield from self._follow(client, name)
        polled = yield lambda: world.store.poll(request_id, name)
        if client.gateway != name or client.delivery is not delivery or delivery.end is not None:
            return
        if polled is None:
            yield lambda: world.book.submit(job, delivery.tokens, delivery.emax, delivery.finished)
        elif polled.gateway != name and polled.state != "done":
            yield lambda: world.store.adopt(request_id, name)
        elif self._replayed(client, polled) is Verdict.CONFLICT:
            if polled.state == "done":
                delivery.close(End("error", "stream_conflict"))
            else:
                yield lambda: world.book.repair(request_id, name, delivery.tokens, delivery.emax, delivery.finished)

    def _follow(self, client: Client, name: str) -> Actor:
        """Read only what the journal has after the position held."""
        world, delivery = self._world, client.delivery
        after = str(delivery.position)
        polled = yield lambda: world.store.poll(client.job.request_id, name, after)
        if polled is not None and client.delivery is delivery and str(delivery.position) == after:
            delivery.follow(polled.entries)

    def _replayed(self, client: Client, polled: Polled) -> Verdict:
        self._world.check_journal(client, polled)
        return client.delivery.replay(polled.entries)


def moved(client: Client, gateway: str, away_until: int = 0) -> None:
    """The client goes on at another gateway."""
    client.move(gateway, replace(client.job, gateway=gateway), away_until)
