"""The engine's thread and its bridge to the event loop."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from shared.engine.engine import Engine, Output, Reservation
from shared.engine.thread import NAME, EngineThread
from shared.errors import EngineError
from shared.worker.bridge import EngineBridge
from tests.engine_fakes import expected_tokens, make_engine, make_sequence, output_of

WAIT_S = 10.0


class Report:
    """What the thread told: outputs, failures, and which thread it was."""

    def __init__(self) -> None:
        self.steps: list[list[Output]] = []
        self.failures: list[BaseException] = []
        self.idents: set[int] = set()
        self.finished = threading.Event()
        self.failed = threading.Event()

    def outputs(self, outputs: list[Output]) -> None:
        self.idents.add(threading.get_ident())
        self.steps.append(outputs)
        if any(sample.finish for output in outputs for sample in output.samples):
            self.finished.set()

    def failure(self, error: BaseException) -> None:
        self.failures.append(error)
        self.failed.set()


@contextmanager
def running(engine: Engine) -> Iterator[tuple[EngineThread, Report]]:
    report = Report()
    thread = EngineThread(engine, report.outputs, report.failure)
    thread.start()
    try:
        yield thread, report
    finally:
        thread.stop()


def names_thread(_: Engine) -> int:
    return threading.get_ident()


def raises_key_error(_: Engine) -> None:
    raise KeyError("not there")


def test_a_command_runs_on_the_engine_thread_and_its_result_comes_back() -> None:
    engine, _ = make_engine()
    with running(engine) as (thread, _):
        assert thread.call(lambda given: given).result(WAIT_S) is engine
        assert thread.call(names_thread).result(WAIT_S) != threading.get_ident()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have names for the kernel on Linux")
def test_the_kernel_knows_the_thread_by_name() -> None:
    with running(make_engine()[0]) as (thread, _):
        native_id = thread.call(lambda _: threading.get_native_id()).result(WAIT_S)
        assert Path(f"/proc/self/task/{native_id}/comm").read_text() == f"{NAME}\n"


def test_at_its_end_the_thread_says_how_much_of_its_time_was_the_models() -> None:
    engine, _ = make_engine()
    with capture_logs() as logs:
        with running(engine) as (thread, report):
            thread.call(lambda given: given.add(make_sequence([1, 2, 3], max_tokens=4))).result(WAIT_S)
            assert report.finished.wait(WAIT_S)
        (stopped,) = [entry for entry in logs if entry["event"] == "engine_stopped"]
    assert 0 < stopped["model_s"] <= stopped["thread_s"]


def test_an_exception_of_a_command_is_its_callers_and_the_thread_goes_on() -> None:
    with running(make_engine()[0]) as (thread, report):
        with pytest.raises(KeyError, match="not there"):
            thread.call(raises_key_error).result(WAIT_S)
        assert thread.call(lambda _: 5).result(WAIT_S) == 5
        assert report.failures == []


def test_a_sequence_runs_to_its_end_and_every_step_is_told_on_that_thread() -> None:
    engine, _ = make_engine()
    sequence = make_sequence([1, 2, 3])
    with running(engine) as (thread, report):
        thread.call(lambda given: given.add(sequence)).result(WAIT_S)
        assert report.finished.wait(WAIT_S)
        ident = thread.call(names_thread).result(WAIT_S)
    assert output_of(sequence) == expected_tokens([1, 2, 3], sequence.params)
    assert len(report.steps) == 8
    assert report.idents == {ident}


def test_commands_run_between_steps_in_the_order_they_came() -> None:
    engine, _ = make_engine()
    in_step, seen = threading.Event(), []
    step = engine.step

    def watched_step() -> list[Output]:
        in_step.set()
        outputs = step()
        in_step.clear()
        return outputs

    engine.step = watched_step  # type: ignore[method-assign]
    with running(engine) as (thread, _):
        thread.call(lambda given: given.add(make_sequence([1], max_tokens=200))).result(WAIT_S)
        futures = [thread.call(lambda _, n=n: seen.append((n, in_step.is_set()))) for n in range(50)]  # type: ignore[misc]
        for future in futures:
            future.result(WAIT_S)
    assert seen == [(n, False) for n in range(50)]


def test_stop_runs_what_was_queued_before_and_may_be_repeated() -> None:
    report = Report()
    thread = EngineThread(make_engine()[0], report.outputs, report.failure)
    futures = [thread.call(lambda _, n=n: n) for n in range(5)]  # type: ignore[misc]
    thread.start()
    thread.stop()
    assert [future.result(0) for future in futures] == [0, 1, 2, 3, 4]
    thread.stop()
    assert report.failures == []


def test_stop_from_the_thread_itself_does_not_wait_for_itself() -> None:
    with running(make_engine()[0]) as (thread, report):
        thread.call(lambda _: thread.stop()).result(WAIT_S)
    assert report.failures == []


def test_a_command_cancelled_before_its_turn_does_not_run() -> None:
    report, ran = Report(), []
    thread = EngineThread(make_engine()[0], report.outputs, report.failure)
    future: Future[None] = thread.call(lambda _: ran.append(1))
    assert future.cancel()
    thread.start()
    thread.stop()
    assert ran == []
    with pytest.raises(CancelledError):
        future.result(0)


def test_a_failing_step_is_reported_once_and_ends_the_thread() -> None:
    engine, _ = make_engine()
    engine.step = _broken_step  # type: ignore[method-assign]
    report = Report()
    thread = EngineThread(engine, report.outputs, report.failure)
    thread.start()
    thread.post(lambda: engine.add(make_sequence([1])))
    assert report.failed.wait(WAIT_S)
    thread.stop()
    assert [str(error) for error in report.failures] == ["the step broke"]
    assert report.steps == []
    assert not thread._thread.is_alive()


def _broken_step() -> list[Output]:
    raise RuntimeError("the step broke")


def test_a_turn_shows_from_its_begin_to_its_end() -> None:
    with running(make_engine()[0]) as (thread, _):
        inside, go_on = threading.Event(), threading.Event()
        before = time.monotonic()
        thread.post(inside.set)
        thread.post(lambda: waited(go_on))
        assert inside.wait(WAIT_S)
        began = thread.turn_began
        assert began is not None
        assert before <= began <= time.monotonic()
        go_on.set()
        deadline = time.monotonic() + WAIT_S
        while thread.turn_began is not None:
            assert time.monotonic() < deadline, "between turns there is none"


def waited(event: threading.Event) -> None:
    assert event.wait(WAIT_S)


def test_a_thread_that_hangs_is_left_behind() -> None:
    thread, go_on = EngineThread(make_engine()[0], lambda _: None, lambda _: None), threading.Event()
    thread.start()
    thread.post(lambda: waited(go_on))
    assert not thread.stop(0.01)
    go_on.set()
    assert thread.stop(WAIT_S)


# --- the bridge -------------------------------------------------------------------------------------------------------


async def within(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.001)


async def test_the_bridge_carries_calls_and_outputs() -> None:
    engine, _ = make_engine()
    sequence = make_sequence([4, 2])
    async with EngineBridge(engine) as bridge:
        await bridge.call(lambda given: given.add(sequence))
        tokens: list[int] = []
        async with asyncio.timeout(WAIT_S):
            while len(tokens) < 8:
                for step in await bridge.outputs():
                    tokens += [sample.token for output in step for sample in output.samples]
        with pytest.raises(KeyError):
            await bridge.call(raises_key_error)
    assert tokens == expected_tokens([4, 2], sequence.params)


async def test_a_cancelled_call_is_undone_once_its_command_has_run() -> None:
    """A reservation made for a task that is gone would hold its blocks for ever."""
    engine, _ = make_engine()
    gate, entered = threading.Event(), threading.Event()

    def reserve(given: Engine) -> Reservation | None:
        entered.set()
        assert gate.wait(WAIT_S)
        return given.reserve([make_sequence(list(range(9)))], 9, growth=4)

    undone: list[Reservation] = []

    def undo(given: Engine, made: Reservation | None) -> None:
        assert made is not None
        given.cancel_reservation(made)
        undone.append(made)

    async with EngineBridge(engine) as bridge:
        task = asyncio.create_task(bridge.call(reserve, undo=undo))
        await within(entered.is_set)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert not undone
        gate.set()
        await within(lambda: undone)
        assert engine.blocks.num_free == engine.blocks.num_usable
        await bridge.call(lambda given: given.check_integrity())


async def test_a_call_that_failed_is_not_undone() -> None:
    undone: list[object] = []
    async with EngineBridge(make_engine()[0]) as bridge:
        gate = threading.Event()

        def fail(_: Engine) -> None:
            assert gate.wait(WAIT_S)
            raise KeyError("no")

        task = asyncio.create_task(bridge.call(fail, undo=lambda _, made: undone.append(made)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        gate.set()
        assert await bridge.call(lambda _: "next") == "next"
    assert undone == []


async def test_a_failed_engine_ends_watch_with_its_reason() -> None:
    engine, _ = make_engine()
    engine.step = _broken_step  # type: ignore[method-assign]
    async with EngineBridge(engine) as bridge:
        bridge.post(lambda given: given.add(make_sequence([1])))
        with pytest.raises(EngineError, match="the step broke"):
            async with asyncio.timeout(WAIT_S):
                await bridge.watch()


async def test_progress_returns_with_a_step_or_its_timeout() -> None:
    engine, _ = make_engine()
    async with EngineBridge(engine) as bridge:
        await bridge.progress(0.01)
        waiting = asyncio.create_task(bridge.progress(WAIT_S))
        await asyncio.sleep(0)
        assert not waiting.done()
        await bridge.call(lambda given: given.add(make_sequence([1], max_tokens=1)))
        async with asyncio.timeout(WAIT_S):
            await waiting
    assert engine.load().steps == 1
