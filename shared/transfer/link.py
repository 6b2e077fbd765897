"""One authenticated connection: whole messages in, whole messages out, every wait with a deadline.

A deadline is on progress: it starts anew with every piece that moves, so a slow link is never
mistaken for a dead one. Whatever the socket raises becomes a TransferError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from shared.errors import TransferError
from shared.transfer.auth import LinkKeys
from shared.transfer.base import REASON_COVERAGE, REASON_MALFORMED, REASON_PEER_LOST, REASON_TIMEOUT
from shared.transfer.frame import (
    DIGEST_BYTES,
    PREFIX_BYTES,
    FrameHeader,
    Kind,
    Prefix,
    check_digest,
    decode_header,
    decode_prefix,
    digest,
    encode_prefix,
)

STREAM_LIMIT = 1 << 20
_PIECE_BYTES = 256 << 10
_CLOSE_GRACE_S = 1.0

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Message:
    """A message as read. The digest of a FRAME is not checked yet: that takes its content."""

    kind: Kind
    head: bytes
    header: FrameHeader | None
    payload: bytearray
    digest: bytes


@dataclass(frozen=True, slots=True)
class SealedFrame:
    """A frame ready to be sent; `num_bytes` is its content, wherever that travels."""

    head: bytes
    wire: memoryview
    digest: bytes
    num_bytes: int


class Link:
    """Messages over one connection. One task may send while another receives; neither twice at a time."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keys: LinkKeys, timeout_s: float
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._timeout_s = timeout_s
        self._num_sent = 0
        self._num_received = 0
        self.keys = keys

    def next_prefix(self, kind: Kind, header_bytes: int, payload_bytes: int) -> bytes:
        """Claim the next place in this direction's order; what claims it must be sent next."""
        prefix = encode_prefix(Prefix(kind, header_bytes, payload_bytes, self._num_sent))
        self._num_sent += 1
        return prefix

    def post(self, kind: Kind, payload: bytes = b"") -> None:
        """Queue a small message without waiting for room; for last words on the way out."""
        head = self.next_prefix(kind, 0, len(payload))
        if not self._writer.is_closing():
            self._writer.write(head + payload + digest(self.keys.outgoing, head, payload))

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        self.post(kind, payload)
        await self._drain()

    async def send_frame(self, frame: SealedFrame) -> None:
        """Send in pieces; raises TransferError("timeout") when the peer takes none for the deadline."""
        self._writer.write(frame.head)
        await self._send_pieces(frame.wire)
        self._writer.write(frame.digest)
        await self._drain()

    async def send_raw(self, data: bytes) -> None:
        """Bytes as they are, for the fault hook."""
        await self._send_pieces(memoryview(data))

    async def receive(
        self, expect: Callable[[FrameHeader], int] | None = None, timeout_s: float | None = None
    ) -> Message:
        """The next message, in order, its digest checked unless it is a FRAME.

        `expect` tells the exact payload length of a frame, or raises; without it no frame is taken.
        `timeout_s` is the longest silence, None for ever.
        """
        raw_prefix = bytes(await self._read(PREFIX_BYTES, timeout_s))
        prefix = decode_prefix(raw_prefix)
        if prefix.index != self._num_received:
            raise TransferError(
                REASON_COVERAGE,
                f"message {prefix.index} came where {self._num_received} was due: lost, doubled or moved",
            )
        self._num_received += 1
        head = raw_prefix + await self._read(prefix.header_bytes, timeout_s)
        header = None
        if prefix.kind is Kind.FRAME:
            header = decode_header(head[PREFIX_BYTES:])
            if expect is None or expect(header) != prefix.payload_bytes:
                raise TransferError(REASON_MALFORMED, "a frame has the wrong length for what it says it carries")
        payload = await self._read(prefix.payload_bytes, timeout_s)
        seal = bytes(await self._read(DIGEST_BYTES, timeout_s))
        if header is None:
            check_digest(self.keys.incoming, head, payload, seal)
        return Message(prefix.kind, head, header, payload, seal)

    def abort(self) -> None:
        """Drop the connection now, with whatever was still to be sent."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Send what is queued and close; bounded, and never raises."""
        await close_writer(self._writer)

    async def _send_pieces(self, data: memoryview) -> None:
        for start in range(0, len(data), _PIECE_BYTES):
            self._writer.write(data[start : start + _PIECE_BYTES])
            await self._drain()

    async def _drain(self) -> None:
        with peer_errors():
            async with asyncio.timeout(self._timeout_s):
                await self._writer.drain()

    async def _read(self, num_bytes: int, timeout_s: float | None) -> bytearray:
        buffer = bytearray(num_bytes)
        filled = 0
        while filled < num_bytes:
            with peer_errors():
                async with asyncio.timeout(timeout_s):
                    piece = await self._reader.read(min(num_bytes - filled, STREAM_LIMIT))
            if not piece:
                raise TransferError(REASON_PEER_LOST, "the peer closed the connection")
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
        return buffer


@contextmanager
def peer_errors() -> Iterator[None]:
    """Turn what a socket raises into a TransferError: "timeout" or "peer_lost"."""
    try:
        yield
    except TimeoutError:
        raise TransferError(REASON_TIMEOUT, "the peer was silent for longer than the progress timeout") from None
    except (OSError, EOFError) as error:
        raise TransferError(REASON_PEER_LOST, f"the connection to the peer failed: {type(error).__name__}") from error


async def close_writer(writer: asyncio.StreamWriter) -> None:
    """Flush and close within a grace time, then drop; never raises."""
    writer.close()
    try:
        async with asyncio.timeout(_CLOSE_GRACE_S):
            await writer.wait_closed()
    except OSError:  # TimeoutError is one
        writer.transport.abort()


async def finish_in_thread(pool: Executor, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run in a thread and return only when the thread is done, even when cancelled meanwhile.

    A copy that nobody waits for would go on writing into blocks that already belong to someone else.
    """
    future = asyncio.get_running_loop().run_in_executor(pool, lambda: function(*args, **kwargs))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # seen: the cancellation is what counts
        raise
