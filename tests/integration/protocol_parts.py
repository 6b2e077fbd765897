"""What the protocol model is made of: faults, clients, processes, and the tokens they should get."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.bus.delivery import Delivery
from shared.bus.script import Script
from shared.protocol.messages import End, Job, JournalEntry, Tokens
from shared.protocol.position import START, Position, Standing, standing
from tests.integration.protocol_book import Violation

MODEL = "m"
Call = Callable[[], Awaitable[Any]]
Actor = Generator[Call, Any, None]


class Killed(Exception):
    """The request at hand kills the worker process."""


@dataclass(frozen=True)
class Faults:
    """Probabilities of each fault at each step, and what the requests are like; all faults end after `steps` steps."""

    crash: float = 0.01
    pause: float = 0.01
    gateway_crash: float = 0.003
    reconnect: float = 0.003
    leave: float = 0.2
    lost_reply: float = 0.03
    duplicate: float = 0.02
    lost_event: float = 0.1
    restore: float = 0.0
    wipe: float = 0.0
    expire: float = 0.0
    overdue: float = 0.0
    cancel: float = 0.002
    drain: float = 0.02
    steps: int = 160
    max_choices: int = 3
    stops: float = 0.3


_SILENT: Any = dict.fromkeys(("crash", "pause", "gateway_crash", "reconnect", "leave", "lost_reply", "duplicate"), 0.0)
_SILENT |= dict.fromkeys(("lost_event", "restore", "wipe", "expire", "overdue", "cancel", "drain"), 0.0)
NO_FAULTS = Faults(**_SILENT, steps=0)


def redirected(name: str, change: Callable[[str], str] = lambda text: text) -> Script:
    """The shipped script with its publications put on a list instead of the network."""
    text = Script(name).text
    publish = "redis.call('PUBLISH', channel,"
    assert publish in text
    return Script(name, change(text.replace(publish, "redis.call('RPUSH', 'net:' .. channel,")))


def next_token(h: str, salt: int) -> int:
    """What a worker of numerics `salt` samples after a sequence of hash `h`."""
    return int.from_bytes(hashlib.blake2b(f"{salt}:{h}".encode(), digest_size=2).digest(), "little")


@dataclass
class Client:
    """One client's request: what it asked for and what it got, over all its gateways.

    `lengths`: tokens of each choice until the model ends it. `stops`: choices in which a gateway finds a stop string,
    with the length at which it does. `poison`: the state and the length at which the request kills its worker.
    """

    job: Job
    lengths: tuple[int, ...]
    delivery: Delivery
    gateway: str
    got: list[list[int]] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    stops: dict[int, int] = field(default_factory=dict)
    poison: tuple[str, int] | None = None
    position: Position = START
    is_open: bool = False
    cancelled: bool = False
    overdue: bool = False
    has_left: bool = False
    away_until: int = 0
    restarts: int = 0
    _after: Position = START
    _seen: int = 0
    _repeats: bool = False

    @property
    def is_reading(self) -> bool:
        return not self.ends and not self.has_left

    def move(self, gateway: str, job: Job, away_until: int = 0) -> None:
        """The connection broke: read on at another gateway, after the position that came last."""
        self.gateway, self.job, self.away_until = gateway, job, away_until
        self.delivery = Delivery(job.params.n)
        self.is_open = False
        self._after, self._seen = self.position, 0

    def resume(self, entries: Sequence[JournalEntry], *, may_be_lost: bool, from_start: bool = False) -> None:
        """The new gateway reads the journal: it knows the position, or the client starts from the first event."""
        is_known = standing(self._after, entries, len(self.lengths)) is Standing.KNOWN
        if not is_known and not may_be_lost:
            raise Violation(f"{self.job.request_id}: nothing was lost, yet the position {self._after} is unknown")
        if from_start or not is_known:
            self.restart()

    def restart(self) -> None:
        """Read everything again; what comes must repeat what is held."""
        self._after, self._repeats = START, True
        self.restarts += 1

    def forget(self) -> None:
        """The request is gone with its gateway: ask again from scratch."""
        self.got = [[] for _ in self.lengths]
        self.position, self._after, self._repeats = START, START, False

    def open_stops(self) -> dict[int, tuple[int, str]]:
        """{choice: (length, hash there)} of the stop strings found and not yet journaled."""
        choices = self.delivery.choices
        return {
            choice: (length, choices[choice].hash_at(length))
            for choice, length in self.stops.items()
            if choices[choice].finish is None and len(choices[choice].tokens) >= length
        }

    def drain(self) -> None:
        """Hand over what the gateway has beyond the position the client came with."""
        history = self.delivery.history
        while self._seen < len(history):
            position, event = history[self._seen]
            self._seen += 1
            if isinstance(event, End):
                self.ends.append(event)
            elif position > self._after:
                self._take(event)
                self.position = position

    def _take(self, event: Tokens) -> None:
        """Exactly the next tokens; after a restart from the first event also what is held already."""
        got = self.got[event.choice]
        is_cut = not event.tokens and event.choice in self.stops
        if event.base > len(got) or (event.base < len(got) and not (is_cut or self._repeats)):
            raise Violation(f"{self.job.request_id}: an event at {event.base} follows {len(got)} tokens")
        held = got[event.base : event.base + len(event.tokens)]
        if list(event.tokens[: len(held)]) != held:
            raise Violation(f"{self.job.request_id}: other tokens than before at {event.base}")
        got.extend(event.tokens[len(held) :])

    def check_lengths(self) -> None:
        """Of a request that finished: every choice came to its end, or at least to its stop string."""
        for choice, (tokens, length) in enumerate(zip(self.got, self.lengths, strict=True)):
            least = min(length, self.stops.get(choice, length))
            if not least <= len(tokens) <= length:
                raise Violation(f"{self.job.request_id}: choice {choice} finished with {len(tokens)} of {length}")


@dataclass
class Slot:
    """One loop of a process: its actor and what it waits for."""

    actor: Actor
    waiting: Call | None = None


@dataclass
class Process:
    """A simulated process, whether it stands still, and who is in the dangerous start of a request."""

    name: str
    role: str
    slots: list[Slot] = field(default_factory=list)
    paused_until: int = 0
    in_flight: set[tuple[str, str]] = field(default_factory=set)
    starting: set[str] = field(default_factory=set)
    suspects_waiting: set[str] = field(default_factory=set)

    def may_start(self, request_id: str, is_suspect: bool) -> bool:
        """A suspect starts alone, and before ordinary requests that come later."""
        if is_suspect:
            self.suspects_waiting.add(request_id)
            if self.starting:
                return False
            self.suspects_waiting.discard(request_id)
            self.starting.add(f"!{request_id}")
            return True
        if self.suspects_waiting or any(name.startswith("!") for name in self.starting):
            return False
        self.starting.add(request_id)
        return True

    def started(self, request_id: str) -> None:
        self.starting -= {request_id, f"!{request_id}"}
