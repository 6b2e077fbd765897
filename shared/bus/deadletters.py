"""The notes of requests that were given up because their workers kept dying. They hold no prompt and no answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from redis.asyncio import Redis

from shared.bus.connection import as_text
from shared.protocol.keys import Keys

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Which request, where it stood at its last death, and when that was, in milliseconds by Redis' clock.

    `deaths` are those since the last progress, `kills` those of its whole life; `tokens` it had by then.
    """

    id: str
    reason: str
    deaths: int
    kills: int
    epoch: int
    model: str
    role: str
    prompt: int
    tokens: int
    time: int
    gateway: str


async def dead_letters(client: Redis, keys: Keys) -> list[DeadLetter]:
    """The latest notes, oldest first; Redis keeps about a thousand."""
    entries = await client.xrevrange(keys.dead, count=_PAGE)
    return [_letter(fields) for _, fields in reversed(entries or []) if fields is not None]


async def clear_dead_letters(client: Redis, keys: Keys) -> int:
    """Forget all notes; how many there were."""
    count = int(await client.xlen(keys.dead))
    await client.delete(keys.dead)
    return count


def _letter(fields: Mapping[bytes | str, bytes | str]) -> DeadLetter:
    values = {as_text(name): value for name, value in fields.items()}

    def text(name: str) -> str:
        value = values.get(name, "")
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    def number(name: str) -> int:
        value = text(name)
        return int(value) if value.isdecimal() else 0

    return DeadLetter(
        id=text("id"),
        reason=text("reason"),
        deaths=number("deaths"),
        kills=number("kills"),
        epoch=number("epoch"),
        model=text("model"),
        role=text("role"),
        prompt=number("prompt"),
        tokens=number("tokens"),
        time=number("time"),
        gateway=text("gateway"),
    )
