"""A model of the bus protocol: simulated clients, gateways and workers on the real scripts.

Each actor is a generator that yields one bus command at a time; a seeded scheduler decides whose
command runs next and which fault hits it. So every interleaving at command granularity can occur,
and a seed repeats it. The scripts are the shipped ones, but for PUBLISH, which goes to a list that
the model delivers from, late or never.

Faults: a worker or gateway dies or stands still and comes back a zombie, a reply is lost and the
command repeated, an entry is delivered twice, publications are lost, Redis loses its last writes
(all keys go back to a snapshot) or everything.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

from redis.asyncio import Redis

from shared.bus.delivery import Delivery, Verdict
from shared.bus.events import _decoded
from shared.bus.requests import RequestStore
from shared.bus.results import (
    Append,
    Appended,
    Begun,
    Cancelled,
    Committed,
    Conflict,
    Lease,
    Offer,
    Polled,
    Refused,
)
from shared.bus.workqueue import WorkQueue, pending
from shared.errors import ProtocolError
from shared.protocol.journal import chain, fold
from shared.protocol.keys import Keys
from shared.protocol.messages import FINISH_LENGTH, OUTCOME_CANCELLED, OUTCOME_FINISHED, End, Job, Tokens
from shared.protocol.sampling import SamplingParams
from tests.integration.protocol_book import Book, Violation
from tests.integration.protocol_parts import (
    MODEL,
    NO_FAULTS,
    Actor,
    Call,
    Client,
    Faults,
    Process,
    next_token,
    redirected,
)


class World:
    """Everything of one run. `break_script` changes the scripts' text, to see whether the checks fire."""

    def __init__(
        self,
        client: Redis,
        keys: Keys,
        seed: int,
        faults: Faults,
        *,
        divergent: bool = False,
        break_script: Callable[[str, str], str] = lambda name, text: text,
    ) -> None:
        self.random = random.Random(seed)
        self.faults = faults
        self.divergent = divergent
        self.client = client
        self.keys = keys
        self.step_number = 0
        self.store = RequestStore(client, keys, max_deaths=1000)
        for name in self.store.scripts:
            self.store.scripts[name] = redirected(name, lambda text, name=name: break_script(name, text))  # type: ignore[misc]
        self.prefill_stream = keys.work("prefill", MODEL)
        self.decode_stream = keys.work("decode", MODEL)
        self.processes: dict[str, Process] = {}
        self.dead: set[str] = set()
        self.clients: dict[str, Client] = {}
        self.exports: dict[tuple[str, int, str], list[Tokens]] = {}
        self.book = Book(self.store, client)
        self.snapshot: tuple[dict[str, bytes], dict[str, str]] | None = None
        self.lossy = False
        self.names: Iterator[str] = (f"p{number}" for number in range(1_000_000))
        self.last_entries: list[tuple[str, str, str]] = []

    # ---- running -------------------------------------------------------------------------------

    async def run(self, num_requests: int) -> None:
        """Submit, let the faults rage, then let everything finish and check the end."""
        for role in ("prefill", "decode", "prefill", "decode"):
            self.start(role)
        for gateway in ("g1", "g2"):
            self.start(gateway)
        for number in range(num_requests):
            self._arrive(f"r{number}")
        for _ in range(self.faults.steps):
            await self.step()
        self.faults = NO_FAULTS
        for process in self.processes.values():
            process.paused_until = 0
        for _ in range(3000):
            if all(client.ends for client in self.clients.values()) and await self._is_idle():
                break
            await self.step()
        await self._check_end()

    async def step(self) -> None:
        self.step_number += 1
        await self._disturb()
        ready = [p for p in self.processes.values() if p.paused_until <= self.step_number]
        process = self.random.choice(ready)
        if process.waiting is None:
            process.waiting = next(process.actor)
        reply = await process.waiting()
        if self._chance(self.faults.lost_reply):
            return
        process.waiting = process.actor.send(reply)
        for client in self.clients.values():
            client.drain()
        if self.random.random() < 0.05:
            await self.check_standing()

    def start(self, role: str) -> None:
        """Start a worker of a role, or the gateway of that name."""
        name = role if role.startswith("g") else next(self.names)
        actor = {"prefill": self._prefill, "decode": self._decode}.get(role, self._gateway)(name)
        self.processes[name] = Process(name, role, actor)

    def _chance(self, probability: float) -> bool:
        return self.random.random() < probability

    async def _disturb(self) -> None:
        faults = self.faults
        workers = [p for p in self.processes.values() if p.role in ("prefill", "decode")]
        if self._chance(faults.crash):
            self._crash(self.random.choice(workers))
        if self._chance(faults.pause):
            self.random.choice(workers).paused_until = self.step_number + self.random.randint(5, 120)
        if self._chance(faults.gateway_crash):
            await self._crash_gateway(self.random.choice(["g1", "g2"]))
        if self._chance(0.05) and faults.steps:
            self.snapshot = await self._dump()
        if self.snapshot is not None and self._chance(faults.restore):
            await self._restore(*self.snapshot)
        if self._chance(faults.wipe):
            await self._restore({}, {})
        for client in self.clients.values():
            client.cancelled = client.cancelled or self._chance(faults.cancel)

    def _crash(self, process: Process) -> None:
        del self.processes[process.name]
        self.dead.add(process.name)
        for key in [key for key in self.exports if self._exporter(key) == process.name]:
            del self.exports[key]
        self.start(process.role)

    async def _crash_gateway(self, name: str) -> None:
        """Its clients come back through the other one, unless Redis has forgotten their request too."""
        held = [client for client in self.clients.values() if client.gateway == name and not client.ends]
        for client in held:
            if not await self.client.exists(self.keys.request(client.job.request_id)):
                return
        self.processes.pop(name)
        self.start(name)
        for client in held:
            client.gateway = "g2" if name == "g1" else "g1"
            client.delivery = Delivery(client.job.params.n)
            client.job = replace(client.job, gateway=client.gateway)

    def _exporter(self, key: tuple[str, int, str]) -> str:
        return key[2].partition("_")[0]

    # ---- Redis losing things -------------------------------------------------------------------

    async def _dump(self) -> tuple[dict[str, bytes], dict[str, str]]:
        names = [
            key.decode() async for key in self.client.scan_iter(match=_escaped(self.keys.prefix) + "*", count=1000)
        ]
        values = {name: await self.client.dump(name) for name in names}
        return {name: value for name, value in values.items() if value is not None}, dict(self.book.owners)

    async def _restore(self, values: dict[str, bytes], owners: dict[str, str]) -> None:
        self.lossy = True
        names = [key async for key in self.client.scan_iter(match=_escaped(self.keys.prefix) + "*", count=1000)]
        if names:
            await self.client.delete(*names)
        for name, value in values.items():
            await self.client.restore(name, 60_000, value)
        self.book.owners = dict(owners)

    # ---- gateways ------------------------------------------------------------------------------

    def _arrive(self, request_id: str) -> None:
        n = self.random.choice([1, 1, 1, 2])
        gateway = self.random.choice(["g1", "g2"])
        params = SamplingParams(max_tokens=8, seed=1, n=n)
        job = Job(request_id, MODEL, (1, 2, 3), params, gateway, self.prefill_stream, self.decode_stream)
        lengths = tuple(self.random.randint(1, 8) for _ in range(n))
        self.clients[request_id] = Client(job, lengths, Delivery(n), gateway, [[] for _ in range(n)])

    def _gateway(self, name: str) -> Actor:
        submitted: set[str] = set()
        while True:
            mine = [c for c in self.clients.values() if c.gateway == name and c.delivery.end is None]
            for client in mine:
                if client.job.request_id not in submitted:
                    submitted.add(client.job.request_id)
                    yield from self._open(client, name)
            message = yield lambda: self.client.lpop(f"net:{self.keys.tokens(name)}")
            if message is not None and not self._chance(self.faults.lost_event):
                for request_id, entry in _decoded(message):
                    client = self.clients[request_id]
                    if client.gateway == name and client.delivery.accept(entry) is Verdict.REPLAY:
                        yield from self._recover(client, name)
            if message is None and mine and self.random.random() < 0.3:
                yield from self._recover(self.random.choice(mine), name)

    def _open(self, client: Client, name: str) -> Actor:
        """Submit, or adopt when the client came over from a dead gateway."""
        request_id = client.job.request_id
        delivery = client.delivery
        found = yield lambda: self.store.adopt(request_id, name)
        if found is not None and client.gateway == name:
            self._replayed(client, found[1])
            return
        answer = yield lambda: self.book.submit(client.job, delivery.tokens, delivery.emax, delivery.finished)
        if isinstance(answer, Conflict):
            yield from self._recover(client, name)

    def _recover(self, client: Client, name: str) -> Actor:
        request_id = client.job.request_id
        delivery = client.delivery
        if client.cancelled:
            answer = yield lambda: self.book.cancel(request_id, name, self.random.random() < 0.5)
            if answer == "gone" and client.gateway == name:
                delivery.close(End(OUTCOME_CANCELLED))
        polled = yield lambda: self.store.poll(request_id, name)
        if client.gateway != name or client.delivery is not delivery or delivery.end is not None:
            return
        if polled is None:
            yield lambda: self.book.submit(client.job, delivery.tokens, delivery.emax, delivery.finished)
        elif polled.gateway != name:
            yield lambda: self.store.adopt(request_id, name)
        elif self._replayed(client, polled) is Verdict.CONFLICT:
            if polled.state == "done":
                delivery.close(End("error", "stream_conflict"))
            else:
                yield lambda: self.book.repair(request_id, name, delivery.tokens, delivery.emax, delivery.finished)

    def _replayed(self, client: Client, polled: Polled) -> Verdict:
        self._check_journal(client, polled)
        return client.delivery.replay(polled.entries)

    # ---- workers -------------------------------------------------------------------------------

    def _read(self, name: str, stream: str) -> Generator[Call, Any, tuple[str, str] | None]:
        """Next work entry of a stream, now and then one that somebody else got as well."""
        queue = WorkQueue(self.client, self.client, [stream], name)
        yield from self._sweep_own(name, queue)
        if self.last_entries and self._chance(self.faults.duplicate):
            where, entry_id, request_id = self.random.choice(self.last_entries)
            if where == stream:
                return entry_id, request_id
        items = yield lambda: queue.read(1, 0)
        if not items:
            yield from self._sweep_dead(stream)
            return None
        _, entry_id, fields = items[0]
        self.last_entries = [*self.last_entries[-8:], (stream, entry_id, fields["id"])]
        self.processes[name].in_flight.add((stream, entry_id))
        return entry_id, fields["id"]

    def _sweep_own(self, name: str, queue: WorkQueue) -> Actor:
        if self.random.random() < 0.7:
            return
        held = yield queue.pending_own
        for stream, entry_id, request_id in held:
            if request_id is not None and (stream, entry_id) not in self.processes[name].in_flight:
                yield lambda s=stream, e=entry_id, r=request_id: self.book.sweep(s, e, r, False)  # type: ignore[misc]

    def _sweep_dead(self, stream: str) -> Actor:
        """What a peer does: entries of the dead, and sometimes of one that only stands still."""
        suspects = [p.name for p in self.processes.values() if p.paused_until > self.step_number]
        names = [*self.dead, *(name for name in suspects if self.random.random() < 0.2)]
        for name in names:
            held = yield lambda name=name: pending(self.client, stream, name)  # type: ignore[misc]
            for entry_id, request_id in held:
                if request_id is not None:
                    yield lambda e=entry_id, r=request_id: self.book.sweep(stream, e, r, True)  # type: ignore[misc]

    def _new_tokens(self, name: str, lease: Lease, entries: Any, count: int) -> list[Append]:
        """The next tokens of each open choice after the journal, as this worker samples them."""
        client = self.clients[lease.request_id]
        state = fold(entries, client.job.params.n)
        appends = []
        for choice, held in enumerate(state.choices):
            if held.finish is None:
                tokens = self._sampled(name, client, choice, list(held.tokens), count)
                appends.append(Append(lease, tokens))
        return appends

    def _sampled(self, name: str, client: Client, choice: int, held: list[int], count: int) -> Tokens:
        salt = int(name[1:]) if self.divergent else 0
        h_base = h = chain("", held)
        new: list[int] = []
        length = client.lengths[choice]
        while len(held) + len(new) < length and len(new) < count:
            new.append(next_token(h, salt))
            h = chain(h, new[-1:])
        finish = FINISH_LENGTH if len(held) + len(new) >= length else None
        return Tokens(choice, len(held), h_base, h, tuple(new), finish=finish)

    def _prefill(self, name: str) -> Actor:
        stream = self.prefill_stream
        while True:
            item = yield from self._read(name, stream)
            if item is None:
                continue
            entry_id, request_id = item
            nonce = f"{name}_{self.random.getrandbits(32):x}"
            begun = yield lambda i=item, n=nonce: self.book.begin(name, stream, i[0], i[1], n)  # type: ignore[misc]
            if isinstance(begun, Begun):
                yield from self._prefill_one(name, begun)
                self.exports.pop((request_id, begun.epoch, nonce), None)
            self.processes[name].in_flight.discard((stream, entry_id))

    def _prefill_one(self, name: str, begun: Begun) -> Actor:
        lease = begun.lease
        offered = yield lambda: self.book.offer(lease)
        if isinstance(offered, Refused):
            return
        appends = self._new_tokens(name, lease, begun.entries, 1)
        for append in appends:
            results = yield lambda a=append: self.book.append([a])  # type: ignore[misc]
            if isinstance(results[0], Refused | Cancelled) or results[0] == Appended(done=True):
                return
        self.exports[lease.request_id, lease.epoch, lease.nonce] = [append.tokens for append in appends]
        while True:
            touched = yield lambda: self.book.touch(lease)
            if not touched.owner:
                return
            if not touched.offer_live:
                yield lambda: self.book.offer(lease)
            elif self.random.random() < 0.02 and self.faults.steps:
                yield lambda: self.book.requeue(lease)

    def _decode(self, name: str) -> Actor:
        stream = self.decode_stream
        while True:
            item = yield from self._read(name, stream)
            if item is None:
                continue
            entry_id, _ = item
            offer = yield lambda i=item: self.store.take(stream, *i)  # type: ignore[misc]
            if isinstance(offer, Offer):
                yield from self._decode_one(name, offer)
            self.processes[name].in_flight.discard((stream, entry_id))

    def _decode_one(self, name: str, offer: Offer) -> Actor:
        key = (offer.request_id, offer.epoch, offer.nonce)
        for _ in range(20):
            is_ready = key in self.exports or self._exporter(key) not in self.processes
            if is_ready and self.random.random() < 0.3:
                break
            yield self._pull_frame
        emitted = self.exports.get(key)
        if emitted is None:
            yield lambda: self.book.sweep(offer.stream, offer.entry, offer.request_id, False)
            return
        owner = f"{name}:{self.random.getrandbits(32):x}"
        committed = yield lambda: self.book.commit(offer, owner, emitted)
        if not isinstance(committed, Committed):
            return
        client = self.clients[offer.request_id]
        held = {c: list(state.tokens) for c, state in enumerate(fold(offer.entries, client.job.params.n).choices)}
        for tokens in emitted:
            held[tokens.choice] = [*held[tokens.choice][: tokens.base], *tokens.tokens]
        yield from self._decode_rest(
            name, committed.lease, client, held, {t.choice for t in emitted if t.finish is None}
        )

    async def _pull_frame(self) -> None:
        """A step of the transfer, which is no business of the bus."""

    def _decode_rest(
        self, name: str, lease: Lease, client: Client, held: dict[int, list[int]], open_choices: set[int]
    ) -> Actor:
        while open_choices:
            count = self.random.randint(1, 3)
            appends = [Append(lease, self._sampled(name, client, c, held[c], count)) for c in sorted(open_choices)]
            results = yield lambda a=appends: self.book.append(a)  # type: ignore[misc]
            for append, result in zip(appends, results, strict=True):
                if isinstance(result, Refused | Cancelled):
                    return
                tokens = append.tokens
                if isinstance(result, Appended):
                    held[tokens.choice] += tokens.tokens
                elif result.h != chain("", [*held[tokens.choice], *tokens.tokens][: result.n]):
                    return
                else:
                    held[tokens.choice] = [*held[tokens.choice], *tokens.tokens][: result.n]
                if isinstance(result, Appended) and tokens.finish is not None:
                    open_choices.discard(tokens.choice)

    # ---- checks --------------------------------------------------------------------------------

    def _check_journal(self, client: Client, polled: Polled) -> None:
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
        """Exactly one stream entry stands for each live request."""
        for client in self.clients.values():
            request_id = client.job.request_id
            fields: dict[bytes, bytes] = await self.client.hgetall(self.keys.request(request_id))  # type: ignore[assignment]
            if fields.get(b"state", b"done") == b"done":
                continue
            entry = fields[b"entry"]
            found: Any = await self.client.xrange(fields[b"stream"], entry, entry) if entry else []
            if len(found) != 1 or found[0][1][b"id"] != request_id.encode():
                raise Violation(f"{request_id}: no entry stands for it in state {fields[b'state'].decode()}")

    async def _check_end(self) -> None:
        for client in self.clients.values():
            self._check_client(client)
        await self.check_standing()
        if not await self._is_idle():
            raise Violation("work entries are left though every request has ended")

    def _check_client(self, client: Client) -> None:
        request_id = client.job.request_id
        if len(client.ends) != 1:
            raise Violation(f"{request_id}: {len(client.ends)} terminal events after {self.step_number} steps")
        end = client.ends[0]
        for tokens in client.got:
            self._check_tokens(client, tokens)
        if end.outcome == OUTCOME_FINISHED:
            if tuple(len(tokens) for tokens in client.got) != client.lengths:
                raise Violation(f"{request_id}: finished with {client.got} of lengths {client.lengths}")
        elif end.outcome == OUTCOME_CANCELLED:
            if not client.cancelled:
                raise Violation(f"{request_id}: cancelled though nobody asked for it")
        elif not (self.divergent and self.lossy and end.code == "stream_conflict"):
            raise Violation(f"{request_id}: ended in {end.code}")

    async def _is_idle(self) -> bool:
        """No work entry is left, standing or stale."""
        counts = [await self.client.xlen(stream) for stream in (self.prefill_stream, self.decode_stream)]
        return sum(counts) == 0


def _escaped(prefix: str) -> str:
    return prefix.replace("[", "\\[").replace("*", "\\*").replace("?", "\\?")
