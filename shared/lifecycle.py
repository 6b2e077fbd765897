"""How every process starts and stops: event loop, signals, exit status."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import NoReturn

import structlog
import uvloop

from shared.errors import EngineError, SlipstreamError

log = structlog.get_logger()

PARENT_VARIABLE = "_SLIPSTREAM_PARENT_PID"
"""Set by `serve` for its children: they end when it does, even when it is killed."""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2

_PR_SET_PDEATHSIG = 1


def run_service(main: Callable[[asyncio.Event], Coroutine[None, None, None]]) -> int:
    """Run `main(stop)` on uvloop until it returns; the exit status.

    The first SIGTERM or SIGINT sets `stop` (drain); a second one ends the process at once. `main` may set `stop`
    itself; the first signal is then still a polite one. Expected errors become one line, not a traceback.
    """
    die_with_parent()
    status = EXIT_OK
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_supervised(main))
    except* SlipstreamError as group:
        status = EXIT_FAILED
        for error in flatten(group):
            log.error("stopped", reason=str(error), code=getattr(error, "code", ""))
    return status


async def _supervised(main: Callable[[asyncio.Event], Coroutine[None, None, None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    signalled = False

    def on_signal(number: signal.Signals) -> None:
        nonlocal signalled
        if signalled:
            os._exit(128 + number)
        signalled = True
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    loop.add_signal_handler(signal.SIGUSR1, print_tasks)
    await main(stop)


def give_up(reason: str) -> NoReturn:
    """End the process now, with status 1: a part of it hangs, and an orderly end would wait for that part."""
    log.error("stopped", reason=reason, code=EngineError.code)
    sys.stderr.flush()
    os._exit(EXIT_FAILED)


def print_tasks() -> None:
    """SIGUSR1: where every task waits, on standard error; for a process that does not do what it should."""
    for task in asyncio.all_tasks():
        task.print_stack(file=sys.stderr)
    sys.stderr.flush()


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent named in `PARENT_VARIABLE` is gone (Linux only)."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        os._exit(EXIT_FAILED)  # it was gone before the kernel knew


def flatten(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """All leaves of a nested exception group."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += flatten(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
