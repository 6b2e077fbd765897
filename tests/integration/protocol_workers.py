"""The workers of the protocol model: prefill, decode, and the sweeps each of them does."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from shared.bus.requests import Append
from shared.bus.results import Appended, Begun, Cancelled, Committed, Lease, Offer, Refused, Touched
from shared.bus.workqueue import WorkQueue, pending
from shared.protocol.journal import chain, fold
from shared.protocol.messages import FINISH_LENGTH, JournalEntry, Tokens
from tests.integration.protocol_parts import Actor, Call, Client, Killed, Process, next_token

if TYPE_CHECKING:
    from tests.integration.protocol_model import World

ORPHAN_GRACE = 60
"""Steps that a gateway must have been dead before its requests are ended."""


class Workers:
    """Actors of one slot of a worker each; the slots of a process die together."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._last_entries: list[tuple[str, str, str]] = []

    # ---- reading and sweeping ------------------------------------------------------------------

    def _read(self, process: Process, stream: str) -> Generator[Call, Any, tuple[str, str, bool] | None]:
        """Next work entry of a stream, now and then one that somebody else got as well; and whether it is a suspect."""
        world = self._world
        queue = WorkQueue(world.client, world.client, [stream], process.name)
        yield from self._sweep_own(process, queue)
        if self._last_entries and world.chance(world.faults.duplicate):
            where, entry_id, request_id = world.random.choice(self._last_entries)
            if where == stream:
                return entry_id, request_id, False
        items = yield lambda: queue.read(1, 0)
        if not items:
            yield from self._sweep_dead(stream)
            return None
        _, entry_id, fields = items[0]
        self._last_entries = [*self._last_entries[-8:], (stream, entry_id, fields["id"])]
        process.in_flight.add((stream, entry_id))
        return entry_id, fields["id"], int(fields.get("deaths", 0)) > 0

    def _sweep_own(self, process: Process, queue: WorkQueue) -> Actor:
        world = self._world
        if world.random.random() < 0.7:
            return
        held = yield queue.pending_own
        for stream, entry_id, request_id in held:
            if request_id is not None and (stream, entry_id) not in process.in_flight:
                yield lambda s=stream, e=entry_id, r=request_id: world.book.sweep(s, e, r, False)  # type: ignore[misc]

    def _sweep_dead(self, stream: str) -> Actor:
        """What a peer does: entries of the dead, and sometimes of one that only stands still."""
        world = self._world
        suspects = [p.name for p in world.processes.values() if p.paused_until > world.step_number]
        for name in [*world.dead, *(name for name in suspects if world.chance(0.2))]:
            held = yield lambda name=name: pending(world.client, stream, name)  # type: ignore[misc]
            for entry_id, request_id in held:
                if request_id is not None:
                    yield lambda e=entry_id, r=request_id: world.book.sweep(stream, e, r, True)  # type: ignore[misc]

    def _start(self, process: Process, request_id: str, is_suspect: bool) -> Actor:
        """Wait until the request may enter its dangerous phase in this process."""
        while not process.may_start(request_id, is_suspect):
            yield self._pause

    def _touch(self, lease: Lease) -> Generator[Call, Any, Touched]:
        """Ask whether it is still ours; end it when its gateway has long been dead."""
        world = self._world
        touched: Touched = yield lambda: world.book.touch(lease)
        died = world.dead_gateways.get(touched.gateway)
        if touched.owner and died is not None and world.step_number - died >= ORPHAN_GRACE:
            yield lambda: world.book.orphan(lease.request_id, touched.gateway, world.gateways)
        return touched

    async def _pause(self) -> None:
        """Nothing for the bus to do, but time passes."""

    # ---- sampling ------------------------------------------------------------------------------

    def _sampled(self, name: str, client: Client, choice: int, held: list[int], count: int) -> Tokens:
        salt = int(name[1:]) if self._world.divergent else 0
        h_base = h = chain("", held)
        new: list[int] = []
        length = client.lengths[choice]
        while len(held) + len(new) < length and len(new) < count:
            new.append(next_token(h, salt))
            h = chain(h, new[-1:])
        finish = FINISH_LENGTH if len(held) + len(new) >= length else None
        return Tokens(choice, len(held), h_base, h, tuple(new), finish=finish)

    def _first_tokens(self, name: str, lease: Lease, entries: Sequence[JournalEntry]) -> list[Append]:
        """The next token of each open choice after the journal."""
        client = self._world.clients[lease.request_id]
        return [
            Append(lease, self._sampled(name, client, choice, list(held.tokens), 1))
            for choice, held in enumerate(fold(entries, client.job.params.n).choices)
            if held.finish is None
        ]

    # ---- prefill -------------------------------------------------------------------------------

    def prefill(self, process: Process) -> Actor:
        world, stream, name = self._world, self._world.prefill_stream, process.name
        while True:
            item = yield from self._read(process, stream)
            if item is None:
                continue
            entry_id, request_id, is_suspect = item
            yield from self._start(process, request_id, is_suspect)
            nonce = f"{name}_{world.random.getrandbits(32):x}"
            begun = yield lambda i=item, n=nonce: world.book.begin(name, stream, i[0], i[1], n)  # type: ignore[misc]
            if isinstance(begun, Begun):
                yield from self._prefill_one(process, begun)
                world.exports.pop((request_id, begun.epoch, nonce), None)
            process.started(request_id)
            process.in_flight.discard((stream, entry_id))

    def _prefill_one(self, process: Process, begun: Begun) -> Actor:
        world, lease = self._world, begun.lease
        if world.clients[lease.request_id].poison == ("prefill", 0):
            raise Killed(lease.request_id)
        offered = yield lambda: world.book.offer(lease)
        if isinstance(offered, Refused):
            return
        appends = self._first_tokens(process.name, lease, begun.entries)
        for append in appends:
            results = yield lambda a=append: world.book.append([a])  # type: ignore[misc]
            if isinstance(results[0], Refused) or results[0] in (Cancelled(), Appended(done=True)):
                return
        process.started(lease.request_id)
        world.exports[lease.request_id, lease.epoch, lease.nonce] = [append.tokens for append in appends]
        while (touched := (yield from self._touch(lease))).owner:
            if not touched.offer_live:
                yield lambda: world.book.offer(lease)
            elif world.chance(world.faults.drain):
                yield lambda: world.book.requeue(lease)

    # ---- decode --------------------------------------------------------------------------------

    def decode(self, process: Process) -> Actor:
        world, stream = self._world, self._world.decode_stream
        while True:
            item = yield from self._read(process, stream)
            if item is None:
                continue
            entry_id, request_id, _ = item
            offer = yield lambda i=item: world.store.take(stream, i[0], i[1])  # type: ignore[misc]
            if isinstance(offer, Offer):
                yield from self._start(process, request_id, offer.deaths > 0)
                yield from self._decode_one(process, offer)
            process.started(request_id)
            process.in_flight.discard((stream, entry_id))

    def _decode_one(self, process: Process, offer: Offer) -> Actor:
        world, key = self._world, (offer.request_id, offer.epoch, offer.nonce)
        for _ in range(20):
            is_ready = key in world.exports or world.exporter(key) not in world.processes
            if is_ready and world.random.random() < 0.3:
                break
            yield self._pause
        emitted = world.exports.get(key)
        if emitted is None:
            yield lambda: world.book.sweep(offer.stream, offer.entry, offer.request_id, False)
            return
        owner = f"{process.name}:{world.random.getrandbits(32):x}"
        committed = yield lambda: world.book.commit(offer, owner, emitted)
        if not isinstance(committed, Committed):
            return
        state = fold(offer.entries, world.clients[offer.request_id].job.params.n)
        held = {choice: list(known.tokens) for choice, known in enumerate(state.choices)}
        for tokens in emitted:
            held[tokens.choice] = [*held[tokens.choice][: tokens.base], *tokens.tokens]
        open_choices = {tokens.choice for tokens in emitted if tokens.finish is None}
        yield from self._decode_rest(process, committed.lease, held, open_choices)

    def _decode_rest(self, process: Process, lease: Lease, held: dict[int, list[int]], choices: set[int]) -> Actor:
        world, client = self._world, self._world.clients[lease.request_id]
        while choices:
            if client.poison is not None and client.poison[0] == "decode" and len(held[0]) >= client.poison[1]:
                raise Killed(lease.request_id)
            count = world.random.randint(1, 3)
            appends = [
                Append(lease, self._sampled(process.name, client, choice, held[choice], count))
                for choice in sorted(choices)
            ]
            results = yield lambda a=appends: world.book.append(a)  # type: ignore[misc]
            if not self._taken(appends, results, held, choices):
                return
            process.started(lease.request_id)
            if world.chance(world.faults.drain):
                yield lambda: world.book.requeue(lease)
                return
            if world.chance(0.1) and not (yield from self._touch(lease)).owner:
                return

    @staticmethod
    def _taken(appends: list[Append], results: list[Any], held: dict[int, list[int]], choices: set[int]) -> bool:
        """Note what was journaled of each choice; False when the sequence is not ours any more."""
        for append, result in zip(appends, results, strict=True):
            tokens, mine = append.tokens, [*held[append.tokens.choice], *append.tokens.tokens]
            if result == Cancelled(choice_only=True):
                choices.discard(tokens.choice)
            elif isinstance(result, Refused | Cancelled):
                return False
            elif isinstance(result, Appended):
                held[tokens.choice] = mine
                if tokens.finish is not None:
                    choices.discard(tokens.choice)
            elif result.h != chain("", mine[: result.n]):
                return False
            else:
                held[tokens.choice] = mine[: result.n]
        return True
