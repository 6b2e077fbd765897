"""Takes the frames of one pull: verify first, write to the pool after."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass

from shared import faultpoints
from shared.errors import TransferError
from shared.kv.cache import KVCache
from shared.transfer.base import (
    ABORTED,
    REASON_EPOCH,
    REASON_LAYOUT,
    REASON_MALFORMED,
    ExportKey,
    Identity,
    Route,
)
from shared.transfer.blocks import as_memory, scatter
from shared.transfer.control import Notice
from shared.transfer.coverage import Coverage
from shared.transfer.frame import MAX_FRAME_BYTES, FrameHeader, Kind, check_digest
from shared.transfer.link import Link, Message, finish_in_thread


@dataclass(frozen=True, slots=True)
class Destination:
    """What a pull wants, and the local blocks it goes to (`block_ids[i]` is block i of the request)."""

    cache: KVCache
    identity: Identity
    key: ExportKey
    num_tokens: int
    block_ids: tuple[int, ...]
    skip_blocks: int


class Receiver:
    """Reads one link until the record. Nothing unverified is ever written to the pool."""

    def __init__(self, destination: Destination, route: Route, pool: Executor) -> None:
        self.destination = destination
        self.bytes_received = 0
        self.frames_received = 0
        self._route = route
        self._pool = pool
        self._layout = destination.cache.layout
        self._fingerprint = self._layout.fingerprint()
        self._coverage = Coverage(self._layout, destination.num_tokens, destination.skip_blocks)

    async def run(self, link: Link, timeout_s: float) -> bytes:
        """Returns the record once every block arrived and was verified; raises TransferError otherwise.

        No copy into the pool is running when this returns, raises or is cancelled.
        """
        while True:
            message = await link.receive(self._wire_length, timeout_s)
            if message.kind is Kind.FRAME:
                await finish_in_thread(self._pool, self._land, link, message)
                faultpoints.fault_point("decode.frame_landed")
                await link.send(Kind.PROGRESS)
            elif message.kind is Kind.FINAL:
                self._coverage.finish()
                await link.send(Kind.ACK)
                return bytes(message.payload)
            elif message.kind is Kind.ABORT:
                raise TransferError(ABORTED + Notice.decode(message.payload).reason)
            elif message.kind is not Kind.KEEPALIVE:
                raise TransferError(REASON_MALFORMED, f"an exporter does not send {message.kind.name} here")

    def _wire_length(self, header: FrameHeader) -> int:
        """Bounds what is allocated for a frame whose digest is still to come."""
        self._coverage.check(header.part)
        if header.part.num_bytes(self._layout) > MAX_FRAME_BYTES:
            raise TransferError(REASON_MALFORMED, f"a frame carries more than {MAX_FRAME_BYTES} bytes")
        return self._route.wire_length(header.part)

    def _land(self, link: Link, message: Message) -> None:
        """Fetch, verify, mark, write; runs in a thread, one frame at a time."""
        header = message.header
        if header is None:
            raise TransferError(REASON_MALFORMED, "a frame has no header")
        part = header.part
        content = self._route.content(part, message.payload)
        check_digest(link.keys.incoming, message.head, as_memory(content), message.digest)
        self._check_identity(header)
        self._coverage.add(part)
        scatter(self.destination.cache, part, self.destination.block_ids[part.block_start : part.block_stop], content)
        self.bytes_received += content.numel()
        self.frames_received += 1

    def _check_identity(self, header: FrameHeader) -> None:
        if header.layout != self._fingerprint or header.identity != self.destination.identity:
            raise TransferError(REASON_LAYOUT, f"a frame of layout {header.layout} and {header.identity}")
        if header.key != self.destination.key:
            raise TransferError(REASON_EPOCH, "a frame of another request or attempt")
