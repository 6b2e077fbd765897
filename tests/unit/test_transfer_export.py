"""The state of one export: what is ready, when the lease ends, who holds the blocks."""

from __future__ import annotations

import asyncio

import pytest

from shared.kv.layout import KVLayout
from shared.transfer.base import MAX_RECORD_BYTES, ExportKey
from shared.transfer.export import Export

LAYOUT = KVLayout(1, 1, 4, 4)


def make(num_tokens: int = 10, lease_s: float = 20.0) -> tuple[Export, list[Export]]:
    """An export, and the list into which it puts itself when it closes."""
    closed: list[Export] = []
    blocks = range(LAYOUT.num_blocks(num_tokens))
    return Export(ExportKey("r", 1, "n"), blocks, num_tokens, LAYOUT, lease_s, closed.append), closed


async def test_only_blocks_that_stay_as_they_are_are_ready() -> None:
    export, _ = make(10)
    ready = []
    for computed in (0, 3, 4, 7, 8, 9, 10):
        export.progress(computed)
        ready.append(export.num_ready_blocks)
    assert ready == [0, 0, 1, 1, 2, 2, 3]


async def test_progress_never_goes_back_nor_too_far() -> None:
    export, _ = make(10)
    export.progress(8)
    export.progress(5)
    assert export.num_ready_blocks == 2
    with pytest.raises(ValueError, match="11 tokens computed of 10"):
        export.progress(11)


async def test_cannot_finish_before_all_is_computed() -> None:
    export, _ = make(10)
    export.progress(9)
    with pytest.raises(ValueError, match="9 of 10"):
        export.finish(b"")


async def test_a_record_is_bounded() -> None:
    export, _ = make(4)
    export.progress(4)
    with pytest.raises(ValueError, match="over the limit"):
        export.finish(bytes(MAX_RECORD_BYTES + 1))
    export.finish(bytes(MAX_RECORD_BYTES))
    assert export.record is not None


async def test_the_first_outcome_stays() -> None:
    export, closed = make(4)
    export.abort("first")
    export.abort("second")
    export.acknowledge()
    export.progress(4)
    export.finish(b"late")
    assert await export.closed() == "aborted:first"
    assert export.record is None
    assert closed == [export]


async def test_finishing_twice_keeps_the_first_record() -> None:
    export, _ = make(4)
    export.progress(4)
    export.finish(b"one")
    export.finish(b"two")
    assert export.record == b"one"
    export.abort("end")


async def test_a_lease_ends_without_a_reader() -> None:
    export, closed = make(4, lease_s=0.02)
    export.progress(4)
    export.finish(b"")
    assert await asyncio.wait_for(export.closed(), 5) == "expired"
    assert closed == [export]


async def test_no_lease_runs_before_the_end_of_the_prompt() -> None:
    export, _ = make(4, lease_s=0.01)
    export.progress(4)
    assert not await export.changed(0.1)
    assert export.outcome is None


async def test_renewing_moves_the_end_of_the_lease() -> None:
    export, _ = make(4, lease_s=0.3)
    export.progress(4)
    export.finish(b"")
    loop = asyncio.get_running_loop()
    end = loop.time() + 0.6
    while loop.time() < end:
        export.renew()
        await export.changed(0.02)
        assert export.outcome is None
    assert await asyncio.wait_for(export.closed(), 5) == "expired"
    assert loop.time() >= end


async def test_released_needs_the_outcome_and_every_reader_gone() -> None:
    export, _ = make()
    released = asyncio.create_task(export.released())
    with export.reading():
        with export.reading():
            await asyncio.wait([released], timeout=0.02)
            assert export.num_readers == 2
            export.abort("x")
            await asyncio.wait([released], timeout=0.02)
            assert not released.done()
        await asyncio.wait([released], timeout=0.02)
        assert not released.done()
    await asyncio.wait_for(released, 5)
    assert export.num_readers == 0


async def test_released_waits_for_the_outcome_without_readers() -> None:
    export, _ = make()
    released = asyncio.create_task(export.released())
    await asyncio.wait([released], timeout=0.02)
    assert not released.done()
    export.abort("x")
    await asyncio.wait_for(released, 5)
    assert export.outcome == "aborted:x"


async def test_a_newer_reader_supersedes_the_older_one() -> None:
    export, _ = make()
    with export.reading() as first:
        reasons = [first.over]
        with export.reading() as second:
            reasons += [first.over, second.over]
        assert reasons == [None, "superseded", None]
    with export.reading() as third:
        reasons = [third.over]
        export.abort("gone")
        assert [*reasons, third.over] == [None, "aborted:gone"]
