"""A server that a benchmark starts, waits for and stops."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

OURS = "slipstream"
START_TIMEOUT_S, STOP_TIMEOUT_S = 240.0, 60.0
POLL_S = 0.2
LAST_WORDS = 500


@dataclass(frozen=True, slots=True)
class Server:
    """Any command that starts an HTTP server with a `/health`; `{port}` in it is where it is to listen."""

    name: str
    command: tuple[str, ...]

    @contextmanager
    def running(self, port: int, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """The server, healthy; interrupted at the end, and killed where that does not help. So it is on SIGTERM.

        What it prints goes to `log`. Raises RuntimeError when it does not start.
        """
        command = [part.replace("{port}", str(port)) for part in self.command]
        with (
            ending_on_sigterm(),
            (log or Path(os.devnull)).open("wb") as output,
            subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True) as process,
        ):
            try:
                if not becomes_healthy(process, port):
                    said = log.read_text(errors="replace")[-LAST_WORDS:] if log else ""
                    raise RuntimeError(f"{self.name} did not start: {shlex.join(command)}\n{said}".rstrip())
                yield process
            finally:
                _stop(process)


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends this process by an exception, so that servers in sessions of their own are stopped too."""

    def end(signum: int, _: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def slipstream(model: str, *flags: str) -> Server:
    """`slipstream serve` of this checkout."""
    return Server(OURS, (sys.executable, "-m", "services.cli", "serve", model, "--port", "{port}", *flags))


def becomes_healthy(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the process answers at `port` (True), has ended, or has had all its time (False)."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _is_healthy(port):
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _is_healthy(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
        return bool(response.status == 200)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
