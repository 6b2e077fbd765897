"""One importer's connection, as the exporter serves it after the handshake."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass, field

import structlog

from shared.errors import TransferError
from shared.kv.cache import KVCache
from shared.transfer.base import ABORTED, OUTCOME_ACKED, REASON_MALFORMED, FrameTap, Identity, Part, Transport
from shared.transfer.blocks import as_memory, gather
from shared.transfer.control import Hello, Notice
from shared.transfer.coverage import plan
from shared.transfer.export import Export, Reading
from shared.transfer.frame import FrameHeader, Kind, digest, encode_header
from shared.transfer.link import Link, SealedFrame, finish_in_thread

_STOP_GRACE_S = 1.0
_log = structlog.get_logger()


@dataclass(slots=True)
class Source:
    """What all sessions of one exporter share: the pool, who we are, threads to copy in, and counts."""

    cache: KVCache
    identity: Identity
    frame_bytes: int
    pool: Executor
    tap: FrameTap | None = None
    bytes_sent: int = 0
    frames_sent: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def count_refused(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1


class Session:
    """Streams one export to one reader until it acknowledges, leaves, or has to stop."""

    def __init__(self, link: Link, export: Export, hello: Hello, transport: Transport, source: Source) -> None:
        self._link = link
        self._export = export
        self._hello = hello
        self._transport = transport
        self._source = source
        # Four keepalives fit into the importer's deadline, so that one or two late ones do no harm.
        self._keepalive_s = max(0.01, hello.timeout_ms / 4000)

    async def run(self) -> None:
        """Raises TransferError when the reader is lost; the export stays open for another one then."""
        with self._export.reading() as reading:
            await _first_of(self._feed(reading), self._listen(), self._cut(reading))

    async def _feed(self, reading: Reading) -> None:
        """Send parts as they become ready, then the record; tells the reader when to stop instead."""
        next_block, finished = self._hello.skip_blocks, False
        while reading.over is None:
            ready = self._export.num_ready_blocks
            if next_block < ready:
                await self._send_blocks(reading, next_block, ready)
                next_block = ready
            elif finished or self._export.record is None:
                if not await self._export.changed(None if finished else self._keepalive_s):
                    await self._link.send(Kind.KEEPALIVE)
            else:
                await self._link.send(Kind.FINAL, self._export.record)
                finished = True
        if reading.over != OUTCOME_ACKED:
            await self._link.send(Kind.ABORT, Notice(reading.over.removeprefix(ABORTED)).encode())
        await asyncio.get_running_loop().create_future()  # the reader leaves, or is cut off

    async def _send_blocks(self, reading: Reading, start: int, stop: int) -> None:
        layout = self._source.cache.layout
        for part in plan(layout, start, stop, self._export.num_tokens, self._source.frame_bytes):
            if reading.over is not None:
                return
            frame = await finish_in_thread(self._source.pool, self._seal, part)
            await self._send_frame(frame)
            self._source.frames_sent += 1
            self._source.bytes_sent += frame.num_bytes

    def _seal(self, part: Part) -> SealedFrame:
        """Copy the part out of the pool and seal it; runs in a thread while the event loop goes on."""
        source = self._source
        block_ids = self._export.block_ids[part.block_start : part.block_stop]
        content = as_memory(gather(source.cache, part, block_ids))
        wire = self._transport.wire(content, block_ids)
        header = encode_header(FrameHeader(source.cache.layout.fingerprint(), source.identity, self._export.key, part))
        head = self._link.next_prefix(Kind.FRAME, len(header), len(wire)) + header
        return SealedFrame(head, wire, digest(self._link.keys.outgoing, head, content), len(content))

    async def _send_frame(self, frame: SealedFrame) -> None:
        if self._source.tap is None:
            await self._link.send_frame(frame)
        else:
            await self._link.send_raw(self._source.tap(frame.head + bytes(frame.wire) + frame.digest))

    async def _listen(self) -> None:
        """Take the reader's words until its last one. Silence is fine here: the lease judges it."""
        while True:
            message = await self._link.receive()
            if message.kind is Kind.PROGRESS:
                self._export.renew()
            elif message.kind is Kind.ACK:
                self._export.acknowledge()
                return
            elif message.kind is Kind.BYE:
                self._take_leave(Notice.decode(message.payload))
                return
            else:
                raise TransferError(REASON_MALFORMED, f"an importer does not send {message.kind.name}")

    def _take_leave(self, notice: Notice) -> None:
        key = self._export.key
        _log.info("kv_reader_left", request_id=key.request_id, epoch=key.epoch, reason=notice.reason, keep=notice.keep)
        if not notice.keep:
            self._export.abort(notice.reason)

    async def _cut(self, reading: Reading) -> None:
        """Drop the connection when a reader that was told to stop does not: its blocks are wanted."""
        while reading.over is None:
            await self._export.changed()
        await asyncio.sleep(_STOP_GRACE_S)
        self._link.abort()


async def _first_of(*coroutines: Coroutine[None, None, None]) -> None:
    """Run all until one returns or raises, stop the others, and raise what that one raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
