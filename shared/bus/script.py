"""A Lua script on the server: what it shares with others in front of its own text, called by its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError

from shared.bus.lane import Arg, Lane

_FOLDER = Path(__file__).with_name("scripts")
_SHARED = ("common",)
_SHARED_BY = {"append": ("steady", "common")}


@cache
def _source(name: str) -> str:
    return (_FOLDER / f"{name}.lua").read_text(encoding="utf-8")


def parts(name: str) -> tuple[str, ...]:
    """The files a script is made of, in order; its own is the last."""
    return (*_SHARED_BY.get(name, _SHARED), name)


class Script:
    """One script; `text` may be overridden by tests that break a compare on purpose."""

    def __init__(self, name: str, text: str | None = None) -> None:
        self.name = name
        self.text = text if text is not None else "".join(map(_source, parts(name)))
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, client: Redis, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        try:
            return await client.evalsha(self.sha, len(keys), *keys, *args)
        except NoScriptError:
            await client.script_load(self.text)
            return await client.evalsha(self.sha, len(keys), *keys, *args)

    async def by_lane(self, lane: Lane, client: Redis, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """The same over a lane; where its connection was cut or the script is missing, again over `client`."""
        try:
            return await lane.call(self.sha, keys, args)
        except (RedisConnectionError, NoScriptError):
            return await self(client, keys, args)

    async def pipeline(self, client: Redis, calls: Sequence[tuple[Sequence[str], Sequence[Arg]]]) -> list[Any]:
        """Several calls in one round trip; loads the script and repeats only calls that found it missing."""
        replies = await self._send(client, calls)
        missing = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            await client.script_load(self.text)
            again = await self._send(client, [calls[i] for i in missing])
            for i, reply in zip(missing, again, strict=True):
                replies[i] = reply
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def _send(self, client: Redis, calls: Sequence[tuple[Sequence[str], Sequence[Arg]]]) -> list[Any]:
        if len(calls) == 1:
            keys, args = calls[0]
            return [await self(client, keys, args)]
        async with client.pipeline(transaction=False) as pipe:
            for keys, args in calls:
                pipe.evalsha(self.sha, len(keys), *keys, *args)
            return list(await pipe.execute(raise_on_error=False))
