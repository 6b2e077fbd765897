"""What the gateway concludes from heartbeats: room for requests, and a Redis that takes no writes."""

from __future__ import annotations

from typing import Any, cast

import pytest
from redis.exceptions import OutOfMemoryError, ReadOnlyError
from structlog.testing import capture_logs

from services.gateway.admission import Admission, AdmissionLimits
from services.gateway.app import follow_workers
from services.gateway.health import ClusterView
from services.gateway.looptime import LONGEST_GAP_S, TICK_S, LoopTime
from services.gateway.metrics import GatewayMetrics
from shared.bus.registry import Registry
from shared.errors import BusUnavailable
from shared.protocol.messages import WorkerBeat


class FakeRegistry:
    """What a test says is alive; `refusal` is what Redis answers to a write."""

    def __init__(self, *beats: WorkerBeat) -> None:
        self.beats = list(beats)
        self.gateways = {"me"}
        self.refusal: Exception | None = None

    async def beat_gateway(self, _gateway_id: str) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def live(self) -> list[WorkerBeat]:
        return self.beats

    async def live_gateways(self) -> set[str]:
        return self.gateways


def worker(role: str, max_num_seqs: int = 0, state: str = "ready", model: str = "m") -> WorkerBeat:
    return WorkerBeat(f"{role}-{max_num_seqs}", role, state, model, "n", "l", max_num_seqs=max_num_seqs)


async def view_of(registry: FakeRegistry) -> ClusterView:
    view = ClusterView(cast(Registry, registry), "me", "m", 1.0, 3.0)
    await view.refresh()
    return view


@pytest.mark.parametrize(
    ("sizes", "gateways", "room"),
    [
        ([32], 1, 40),
        ([32, 32], 1, 80),
        ([32], 2, 20),
        ([1], 1, 2),
        ([1], 8, 1),
        ([32], 0, 40),
        ([32, 0], 1, None),
        ([], 1, None),
    ],
)
async def test_room_is_what_the_decode_workers_run_divided_among_gateways(
    sizes: list[int], gateways: int, room: int | None
) -> None:
    others = [worker("prefill", 99), worker("decode", 99, "stalled"), worker("decode", 99, model="another")]
    registry = FakeRegistry(*others, *(worker("decode", size) for size in sizes))
    registry.gateways = {f"g{number}" for number in range(gateways)}
    assert (await view_of(registry)).room() == room


async def test_admission_follows_each_refresh() -> None:
    registry = FakeRegistry(worker("prefill"), worker("decode", 4))
    view, metrics = await view_of(registry), GatewayMetrics("m")
    admission = Admission(AdmissionLimits(64, 64, 64, 64, 1.0))
    view.on_refresh(lambda: follow_workers(admission, view, metrics))
    for beats, limit in (
        ([worker("decode", 4)], 5),
        ([worker("decode", 4), worker("decode", 8)], 15),
        ([], 15),
        ([worker("decode", 1000)], 64),
        ([worker("decode", 4), worker("decode", 0)], 64),
    ):
        registry.beats = beats
        await view.refresh()
        assert admission.limit == limit, "while no worker is ready, the last bound stays"
        assert metrics.registry.get_sample_value("slipstream_admission_limit") == limit


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def turn_for(loop_time: LoopTime, clock: FakeClock, seconds: float) -> None:
    """The loop turns and ticks as it should."""
    for _ in range(round(seconds / TICK_S)):
        clock.now += TICK_S
        loop_time.tick()


async def test_a_standstill_of_our_own_is_no_silence_of_redis() -> None:
    registry, clock = FakeRegistry(worker("prefill"), worker("decode")), FakeClock()
    loop_time = LoopTime(clock)
    view = ClusterView(cast(Registry, registry), "me", "m", 1.0, 3.0, loop_time)
    assert view.reasons() == ["Redis does not answer"], "it never did"
    await view.refresh()
    turn_for(loop_time, clock, 1.0)
    clock.now += 60.0
    assert view.redis_answers, "what runs before the next tick asks already"
    loop_time.tick()
    assert view.reasons() == []
    view.require_ready()


async def test_a_redis_that_says_nothing_while_the_loop_turns_does_not_answer() -> None:
    registry, clock = FakeRegistry(worker("prefill"), worker("decode")), FakeClock()
    loop_time = LoopTime(clock)
    view = ClusterView(cast(Registry, registry), "me", "m", 1.0, 3.0, loop_time)
    await view.refresh()
    turn_for(loop_time, clock, 3.0)
    assert view.redis_answers
    turn_for(loop_time, clock, TICK_S)
    assert view.reasons() == ["Redis does not answer"]
    await view.refresh()
    assert view.redis_answers, "one answer is enough"
    clock.now += 60.0
    loop_time.tick()
    turn_for(loop_time, clock, 3.0 - LONGEST_GAP_S)
    assert view.redis_answers
    turn_for(loop_time, clock, TICK_S)
    assert not view.redis_answers, "a standstill does not excuse it for ever"


@pytest.mark.parametrize("refusal", [OutOfMemoryError("OOM command not allowed"), ReadOnlyError("READONLY")])
async def test_a_redis_that_refuses_writes_is_no_ready_one(refusal: Exception) -> None:
    registry = FakeRegistry(worker("prefill"), worker("decode"))
    view = await view_of(registry)
    assert view.reasons() == []
    registry.refusal = refusal
    with capture_logs() as logs:
        await view.refresh()
        await view.refresh()
    assert view.reasons() == ["Redis cannot be written"]
    report: dict[str, Any] = view.report()
    assert (report["status"], report["redis"]) == ("unavailable", False)
    with pytest.raises(BusUnavailable, match="write"):
        view.require_ready()
    registry.refusal = None
    with capture_logs() as more:
        await view.refresh()
    assert view.reasons() == []
    view.require_ready()
    assert [line["event"] for line in logs + more] == ["redis_writes_refused", "redis_writes_accepted"]
