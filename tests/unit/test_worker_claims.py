"""What a worker reads next: what goes first, then what there is room for, and users' work only when it is ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from shared.bus.workqueue import WorkItem
from shared.config import load_settings
from shared.protocol.keys import Keys
from shared.worker.heartbeat import Heartbeat
from shared.worker.life import READ_BLOCK_MS, Worker

KEYS = Keys("claims")
EXPRESS, WORK = KEYS.express_work("prefill", "m"), KEYS.work("prefill", "m")


@dataclass
class FakeQueue:
    """Streams with entries; `reads` is what was asked for."""

    entries: dict[str, int] = field(default_factory=dict)
    reads: list[tuple[int, int, tuple[str, ...]]] = field(default_factory=list)

    async def read(self, count: int, block_ms: int, streams: Sequence[str]) -> list[WorkItem]:
        self.reads.append((count, block_ms, tuple(streams)))
        return [(stream, str(n), {}) for stream in streams for n in range(min(count, self.entries.get(stream, 0)))]


@dataclass
class FakeService:
    ordinary: int
    express: int

    def room(self, *, express: bool = False) -> int:
        return self.express if express else self.ordinary


class FakeBridge:
    def __init__(self) -> None:
        self.waits = 0

    async def progress(self, _timeout_s: float) -> None:
        self.waits += 1


async def read(queue: FakeQueue, service: FakeService, bridge: Any, state: str = "ready") -> list[str]:
    """The streams of the entries that a worker in `state` reads next."""
    worker = Worker("prefill", load_settings(deployment="claims"), lambda _: None, prefill_share=1.0)  # type: ignore[arg-type,return-value]
    worker._heart = Heartbeat(worker.worker_id, "prefill", "m", lambda: False)
    worker._heart.state = state
    return [stream for stream, _, _ in await worker._read(queue, service, bridge)]  # type: ignore[arg-type]


async def test_what_goes_first_is_read_first() -> None:
    queue, bridge = FakeQueue({EXPRESS: 2, WORK: 9}), FakeBridge()
    assert await read(queue, FakeService(4, 4), bridge) == [EXPRESS, EXPRESS]
    assert queue.reads == [(4, 0, (EXPRESS,))]


async def test_without_it_everything_is_waited_for() -> None:
    queue, bridge = FakeQueue({WORK: 9}), FakeBridge()
    assert await read(queue, FakeService(3, 4), bridge) == [WORK] * 3
    (_, (count, block_ms, streams)) = queue.reads
    assert (count, block_ms, streams[:2]) == (3, READ_BLOCK_MS, (EXPRESS, WORK))
    assert bridge.waits == 0


async def test_without_room_only_what_goes_first_is_read() -> None:
    queue, bridge = FakeQueue({WORK: 9}), FakeBridge()
    assert await read(queue, FakeService(0, 2), bridge) == []
    assert queue.reads == [(2, 0, (EXPRESS,))]
    assert bridge.waits == 1


async def test_without_any_room_nothing_is_read() -> None:
    queue, bridge = FakeQueue({EXPRESS: 1, WORK: 1}), FakeBridge()
    assert await read(queue, FakeService(0, 0), bridge) == []
    assert (queue.reads, bridge.waits) == ([], 1)


@pytest.mark.parametrize("state", ["loading", "probing"])
async def test_before_it_is_ready_no_users_work_is_read(state: str) -> None:
    queue, bridge = FakeQueue({EXPRESS: 1, WORK: 1}), FakeBridge()
    assert await read(queue, FakeService(4, 4), bridge, state) == []
    assert not {EXPRESS, WORK} & {stream for _, _, streams in queue.reads for stream in streams}
