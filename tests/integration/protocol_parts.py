"""What the protocol model is made of: faults, clients, processes, and the tokens they should get."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from shared.bus.delivery import Delivery
from shared.bus.script import Script
from shared.protocol.messages import End, Job, Tokens
from tests.integration.protocol_book import Violation

MODEL = "m"
Call = Callable[[], Awaitable[Any]]
Actor = Generator[Call, Any, None]


@dataclass(frozen=True)
class Faults:
    """Probabilities of each fault at each step; all faults end after `steps` steps."""

    crash: float = 0.01
    pause: float = 0.01
    gateway_crash: float = 0.003
    lost_reply: float = 0.03
    duplicate: float = 0.02
    lost_event: float = 0.1
    restore: float = 0.004
    wipe: float = 0.001
    cancel: float = 0.002
    steps: int = 160


NO_FAULTS = Faults(0, 0, 0, 0, 0, 0, 0, 0, 0, steps=0)


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
    """One client's request: what it asked for and what it got, over all its gateways."""

    job: Job
    lengths: tuple[int, ...]
    delivery: Delivery
    gateway: str
    got: list[list[int]] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    cancelled: bool = False

    def drain(self) -> None:
        """Hand over what the gateway has; a resumed stream must repeat what was already got."""
        while self.delivery.out:
            _, event = self.delivery.out.popleft()
            if isinstance(event, End):
                self.ends.append(event)
            else:
                self._take(event)

    def _take(self, event: Tokens) -> None:
        got = self.got[event.choice]
        held = got[event.base : event.base + len(event.tokens)]
        if event.base > len(got) or list(event.tokens[: len(held)]) != held:
            raise Violation(f"{self.job.request_id}: a gap, or other tokens than before, at {event.base}")
        got.extend(event.tokens[len(held) :])


@dataclass
class Process:
    """A simulated process: its actor, what it waits for, and whether it stands still."""

    name: str
    role: str
    actor: Actor
    waiting: Call | None = None
    paused_until: int = 0
    in_flight: set[tuple[str, str]] = field(default_factory=set)
