"""What every transport must do; runs over the registry, so a new one gets the whole suite with its one line."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from shared.kv.layout import KVLayout
from shared.transfer.base import MAX_RECORD_BYTES, FrameTap
from shared.transfer.blocks import scatter
from shared.transfer.frame import DIGEST_BYTES
from shared.transfer.registry import TRANSPORTS, load_transport
from shared.transfer.shm import SharedMemoryRoute
from shared.transfer.tcp import TcpRoute
from tests.transfer_rig import (
    IMPATIENT,
    LAYOUT,
    LIMITS,
    Pair,
    failure,
    fake_reader,
    paused_copies,
    random_cache,
    readers_are,
    transfer_pair,
    until_abort,
    within,
)

pytestmark = pytest.mark.parametrize("transport", sorted(TRANSPORTS))


async def test_moves_every_byte_and_the_record(transport: str) -> None:
    async with transfer_pair([transport]) as pair:
        export = pair.finished(24, b"tokens and more")
        pulled = await pair.pull(export)
        pair.assert_received(export)
        assert pulled.record == b"tokens and more"
        assert pulled.transport == transport
        assert pulled.bytes_moved == 24 * LAYOUT.bytes_per_token
        assert pair.importer.bytes_received == pair.exporter.bytes_sent == pulled.bytes_moved
        assert pair.importer.frames_received == pair.exporter.frames_sent == 3
        assert await export.closed() == "acked"
        await within(export.released())


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 9, 23])
async def test_moves_only_the_valid_slots_of_a_partial_block(transport: str, num_tokens: int) -> None:
    async with transfer_pair([transport]) as pair:
        export = pair.finished(num_tokens)
        pulled = await pair.pull(export)
        pair.assert_received(export)
        assert pulled.bytes_moved == num_tokens * LAYOUT.bytes_per_token
        used = num_tokens % LAYOUT.block_size or LAYOUT.block_size
        assert not pair.target.data[:, pair.local_blocks(num_tokens)[-1], :, :, used:].any()


async def test_writes_no_other_block(transport: str) -> None:
    async with transfer_pair([transport]) as pair:
        pair.target.data.fill_(7)
        export = pair.finished(10)
        await pair.pull(export)
        others = sorted(set(range(pair.target.num_blocks)) - set(pair.local_blocks(10)))
        assert (pair.target.data[:, others] == 7).all()


@pytest.mark.parametrize("skip_blocks", [1, 3, 6])
async def test_leaves_out_blocks_already_held(transport: str, skip_blocks: int) -> None:
    async with transfer_pair([transport]) as pair:
        export = pair.finished(22)
        pulled = await pair.pull(export, skip_blocks)
        held = min(22, skip_blocks * LAYOUT.block_size)
        pair.assert_received(export, start=held)
        assert pulled.bytes_moved == (22 - held) * LAYOUT.bytes_per_token
        assert not pair.target.data[:, pair.local_blocks(22)[:skip_blocks]].any()


async def test_streams_while_later_chunks_compute(transport: str) -> None:
    async with transfer_pair([transport]) as pair:
        export = pair.open(30)
        pull = pair.pulling(export)
        await readers_are(export, 1)
        for computed, arrived in ((7, 1), (8, 2), (21, 5), (30, 8)):
            export.progress(computed)
            await _bytes_arrive(pair, pull, min(arrived * LAYOUT.block_size, 30))
        assert not pull.done()
        export.finish(b"first token")
        assert (await pull).record == b"first token"
        pair.assert_received(export)


async def _bytes_arrive(pair: Pair, pull: asyncio.Task[object], num_tokens: int) -> None:
    """Until the first `num_tokens` positions are in the target, with the pull still under way."""
    blocks = pair.local_blocks(30)[: LAYOUT.num_blocks(num_tokens)]
    async with asyncio.timeout(5):
        while not all(pair.target.data[:, block].any() for block in blocks):
            assert not pull.done()
            await asyncio.sleep(0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_half_precision_keeps_its_bits(transport: str, dtype: str) -> None:
    async with transfer_pair([transport], layout=replace(LAYOUT, dtype=dtype)) as pair:
        pair.source.data[:, 11, 0, 0, 0, 0] = float("nan")
        export = pair.finished(18)
        pulled = await pair.pull(export)
        pair.assert_received(export)
        assert pulled.bytes_moved == 18 * LAYOUT.bytes_per_token // 2


async def test_splits_layers_where_a_block_is_larger_than_a_frame(transport: str) -> None:
    limits = replace(LIMITS, frame_bytes=2 * LAYOUT.bytes_per_block // LAYOUT.num_layers)
    async with transfer_pair([transport], limits) as pair:
        export = pair.finished(11)
        await pair.pull(export)
        pair.assert_received(export)
        assert pair.exporter.frames_sent == 2 * 3  # layers 0-1 and layer 2 of each of three blocks


async def test_one_head_and_one_layer(transport: str) -> None:
    async with transfer_pair([transport], layout=KVLayout(1, 1, 8, 16)) as pair:
        export = pair.finished(33)
        await pair.pull(export)
        pair.assert_received(export)


async def test_many_pulls_at_once_do_not_mix(transport: str) -> None:
    async with transfer_pair([transport]) as pair:
        exports = [pair.exporter.open(replace(pair.finished(4).key, nonce=f"n{i}"), [20 + i], 4) for i in range(8)]
        for export in exports:
            export.progress(4)
            export.finish(str(export.block_ids[0]).encode())
        pulls = [pair.importer.pull(pair.exporter.address, e.key, 4, [e.block_ids[0] + 1]) for e in exports]
        records = [pulled.record for pulled in await asyncio.gather(*pulls)]
        assert records == [str(export.block_ids[0]).encode() for export in exports]
        assert torch.equal(pair.target.data[:, 21:29], pair.source.data[:, 20:28])


async def test_a_record_of_the_largest_size_arrives(transport: str) -> None:
    async with transfer_pair([transport]) as pair:
        record = bytes(range(256)) * (MAX_RECORD_BYTES // 256)
        assert (await pair.pull(pair.finished(4, record))).record == record


# Frames that were changed on the way. A tap sees a whole frame and returns what is really sent.


def _flip(offset: int) -> FrameTap:
    def tap(frame: bytes) -> bytes:
        changed = bytearray(frame)
        changed[offset % len(frame)] ^= 1
        return bytes(changed)

    return tap


async def test_a_flipped_content_byte_is_refused_and_counted(transport: str) -> None:
    async with transfer_pair([transport], tap=_flip(-DIGEST_BYTES - 1)) as pair:
        export = pair.finished(8)
        assert (await failure(pair.pull(export))).reason == "digest"
        assert pair.importer.refused == {"digest": 1}
        pair.assert_target_untouched()
        assert export.outcome is None


async def test_a_flip_anywhere_is_refused(transport: str) -> None:
    position = 0

    def tap(frame: bytes) -> bytes:
        nonlocal position
        position = min(position, len(frame) - 1)
        return _flip(position)(frame)

    async with transfer_pair([transport], IMPATIENT, tap=tap) as pair:
        for position in [*range(0, 40), *range(40, 140, 9)]:
            error = await failure(pair.pull(pair.finished(8)))
            # A length that grew may make the reader wait for bytes that never come.
            assert error.reason in {"digest", "malformed", "coverage", "timeout"}, position
        pair.assert_target_untouched()


def _truncate() -> FrameTap:
    return lambda frame: frame[:-5]


def _double() -> FrameTap:
    return lambda frame: frame + frame


def _lose_second() -> FrameTap:
    frames: list[bytes] = []

    def tap(frame: bytes) -> bytes:
        frames.append(frame)
        return b"" if len(frames) == 2 else frame

    return tap


def _swap() -> FrameTap:
    held: list[bytes] = []

    def tap(frame: bytes) -> bytes:
        held.append(frame)
        return b"" if len(held) == 1 else frame + held[0]

    return tap


@pytest.mark.parametrize(
    ("make_tap", "reasons"),
    [
        (_truncate, {"digest", "malformed"}),
        (_double, {"coverage"}),
        (_lose_second, {"coverage"}),
        (_swap, {"coverage"}),
    ],
)
async def test_broken_sequences_of_frames_are_refused(
    transport: str, make_tap: Callable[[], FrameTap], reasons: set[str]
) -> None:
    async with transfer_pair([transport], tap=make_tap()) as pair:
        error = await failure(pair.pull(pair.finished(24)))
        assert error.reason in reasons
        assert pair.importer.refused == {error.reason: 1}


async def test_blocks_reused_under_a_reader_never_arrive(transport: str) -> None:
    """Read after release and reassign: the owner writes into a block after the frame was sealed."""
    pairs: list[Pair] = []

    def reuse(frame: bytes) -> bytes:
        pairs[0].source.data.fill_(13)
        return frame

    async with transfer_pair([transport], tap=reuse) as pair:
        pairs.append(pair)
        export = pair.finished(4)
        original = pair.source_tokens(export)
        pull = pair.pulling(export)
        await asyncio.wait([pull])
        if pull.exception() is None:
            assert torch.equal(pair.target_tokens(export), original)
        else:
            assert pair.importer.refused == {"digest": 1}
            pair.assert_target_untouched()


# Leaving, in every order.


async def test_an_abort_is_told_to_the_reader(transport: str) -> None:
    async with transfer_pair([transport]) as pair:
        export = pair.open(20, 8)
        pull = pair.pulling(export)
        await readers_are(export, 1)
        export.abort("cancelled by the client")
        assert (await failure(pull)).reason == "aborted:cancelled by the client"
        assert await export.closed() == "aborted:cancelled by the client"
        await within(export.released())


async def test_a_closing_exporter_tells_its_readers(transport: str) -> None:
    async with transfer_pair([transport]) as pair:
        export = pair.open(20, 8)
        pull = pair.pulling(export)
        await readers_are(export, 1)
        await within(pair.exporter.close())
        assert (await failure(pull)).reason == "aborted:shutdown"
        assert export.num_readers == 0


async def test_a_cancelled_pull_frees_the_export(transport: str) -> None:
    async with transfer_pair([transport]) as pair:
        export = pair.open(20, 8)
        pull = pair.pulling(export)
        await readers_are(export, 1)
        pull.cancel()
        assert await export.closed() == "aborted:cancelled"
        await within(export.released())
        assert pair.exporter.num_exports == 0
        assert (await failure(pair.pull(export))).reason == "refused"


async def test_a_draining_importer_leaves_the_export_for_another(transport: str) -> None:
    async with transfer_pair([transport]) as pair:
        export = pair.open(20, 8)
        pair.importer.drain()
        pull = pair.pulling(export)
        await readers_are(export, 1)
        pull.cancel()
        await readers_are(export, 0)
        assert export.outcome is None
        export.progress(20)
        export.finish(b"")
        await pair.pull(export)
        pair.assert_received(export)


async def test_a_second_pull_works_after_the_first_reader_was_lost(transport: str) -> None:
    async with transfer_pair([transport]) as pair:
        export = pair.finished(20)
        async with fake_reader(pair, export, transport) as link:
            await readers_are(export, 1)
            link.abort()
        await readers_are(export, 0)
        assert export.outcome is None
        await pair.pull(export)
        pair.assert_received(export)
        assert await export.closed() == "acked"


async def test_a_newer_pull_supersedes_one_that_hangs(transport: str) -> None:
    async with transfer_pair([transport]) as pair:
        export = pair.finished(20)
        async with fake_reader(pair, export, transport) as link:
            await pair.pull(export)
            pair.assert_received(export)
            reason = await until_abort(link, lambda header: _wire_length(pair, transport, header.part.num_blocks))
            assert reason == "superseded"
        await within(export.released())


def _wire_length(pair: Pair, transport: str, num_blocks: int) -> int:
    return num_blocks * (4 if transport == "shm" else pair.source.layout.bytes_per_block)


async def test_released_waits_for_the_copy_out_of_the_pool(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = paused_copies(monkeypatch)
    async with transfer_pair([transport]) as pair:
        export = pair.finished(8)
        pull = pair.pulling(export)
        await asyncio.to_thread(entered.wait, 10)
        pull.cancel()
        assert (await export.closed()).startswith("aborted:")
        released = asyncio.create_task(export.released())
        await asyncio.wait([released], timeout=0.1)
        assert not released.done()
        go_on.set()
        await within(released)


async def test_a_pull_ends_only_after_its_copy_into_the_pool(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow_scatter(*args: object) -> None:
        entered.set()
        go_on.wait(10)
        scatter(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("shared.transfer.receiver.scatter", slow_scatter)
    async with transfer_pair([transport]) as pair:
        pull = pair.pulling(pair.finished(8))
        await asyncio.to_thread(entered.wait, 10)
        pull.cancel()
        await asyncio.wait([pull], timeout=0.1)
        assert not pull.done()
        pull.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await pull


async def test_a_wait_longer_than_the_deadline_is_kept_alive(transport: str) -> None:
    async with transfer_pair([transport], replace(LIMITS, progress_timeout_s=0.5)) as pair:
        export = pair.open(8, 4)
        pull = pair.pulling(export)
        await readers_are(export, 1)
        await asyncio.wait([pull], timeout=1.2)
        assert not pull.done()
        export.progress(8)
        export.finish(b"late")
        assert (await pull).record == b"late"


async def test_an_expired_lease_refuses_the_pull(transport: str) -> None:
    async with transfer_pair([transport], replace(LIMITS, lease_s=0.05)) as pair:
        export = pair.finished(8)
        assert await export.closed() == "expired"
        await within(export.released())
        error = await failure(pair.pull(export))
        assert error.reason == "refused"
        assert "expired" in str(error)
        assert pair.exporter.refused == {"refused": 1}


def test_registry_gives_what_it_names(transport: str) -> None:
    cache = random_cache(shared=True)
    try:
        loaded = load_transport(transport)
        info = loaded.describe(cache)
        assert info is not None
        route = loaded.connect(info, cache.layout)
        assert route is not None
        route.close()
        route.close()
    finally:
        cache.close()


# Two lifetimes of a block: its owner's, and that of whoever still reads or writes it.


async def test_blocks_read_after_release_and_reassign_are_refused(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease ends while a reader still copies, and the blocks get another request's KV under it."""
    entered, go_on = threading.Event(), threading.Event()

    def slow(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def later(*args: object) -> torch.Tensor:
            entered.set()
            go_on.wait(10)
            return function(*args)

        return later

    route: Any = {"shm": SharedMemoryRoute, "tcp": TcpRoute}[transport]
    monkeypatch.setattr(route, "content", slow(route.content))
    async with transfer_pair([transport], replace(LIMITS, lease_s=0.2)) as pair:
        export = pair.finished(4)
        original = pair.source_tokens(export)
        pull = pair.pulling(export)
        await asyncio.to_thread(entered.wait, 10)
        assert await asyncio.wait_for(export.closed(), 10) == "expired"
        await within(export.released())
        pair.source.data[:, list(export.block_ids)] = 13
        go_on.set()
        await asyncio.wait([pull])
        assert pull.exception() is not None, "a hand-off whose lease has ended is not complete"
        if transport == "tcp":  # the bytes left before: they are the right ones
            assert torch.equal(pair.target_tokens(export), original)
        else:
            pair.assert_target_untouched()
            assert pair.importer.refused == {"digest": 1}


async def test_a_new_reader_takes_over_the_lease_of_a_dead_one(transport: str) -> None:
    """Decode died between the offer and its pull, or in the middle of it; the blocks are still leased."""
    async with transfer_pair([transport]) as pair:
        export = pair.finished(20)
        for _ in range(3):
            async with fake_reader(pair, export, transport) as link:
                await readers_are(export, 1)
                link.abort()
            await readers_are(export, 0)
        assert export.outcome is None
        await pair.pull(export)
        pair.assert_received(export)


async def test_every_abort_leaves_the_exporter_as_it_was(transport: str) -> None:
    """Either side leaves at any point of the hand-off: no export, no reader and no link stays."""
    async with transfer_pair([transport]) as pair:
        for computed in (0, 4, 12, 20):
            for by_reader in (True, False):
                export = pair.open(20, computed)
                pull = pair.pulling(export)
                await readers_are(export, 1)
                if by_reader:
                    pull.cancel()
                else:
                    export.abort("cancelled")
                await asyncio.wait([pull])
                await within(export.released())
        assert pair.exporter.num_exports == 0
        async with asyncio.timeout(10):
            while pair.exporter._connections.num_links:
                await asyncio.sleep(0.005)


async def test_the_frame_of_another_export_of_the_same_worker_is_refused(transport: str) -> None:
    """An index mix-up at the exporter: right digest, right layout, blocks of somebody else."""
    frames: list[bytes] = []

    def keep(frame: bytes) -> bytes:
        frames.append(frame)
        return frame

    async with transfer_pair([transport], tap=keep) as pair:
        await pair.pull(pair.finished(4))
    recorded = frames[0]
    async with transfer_pair([transport], tap=lambda _: recorded) as pair:
        pair._keys = 1  # the next export is another request, on another link
        assert (await failure(pair.pull(pair.finished(4)))).reason in {"digest", "epoch"}
        pair.assert_target_untouched()
