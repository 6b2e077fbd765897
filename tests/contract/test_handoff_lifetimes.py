"""Blocks are reused only when nobody can read or write them any more, whoever leaves first; for each transport."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from shared.transfer.registry import TRANSPORTS
from tests.transfer_rig import LIMITS, failure, paused_copies, readers_are, transfer_pair, within

pytestmark = pytest.mark.parametrize("transport", sorted(TRANSPORTS))


async def test_a_lease_that_ends_under_a_reader_keeps_the_blocks_until_its_copy_is_over(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = paused_copies(monkeypatch)
    async with transfer_pair([transport], replace(LIMITS, lease_s=0.2)) as pair:
        export = pair.finished(8)
        pull = pair.pulling(export)
        await asyncio.to_thread(entered.wait, 10)
        assert await asyncio.wait_for(export.closed(), 10) == "expired"
        released = asyncio.create_task(export.released())
        await asyncio.wait([released], timeout=0.1)
        assert not released.done(), "the copy still reads the blocks"
        go_on.set()
        await within(released)
        assert (await failure(pull)).reason == "aborted:expired"


async def test_a_lease_that_ends_between_two_readers_refuses_the_second(transport: str) -> None:
    async with transfer_pair([transport], replace(LIMITS, lease_s=0.3)) as pair:
        export = pair.open(20, 8)
        pair.importer.drain()
        pull = pair.pulling(export)
        await readers_are(export, 1)
        pull.cancel()
        await readers_are(export, 0)
        export.progress(20)
        export.finish(b"")
        assert await asyncio.wait_for(export.closed(), 10) == "expired"
        assert (await failure(pair.pull(export))).reason == "refused"


async def test_a_decode_worker_that_frees_gets_no_byte_of_later_chunks(transport: str) -> None:
    """It gives the blocks to somebody else as soon as the pull has ended, while prefill goes on computing."""
    async with transfer_pair([transport]) as pair:
        export = pair.open(20, 8)
        pull = pair.pulling(export)
        await readers_are(export, 1)
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
        pair.target.data.fill_(7)
        export.progress(20)
        export.finish(b"")
        await within(export.released())
        assert bool((pair.target.data == 7).all())
        assert (await failure(pair.pull(export))).reason == "refused"
        assert bool((pair.target.data == 7).all())


async def test_a_prefill_worker_that_writes_again_after_release_reaches_nobody(transport: str) -> None:
    async with transfer_pair([transport]) as pair:
        export = pair.finished(8)
        received = await pair.pull(export)
        assert received.record == b"record"
        expected = pair.target_tokens(export).clone()
        await within(export.released())
        pair.source.data.fill_(13)
        assert torch.equal(pair.target_tokens(export), expected)
        assert pair.exporter.num_exports == 0
