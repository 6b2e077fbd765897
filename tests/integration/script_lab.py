"""Scripts with one condition removed: how a condition is found in the text, and how it is taken out.

A `Mutation` replaces one exact fragment of one script's text. What differs between the fragment and its replacement is
what it takes out, so several mutations may share a long fragment and each stands for its own condition.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from redis.asyncio import Redis

from shared.bus import script
from shared.bus.requests import SCRIPTS, RequestStore
from shared.bus.script import Script
from shared.protocol.keys import Keys
from shared.protocol.messages import Usage
from tests.integration.bus_helpers import Bench

FOLDER = Path(script.__file__).with_name("scripts")
NAMES = sorted(path.stem for path in FOLDER.glob("*.lua"))
USAGE = Usage(transport="shm", kv_bytes=7)

_TESTED = re.compile(r"\b(?:if|elseif|while)\s+(.*?)\s+(?:then|do)\b", re.DOTALL)
_ASSIGNED = re.compile(
    r"(?:\breturn|[^=~<>]=)\s+([^\n]*?(?: == | ~= | < | > | <= | >= |\band\b)[^\n]*?)(?= end\b|$)", re.M
)
_LOOSE = re.compile(r"[\w.\[\]]+ (?:==|~=|<|>|<=|>=) [\w.\[\]']+")
_JOINT = re.compile(r"\s+(and|or)\s+")
_COMPARES = re.compile(r" (?:==|~=|<|>|<=|>=) ")


def source(name: str) -> str:
    return (FOLDER / f"{name}.lua").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Condition:
    """One comparison of a script: its text and where it stands."""

    script: str
    text: str
    start: int
    end: int


def conditions(name: str) -> list[Condition]:
    """Every comparison of a script: the operands of `and` and `or` in what is tested, returned or assigned."""
    text = re.sub(r"--[^\n]*", lambda match: " " * len(match.group()), source(name))
    found = {span for match in _TESTED.finditer(text) for span in _operands(match, is_test=True)}
    found |= {span for match in _ASSIGNED.finditer(text) for span in _operands(match, is_test=False)}
    loose = {match.span() for match in _LOOSE.finditer(text)}
    found |= {(start, end) for start, end in loose if not any(a <= start < b for a, b in found)}
    return [Condition(name, text[start:end], start, end) for start, end in sorted(found)]


def _operands(match: re.Match[str], *, is_test: bool) -> Iterator[tuple[int, int]]:
    """Spans of the operands; of a value that is assigned only those that decide, not the values chosen between."""
    first, inside, at = match.start(1), match.group(1), 0
    for joint in [*_JOINT.finditer(inside), None]:
        end = joint.start() if joint else len(inside)
        decides = is_test or _COMPARES.search(inside[at:end]) or (joint is not None and joint.group(1) == "and")
        if decides:
            yield first + at, first + end
        at = joint.end() if joint else end


@dataclass(frozen=True)
class Mutation:
    """One condition of a script made to let everything pass, and the scenario that must notice.

    `crashes`: the script, or whoever reads its answer, is then expected to fall over instead of answering wrongly.
    """

    script: str
    fragment: str
    instead: str
    scenario: Callable[[Lab], Awaitable[None]]
    crashes: bool = False

    @property
    def name(self) -> str:
        return f"{self.script}: {self.fragment} → {self.instead}".replace("\n", " ")

    def apply(self, text: str) -> str:
        count = text.count(self.fragment)
        assert count == 1, f"{self.script}.lua has {count} places that read {self.fragment!r}, it should be one"
        return text.replace(self.fragment, self.instead)

    def takes_out(self, condition: Condition) -> bool:
        """Whether the text it changes lies within that condition."""
        if condition.script != self.script:
            return False
        at = source(self.script).find(self.fragment)
        same = 0
        while self.fragment[same : same + 1] == self.instead[same : same + 1] != "":
            same += 1
        tail = 0
        while (
            tail < min(len(self.fragment), len(self.instead)) - same
            and self.fragment[-1 - tail] == self.instead[-1 - tail]
        ):
            tail += 1
        start, end = at + same, at + len(self.fragment) - tail
        return start < condition.end and condition.start < max(end, start + 1)


@dataclass
class Lab(Bench):
    """A bench whose scripts may be broken by one mutation, with hands for what no script does."""

    mutation: Mutation | None = None

    @classmethod
    def with_mutation(cls, client: Redis, keys: Keys, mutation: Mutation | None) -> Self:
        lab = cls(client, keys, RequestStore(client, keys), mutation=mutation)
        for name in SCRIPTS:
            lab.store.scripts[name] = lab.script(name)
        return lab

    def script(self, name: str) -> Script:
        return Script(name, "".join(map(self._part, script.parts(name))))

    def _part(self, name: str) -> str:
        if self.mutation is not None and self.mutation.script == name:
            return self.mutation.apply(source(name))
        return source(name)

    async def set(self, name: str, value: str | int, request_id: str = "r") -> None:
        await self.client.hset(self.keys.request(request_id), name, str(value))

    async def overdue(self) -> None:
        """The request's deadline has passed."""
        await self.set("deadline", 1)

    async def forget(self, *, request: bool = False, journal: bool = False) -> None:
        """Redis expired the request, its journal, or both."""
        if request:
            await self.client.delete(self.keys.request("r"))
        if journal:
            await self.client.delete(self.keys.log("r"))

    async def is_gone(self) -> bool:
        return await self.client.exists(self.keys.request("r"), self.keys.log("r")) == 0

    async def lifetimes(self) -> tuple[int, int]:
        """Milliseconds that the request and its journal live on; -1: for ever, -2: gone."""
        return (
            await self.client.pttl(self.keys.request("r")),
            await self.client.pttl(self.keys.log("r")),
        )

    async def nearly_expired(self) -> None:
        for key in (self.keys.request("r"), self.keys.log("r")):
            await self.client.pexpire(key, 10_000)
