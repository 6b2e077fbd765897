"""The event loop's side of the engine thread: commands as awaitables, outputs as a queue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import structlog

from shared.engine.engine import Engine, Output
from shared.engine.thread import EngineThread
from shared.errors import EngineError

T = TypeVar("T")
log = structlog.get_logger()

_STOP_TIMEOUT_S = 30.0
"""A step that takes longer than this has hung; the thread is a daemon and ends with the process."""


class EngineBridge:
    """Owns the engine thread of one service. Use as an async context manager."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._thread = EngineThread(engine, self._on_outputs, self._on_failure)
        self._outputs: asyncio.Queue[list[Output]] = asyncio.Queue()
        self.num_delivered = 0
        """Steps put into the queue so far: who has handled as many has handled all."""
        self._failure: asyncio.Future[None] = self._loop.create_future()
        self._blocks_freed = asyncio.Event()

    async def __aenter__(self) -> EngineBridge:
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if not await asyncio.to_thread(self._thread.stop, _STOP_TIMEOUT_S):
            log.error("engine_thread_left_behind", waited_s=_STOP_TIMEOUT_S)
        if not self._failure.done():
            self._failure.cancel()

    @property
    def turn_began(self) -> float | None:
        """Monotonic time the engine thread's running turn began, None between turns; a hung step shows here."""
        return self._thread.turn_began

    async def call(self, command: Callable[[Engine], T], undo: Callable[[Engine, T], None] | None = None) -> T:
        """Run `command` between two steps. If this task is cancelled meanwhile, `undo` gets the result."""
        future = self._thread.call(command)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            if undo is not None:
                future.add_done_callback(lambda done: self._undo(done, undo))
            raise

    def post(self, command: Callable[[Engine], object]) -> None:
        """Run `command` between two steps without waiting for it."""
        self._thread.post(lambda: self._run_posted(command))

    async def outputs(self) -> list[list[Output]]:
        """Outputs of all steps since the last call, oldest first; waits for the first."""
        steps = [await self._outputs.get()]
        while not self._outputs.empty():
            steps.append(self._outputs.get_nowait())
        return steps

    async def watch(self) -> None:
        """Ends only by raising EngineError, when a step failed and the engine is no longer to be trusted."""
        await self._failure

    async def progress(self, timeout_s: float) -> None:
        """Wait until another step was committed or `timeout_s` passed: blocks may be free now."""
        self._blocks_freed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._blocks_freed.wait()
        except TimeoutError:
            return

    def _run_posted(self, command: Callable[[Engine], object]) -> None:
        command(self._engine)

    def _undo(self, done: Future[T], undo: Callable[[Engine, T], None]) -> None:
        if not done.cancelled() and done.exception() is None:
            self.post(lambda engine: undo(engine, done.result()))

    def _on_outputs(self, outputs: list[Output]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[Output]) -> None:
        self._outputs.put_nowait(outputs)
        self.num_delivered += 1
        self._blocks_freed.set()

    def _on_failure(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: BaseException) -> None:
        if not self._failure.done():
            self._failure.set_exception(EngineError(f"the engine stopped: {error!r}"))
