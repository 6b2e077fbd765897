"""One hand-off as the prefill worker holds it: what is computed, who reads, until when it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from shared.kv.layout import KVLayout
from shared.transfer.base import ABORTED, MAX_RECORD_BYTES, OUTCOME_ACKED, OUTCOME_EXPIRED, ExportKey


class Reading:
    """One reader's hold on an export. It is over when the export closed or a newer reader came."""

    def __init__(self, export: Export) -> None:
        self._export = export
        self.superseded = False

    @property
    def over(self) -> str | None:
        """Why this reader must stop, or None."""
        return "superseded" if self.superseded else self._export.outcome


class Export:
    """Blocks of one attempt of one request, offered to one reader at a time.

    Made by `Exporter.open`; used on the event loop only. The blocks have two owners, the request and
    whoever reads: the caller reuses them only after `released()`. A reader that leaves without an ack
    leaves the export open for the next one until the lease ends.
    """

    def __init__(
        self,
        key: ExportKey,
        block_ids: Sequence[int],
        num_tokens: int,
        layout: KVLayout,
        lease_s: float,
        on_close: Callable[[Export], None],
    ) -> None:
        if num_tokens < 1 or len(block_ids) != layout.num_blocks(num_tokens):
            raise ValueError(f"{len(block_ids)} blocks cannot hold exactly {num_tokens} tokens")
        self.key = key
        self.block_ids = tuple(block_ids)
        self.num_tokens = num_tokens
        self.record: bytes | None = None
        self.outcome: str | None = None
        self._layout = layout
        self._lease_s = lease_s
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._num_computed = 0
        self._lease_end = 0.0
        self._lease_timer: asyncio.TimerHandle | None = None
        self._reader: Reading | None = None
        self._num_readers = 0
        self._changed = asyncio.Event()

    @property
    def num_readers(self) -> int:
        return self._num_readers

    @property
    def num_ready_blocks(self) -> int:
        """Blocks that will not be written again: full ones, and the last one at the end of the prompt."""
        if self._num_computed == self.num_tokens:
            return len(self.block_ids)
        return self._num_computed // self._layout.block_size

    def progress(self, num_computed_tokens: int) -> None:
        """The first `num_computed_tokens` positions are in the cache; may be repeated, never goes back."""
        if num_computed_tokens > self.num_tokens:
            raise ValueError(f"{num_computed_tokens} tokens computed of {self.num_tokens}")
        if num_computed_tokens > self._num_computed:
            self._num_computed = num_computed_tokens
            self._notify()

    def finish(self, record: bytes) -> None:
        """All is computed; `record` closes the hand-off. The lease starts now; no effect once closed."""
        if self._num_computed != self.num_tokens:
            raise ValueError(f"finished with {self._num_computed} of {self.num_tokens} tokens computed")
        if len(record) > MAX_RECORD_BYTES:
            raise ValueError(f"a hand-off record of {len(record)} bytes is over the limit of {MAX_RECORD_BYTES}")
        if self.outcome is not None or self.record is not None:
            return
        self.record = record
        self.renew()
        self._lease_timer = self._loop.call_at(self._lease_end, self._check_lease)
        self._notify()

    def renew(self) -> None:
        """Let the lease run in full again from now; never shortens it."""
        self._lease_end = max(self._lease_end, self._loop.time() + self._lease_s)

    def abort(self, reason: str) -> None:
        """Close without a hand-off and tell the reader; no effect once closed."""
        self._close(ABORTED + reason)

    async def closed(self) -> str:
        """Wait for the outcome: "acked", "expired" or "aborted:<reason>"."""
        while self.outcome is None:
            await self.changed()
        return self.outcome

    async def released(self) -> None:
        """Wait until the export is closed, no reader is attached and no copy of its blocks is running."""
        while self.outcome is None or self._num_readers:
            await self.changed()

    async def changed(self, timeout_s: float | None = None) -> bool:
        """Wait for the next change of any kind; False when none came in time."""
        event = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
        return True

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Attach a reader for the length of the block; one that was attached before is superseded.

        A second pull of a key means that the first puller was given up, so the newer one is right.
        """
        reading = Reading(self)
        if self._reader is not None:
            self._reader.superseded = True
        self._reader = reading
        self._num_readers += 1
        self._notify()
        try:
            yield reading
        finally:
            self._num_readers -= 1
            if self._reader is reading:
                self._reader = None
            self._notify()

    def acknowledge(self) -> None:
        """The reader holds every byte, verified."""
        self._close(OUTCOME_ACKED)

    def _close(self, outcome: str) -> None:
        if self.outcome is not None:
            return
        self.outcome = outcome
        if self._lease_timer is not None:
            self._lease_timer.cancel()
        self._on_close(self)
        self._notify()

    def _check_lease(self) -> None:
        if self._loop.time() < self._lease_end:
            self._lease_timer = self._loop.call_at(self._lease_end, self._check_lease)
        else:
            self._close(OUTCOME_EXPIRED)

    def _notify(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()
