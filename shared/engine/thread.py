"""The engine's thread: the one place where synchronous compute meets the service's event loop.

Commands wait in an inbox and run between steps, so engine state never changes under a running step. Outputs go to one
callback, on this thread; a service hands them over to its loop there.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

import structlog

from shared import faultpoints
from shared.engine.engine import Engine, Output

log = structlog.get_logger()
T = TypeVar("T")

NAME = "engine"
"""Of the thread, for the kernel too: `top -H` and `benchmarks.step_costs` tell it by that."""

_PR_SET_NAME = 15
_IDLE_WAIT_S = 0.5
_STALLED_WAIT_S = 0.005
_CALIBRATION_WAIT_S = 0.01


class EngineThread:
    """Runs `engine` until `stop`; after an error in a step it stops for good and reports it by `on_failure`.

    A broken step leaves the cache in an unknown state: the process is expected to exit, and its requests move on.
    """

    def __init__(
        self,
        engine: Engine,
        on_outputs: Callable[[list[Output]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._on_outputs = on_outputs
        self._on_failure = on_failure
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=NAME, daemon=True)
        self.turn_began: float | None = None
        """Monotonic time the running turn began, None between turns. A step that never ends shows here."""

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Let the current step end, then stop; commands still queued are run first. False: it did not end in time."""
        self.post(self._request_stop)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def call(self, command: Callable[[Engine], T]) -> Future[T]:
        """Run `command` between two steps; its result or exception comes by the future."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(command(self._engine))
            except BaseException as error:
                future.set_exception(error)

        self.post(run)
        return future

    def post(self, action: Callable[[], None]) -> None:
        self._inbox.put(action)

    def _request_stop(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        _name_thread(NAME)
        try:
            wait = 0.0
            while not self._stopping:
                first = self._next_action(wait)
                self.turn_began = time.monotonic()
                self._run_actions(first)
                wait = self._turn()
                self.turn_began = None
            self._log_times()
        except BaseException as error:
            self.turn_began = None
            log.error("engine_failed", error=repr(error))
            self._on_failure(error)

    def _log_times(self) -> None:
        """Where the thread's time went: what is not the model's is Python, which a step pays beside it."""
        thread_s, model_s = time.thread_time(), self._engine.model_s
        log.info("engine_stopped", pid=os.getpid(), thread_s=round(thread_s, 3), model_s=round(model_s, 3))

    def _turn(self) -> float:
        """One step if there is work; returns how long the inbox may wait before the next turn."""
        if self._stopping:
            return _IDLE_WAIT_S
        if not self._engine.has_work:
            return _CALIBRATION_WAIT_S if self._engine.calibrate() else _IDLE_WAIT_S
        faultpoints.fault_point("engine.step")
        outputs = self._engine.step()
        if outputs:
            self._on_outputs(outputs)
        return 0.0 if outputs else _STALLED_WAIT_S

    def _next_action(self, wait: float) -> Callable[[], None] | None:
        try:
            return self._inbox.get(timeout=wait) if wait else self._inbox.get_nowait()
        except Empty:
            return None

    def _run_actions(self, action: Callable[[], None] | None) -> None:
        while action is not None:
            action()
            action = self._next_action(0.0)


def _name_thread(name: str) -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
