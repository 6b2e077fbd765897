"""A TCP proxy that misbehaves on demand, in the event loop of whoever uses it.

Each direction has a behaviour that can be changed while connections are open. Faults that end after a number of
times (`cut`, `flip`, `duplicate`, `drop`) go back to passing by themselves.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, replace
from enum import StrEnum
from types import TracebackType
from typing import Self

from tests.faults.ports import free_port

_CHUNK = 64 * 1024


class Direction(StrEnum):
    REQUEST = "request"  # from whoever connects
    REPLY = "reply"  # back to it


class Kind(StrEnum):
    PASS = "pass"
    DELAY = "delay"  # each piece comes late, up to twice `seconds`
    THROTTLE = "throttle"  # `rate` bytes a second
    HOLE = "hole"  # nothing passes and nobody is told; it comes when the behaviour ends, as TCP would repeat it
    DROP = "drop"  # the piece is lost for good
    RESET = "reset"  # connections are reset, new ones too
    CUT = "cut"  # reset after `at` bytes
    FLIP = "flip"  # one bit of the byte at `at` is inverted
    DUPLICATE = "duplicate"  # the piece comes twice


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What one direction does.

    `at` counts bytes of one connection since the behaviour was set. `after_request` and `with_reply` narrow CUT to a
    reply that contains the one and comes after a request that contained the other: the moment between a write and its
    answer. `times` bounds how often CUT, FLIP, DUPLICATE and DROP act.
    """

    kind: Kind = Kind.PASS
    seconds: float = 0.0
    rate: int = 0
    at: int = 0
    times: int = 1
    after_request: bytes = b""
    with_reply: bytes = b""


PASSING = Behaviour()


@dataclass(slots=True, eq=False)
class _Connection:
    """Both halves of one client's connection."""

    writers: dict[Direction, asyncio.StreamWriter]
    seen: dict[Direction, int]
    asked: bytes = b""

    def abort(self) -> None:
        for writer in self.writers.values():
            writer.transport.abort()


class Proxy:
    """Listens on `port` and forwards to `target_port`, both on loopback; an async context manager."""

    def __init__(self, target_port: int, seed: int = 0) -> None:
        self.port = free_port()
        self.counts: Counter[str] = Counter()
        self._target_port = target_port
        self._random = random.Random(seed)
        self._behaviours = dict.fromkeys(Direction, PASSING)
        self._changed = asyncio.Event()
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.reset_connections()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    def behave(self, behaviour: Behaviour, *directions: Direction) -> None:
        """Change these directions, or both, from now on; counting begins anew."""
        for direction in directions or tuple(Direction):
            self._behaviours[direction] = behaviour
            for connection in self._connections:
                connection.seen[direction] = 0
        self._changed.set()
        self._changed = asyncio.Event()
        if behaviour.kind is Kind.RESET:
            self.reset_connections()

    def heal(self) -> None:
        self.behave(PASSING)

    def reset_connections(self) -> None:
        for connection in list(self._connections):
            connection.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.counts["connections"] += 1
        if Kind.RESET in (behaviour.kind for behaviour in self._behaviours.values()):
            writer.transport.abort()
            return
        try:
            upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection({Direction.REQUEST: upstream, Direction.REPLY: writer}, dict.fromkeys(Direction, 0))
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(connection, Direction.REQUEST, reader))
                group.create_task(self._pump(connection, Direction.REPLY, upstream_reader))
        except* OSError:
            pass
        finally:
            connection.abort()
            self._connections.discard(connection)

    async def _pump(self, connection: _Connection, direction: Direction, reader: asyncio.StreamReader) -> None:
        writer = connection.writers[direction]
        while data := await reader.read(_CHUNK):
            self.counts[f"{direction}_bytes"] += len(data)
            data = await self._treat(connection, direction, data)
            connection.seen[direction] += len(data)
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    async def _treat(self, connection: _Connection, direction: Direction, data: bytes) -> bytes:
        """What becomes of one piece; raises ConnectionResetError for a cut."""
        behaviour = self._behaviours[direction]
        if direction is Direction.REQUEST:
            connection.asked = data
        match behaviour.kind:
            case Kind.DELAY:
                await asyncio.sleep(behaviour.seconds * 2 * self._random.random())
            case Kind.THROTTLE:
                await asyncio.sleep(len(data) / behaviour.rate)
            case Kind.HOLE:
                self.counts[behaviour.kind] += 1
                while self._behaviours[direction].kind is Kind.HOLE:
                    await self._changed.wait()
            case Kind.DROP:
                self._act(direction)
                return b""
            case Kind.DUPLICATE:
                self._act(direction)
                return data + data
            case Kind.FLIP if connection.seen[direction] + len(data) > behaviour.at:
                self._act(direction)
                return _flipped(data, max(0, behaviour.at - connection.seen[direction]))
            case Kind.CUT if self._is_cut(connection, direction, behaviour, data):
                self._act(direction)
                rest = max(0, behaviour.at - connection.seen[direction])
                connection.writers[direction].write(data[:rest])
                connection.abort()
                raise ConnectionResetError
            case _:
                pass
        return data

    def _is_cut(self, connection: _Connection, direction: Direction, behaviour: Behaviour, data: bytes) -> bool:
        if connection.seen[direction] + len(data) <= behaviour.at:
            return False
        return behaviour.with_reply in data and behaviour.after_request in connection.asked

    def _act(self, direction: Direction) -> None:
        """Count one action, and pass from now on when that was the last."""
        behaviour = self._behaviours[direction]
        self.counts[behaviour.kind] += 1
        self._behaviours[direction] = PASSING if behaviour.times <= 1 else replace(behaviour, times=behaviour.times - 1)


def _flipped(data: bytes, index: int) -> bytes:
    changed = bytearray(data)
    changed[index] ^= 0x10
    return bytes(changed)
