"""A model of the bus protocol: simulated clients, gateways and workers on the real scripts.

Each actor is a generator that yields one bus command at a time; a seeded scheduler decides whose
command runs next and which fault hits it. So every interleaving at command granularity can occur,
and a seed repeats it. The scripts are the shipped ones, but for PUBLISH, which goes to a list that
the model delivers from, late or never.

Faults: a worker dies, drains or stands still and comes back a zombie; a gateway dies, and its clients
resume at another one after the position they had last, or never; a connection breaks and its client
goes on elsewhere; a reply is lost and the command repeated; an entry is delivered twice; publications
are lost; a request's time runs out; Redis expires a request or its journal, loses its last writes
(all keys go back to a snapshot) or everything. Requests have up to three choices of unlike length,
some with a stop string that the gateway finds, and some kill every worker that handles them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from redis.asyncio import Redis

from shared.bus.delivery import Delivery
from shared.bus.requests import RequestStore
from shared.bus.results import Polled
from shared.errors import ProtocolError
from shared.protocol.journal import chain, fold
from shared.protocol.keys import Keys
from shared.protocol.messages import OUTCOME_CANCELLED, OUTCOME_FINISHED, End, Job, Tokens
from shared.protocol.sampling import SamplingParams
from tests.integration.protocol_book import ORPHANED, Book, Violation
from tests.integration.protocol_disturbance import Disturbance
from tests.integration.protocol_gateways import Gateways
from tests.integration.protocol_parts import (
    MODEL,
    NO_FAULTS,
    Client,
    Faults,
    Killed,
    Process,
    Slot,
    next_token,
    redirected,
)
from tests.integration.protocol_workers import Workers

MANY = 1000
QUARANTINED = "request_quarantined"
OVERDUE = "deadline_exceeded"


class World:
    """Everything of one run. `break_script` changes the scripts' text, to see whether the checks fire.

    `poison`: the state in which the first request kills its workers, and how many tokens it has then. `from_start`:
    clients that change their gateway read from the first event, and what they get must repeat what they hold.
    """

    def __init__(
        self,
        client: Redis,
        keys: Keys,
        seed: int,
        faults: Faults,
        *,
        divergent: bool = False,
        poison: tuple[str, int] | None = None,
        from_start: bool = False,
        break_script: Callable[[str, str], str] = lambda name, text: text,
    ) -> None:
        self.random = random.Random(seed)
        self.faults = faults
        self.divergent = divergent
        self.poison = poison
        self.from_start = from_start
        self.client = client
        self.keys = keys
        self.step_number = 0
        limits: dict[str, Any] = {} if poison else {"max_deaths": MANY, "max_kills": MANY}
        self.store = RequestStore(client, keys, **limits)
        for name in self.store.scripts:
            self.store.scripts[name] = redirected(name, lambda text, name=name: break_script(name, text))  # type: ignore[misc]
        self.prefill_stream = keys.work("prefill", MODEL)
        self.decode_stream = keys.work("decode", MODEL)
        self.processes: dict[str, Process] = {}
        self.dead: set[str] = set()
        self.dead_gateways: dict[str, int] = {}
        self.left_behind: set[tuple[str, str]] = set()
        self.clients: dict[str, Client] = {}
        self.exports: dict[tuple[str, int, str], list[Tokens]] = {}
        self.num_killed: dict[str, int] = {}
        self.book = Book(self.store, client)
        self.lossy = False
        self._names: Iterator[int] = iter(range(1_000_000))
        self._gateways, self._workers = Gateways(self), Workers(self)
        self._disturbance = Disturbance(self)

    @property
    def gateways(self) -> list[str]:
        """Names of the gateways that live."""
        return [process.name for process in self.processes.values() if process.role == "gateway"]

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def exporter(self, key: tuple[str, int, str]) -> str:
        return key[2].partition("_")[0]

    # ---- running -------------------------------------------------------------------------------

    async def run(self, num_requests: int) -> None:
        """Submit, let the faults rage, then let everything finish and check the end."""
        for role in ("prefill", "decode", "prefill", "decode", "gateway", "gateway"):
            self.start(role)
        for number in range(num_requests):
            self.arrive(f"r{number}", self.poison if number == 0 else None)
        for _ in range(self.faults.steps):
            await self.step()
        self.faults = NO_FAULTS
        for process in self.processes.values():
            process.paused_until = 0
        for _ in range(5000):
            if not any(client.is_reading for client in self.clients.values()) and await self._is_idle():
                break
            await self.step()
        await self.check_end()

    async def step(self) -> None:
        self.step_number += 1
        await self._disturbance.strike()
        ready = [p for p in self.processes.values() if p.paused_until <= self.step_number]
        process = self.random.choice(ready)
        slot = self.random.choice(process.slots)
        try:
            if slot.waiting is None:
                slot.waiting = next(slot.actor)
            reply = await slot.waiting()
            if self.chance(self.faults.lost_reply):
                return
            slot.waiting = slot.actor.send(reply)
        except Killed as killed:
            request_id = str(killed)
            self.num_killed[request_id] = self.num_killed.get(request_id, 0) + 1
            self.crash(process)
        for client in self.clients.values():
            client.drain()
        if self.chance(0.05):
            await self.check_standing()

    def start(self, role: str) -> str:
        """Start a gateway or a worker of a role; every process has a name of its own."""
        name = f"{role[0]}{next(self._names)}"
        process = self.processes[name] = Process(name, role)
        if role == "gateway":
            process.slots.append(Slot(self._gateways.actor(name)))
        else:
            actor = self._workers.prefill if role == "prefill" else self._workers.decode
            process.slots += [Slot(actor(process)) for _ in range(2 if self.poison else 1)]
        return name

    def crash(self, process: Process) -> None:
        del self.processes[process.name]
        self.dead.add(process.name)
        for key in [key for key in self.exports if self.exporter(key) == process.name]:
            del self.exports[key]
        self.start(process.role)

    def arrive(self, request_id: str, poison: tuple[str, int] | None) -> None:
        n = 1 if poison else self.random.randint(1, max(1, self.faults.max_choices))
        gateway = self.random.choice(self.gateways)
        params = SamplingParams(max_tokens=8, seed=1, n=n)
        span = (60, 60) if poison else (10, 20) if self.poison else (1, 8)
        job = Job(request_id, MODEL, (1, 2, 3), params, gateway, self.prefill_stream, self.decode_stream)
        lengths = tuple(self.random.randint(*span) for _ in range(n))
        client = Client(job, lengths, Delivery(n), gateway, [[] for _ in range(n)], poison=poison)
        client.stops = {
            c: self.random.randint(1, 8) for c in range(n) if not self.poison and self.chance(self.faults.stops)
        }
        self.clients[request_id] = client

    # ---- checks --------------------------------------------------------------------------------

    def check_journal(self, client: Client, polled: Polled) -> None:
        """The journal folds, every token continues its prefix, at most one terminal entry, at its end."""
        try:
            state = fold(polled.entries, client.job.params.n)
        except ProtocolError as error:
            raise Violation(f"{client.job.request_id}: its journal does not fold: {error}") from error
        ends = [i for i, entry in enumerate(polled.entries) if isinstance(entry.event, End)]
        if ends not in ([], [len(polled.entries) - 1]):
            raise Violation(f"{client.job.request_id}: terminal entries at {ends} of {len(polled.entries)}")
        for choice in state.choices:
            self._check_tokens(client, choice.tokens)

    def _check_tokens(self, client: Client, tokens: list[int]) -> None:
        salts = range(200) if self.divergent else [0]
        h = ""
        for index, token in enumerate(tokens):
            if not any(next_token(h, salt) == token for salt in salts):
                raise Violation(f"{client.job.request_id}: token {index} does not follow its prefix")
            h = chain(h, [token])

    async def check_standing(self) -> None:
        """Exactly one entry stands for each live request, an offer only in prefill; no key lives for ever."""
        for client in self.clients.values():
            request_id = client.job.request_id
            key = self.keys.request(request_id)
            fields: dict[bytes, bytes] = await self.client.hgetall(key)  # type: ignore[assignment]
            if not fields:
                continue
            if await self.client.pttl(key) == -1 or await self.client.pttl(self.keys.log(request_id)) == -1:
                raise Violation(f"{request_id}: its keys have no time to live")
            state, entry = fields[b"state"].decode(), fields[b"entry"]
            if fields[b"offer"] and state != "prefill":
                raise Violation(f"{request_id}: an offer stands in state {state}")
            if state == "done":
                continue
            found: Any = await self.client.xrange(fields[b"stream"], entry, entry) if entry else []
            if len(found) != 1 or found[0][1][b"id"] != request_id.encode():
                raise Violation(f"{request_id}: no entry stands for it in state {state}")

    async def check_end(self) -> None:
        for client in self.clients.values():
            self.check_client(client)
        await self.check_standing()
        if not await self._is_idle():
            raise Violation("work entries are left though every request has ended")

    def check_client(self, client: Client) -> None:
        """One terminal event, and one that the client's own request and the faults explain."""
        request_id = client.job.request_id
        for tokens in client.got:
            self._check_tokens(client, tokens)
        if client.has_left:
            return
        if len(client.ends) != 1:
            raise Violation(f"{request_id}: {len(client.ends)} terminal events after {self.step_number} steps")
        end = client.ends[0]
        if end.outcome == OUTCOME_FINISHED:
            client.check_lengths()
        elif end.outcome == OUTCOME_CANCELLED:
            if not (client.cancelled or (end.code == ORPHANED and self.dead_gateways)):
                raise Violation(f"{request_id}: cancelled though nobody asked for it")
        elif not self._is_explained(client, end.code):
            raise Violation(f"{request_id}: ended in {end.code}")
        if client.poison and (end.code != QUARANTINED or self.num_killed[request_id] != 2):
            raise Violation(f"{request_id}: killed {self.num_killed} workers and ended in {end.code or end.outcome}")

    def _is_explained(self, client: Client, code: str) -> bool:
        if code == QUARANTINED:
            return client.poison is not None
        if code == OVERDUE:
            return client.overdue
        return code == "stream_conflict" and self.divergent and self.lossy

    async def _is_idle(self) -> bool:
        """No work entry is left, standing or stale."""
        counts = [await self.client.xlen(stream) for stream in (self.prefill_stream, self.decode_stream)]
        return sum(counts) == 0
