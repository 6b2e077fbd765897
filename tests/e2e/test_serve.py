"""`slipstream serve` as a user has it: one command, one box, one Ctrl-C, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.tiny_model import NAME

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

START_TIMEOUT_S = 45.0
STOP_TIMEOUT_S = 25.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass(slots=True)
class Serve:
    """A running `serve`; everything it writes to standard error is in `log`, its temporary files in `folder`."""

    process: subprocess.Popen[bytes]
    log: Path
    folder: Path
    port: int

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def curl_lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("curl ")]

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"gave up waiting for {what}\n{self.text[-3000:]}"
            time.sleep(0.05)

    def wait_ready(self) -> None:
        self.wait_for(lambda: bool(self.curl_lines()) or self.process.poll() is not None, "the box")
        assert self.process.poll() is None, self.text

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[dict[str, Any]]:
        result = command(self.folder, "ps", "--json")
        assert result.returncode == 0, result.stderr
        beats: list[dict[str, Any]] = json.loads(result.stdout)
        return beats


def environment(folder: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
    small = {"SLIPSTREAM_ENGINE__THREADS": "1", "SLIPSTREAM_ENGINE__KV_CACHE_TOKENS": "2048"}
    return inherited | small | {"TMPDIR": str(folder), "SLIPSTREAM_DRAIN_TIMEOUT_S": "5", "COLUMNS": "120"}


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "services.cli", *arguments]
    return subprocess.run(whole, env=environment(folder), capture_output=True, text=True, timeout=60, check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary folder with a name short enough for a Unix socket inside."""
    with tempfile.TemporaryDirectory(prefix="sls-") as name:
        yield Path(name)


@contextmanager
def serving(folder: Path, model: Path) -> Iterator[Serve]:
    port, log = free_port(), folder / "serve.log"
    arguments = [sys.executable, "-m", "services.cli", "serve", str(model), "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(arguments, env=environment(folder), stdout=out, stderr=out)
    serve = Serve(process, log, folder, port)
    try:
        serve.wait_ready()
        yield serve
    finally:
        process.kill()
        process.wait()


def are_gone(processes: list[psutil.Process]) -> bool:
    """Ended, or only waiting to be reaped by whoever adopted them."""
    return not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def pool_files(processes: list[psutil.Process]) -> list[Path]:
    return [path for one in processes for path in SHARED_MEMORY.glob(f"slipstream-kv-{one.pid}-*")]


def leftovers(folder: Path) -> list[Path]:
    """What serve put into the temporary folder: sockets, notes, its bus; the log is ours."""
    return [path for path in folder.rglob("*") if not path.is_dir() and path.name != "serve.log"]


def test_from_the_box_to_ctrl_c(folder: Path, tiny_model: Path) -> None:
    with serving(folder, tiny_model) as serve:
        text = serve.text
        assert "Slipstream is ready" in text
        assert f"http://127.0.0.1:{serve.port}/v1" in text
        (curl,) = serve.curl_lines()
        answer = subprocess.run(["/bin/sh", "-c", curl], capture_output=True, text=True, timeout=60, check=True).stdout
        events = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        assert len(chunks) > 1
        assert {chunk["model"] for chunk in chunks} == {NAME}
        assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")

        beats = serve.workers()
        assert sorted((beat["role"], beat["state"]) for beat in beats) == [("decode", "ready"), ("prefill", "ready")]
        processes = serve.descendants()
        assert {beat["pid"] for beat in beats} <= {process.pid for process in processes}
        assert pool_files(processes), "the pool of the prefill worker is shared by a file"

        serve.process.send_signal(signal.SIGINT)
        assert serve.process.wait(STOP_TIMEOUT_S) == 0, serve.text
        assert are_gone(processes)
        assert pool_files(processes) == []
        assert leftovers(folder) == []
        assert "Traceback" not in serve.text


def test_a_killed_worker_is_replaced(folder: Path, tiny_model: Path) -> None:
    with serving(folder, tiny_model) as serve:
        victim = next(beat["pid"] for beat in serve.workers() if beat["role"] == "decode")
        os.kill(victim, signal.SIGKILL)

        def replaced() -> bool:
            beats = [beat for beat in serve.workers() if beat["role"] == "decode" and beat["state"] == "ready"]
            return any(beat["pid"] != victim for beat in beats)

        serve.wait_for(replaced, "another decode worker")
        assert f"(pid {victim}) died; starting another" in serve.text
        curl = ["/bin/sh", "-c", serve.curl_lines()[0]]
        serve.wait_for(
            lambda: "[DONE]" in subprocess.run(curl, capture_output=True, text=True, timeout=60, check=True).stdout,
            "an answer from the new worker",
            10,
        )


def test_sigkill_of_serve_takes_everything_with_it(folder: Path, tiny_model: Path) -> None:
    with serving(folder, tiny_model) as serve:
        processes = serve.descendants()
        assert len(processes) >= 4, "two workers, a gateway and the bus"
        serve.process.kill()
        serve.process.wait()
        serve.wait_for(lambda: are_gone(processes), "the children to end", 10)
        serve.wait_for(lambda: not list(folder.rglob("bus.sock")), "the socket to go", 10)
        result = command(folder, "ps")
        assert result.returncode == 1
        assert "no `slipstream serve` of yours runs here" in result.stderr


def test_a_port_in_use_is_told_in_one_sentence(folder: Path, tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = command(folder, "serve", str(tiny_model), "--port", port)
    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.stdout + result.stderr
    assert_one_sentence(result, folder)


def test_a_missing_model_is_told_in_one_sentence(folder: Path) -> None:
    missing = folder / "no-such-model"
    result = command(folder, "serve", str(missing), "--port", str(free_port()))
    assert result.returncode == 1
    assert "no-such-model" in result.stdout + result.stderr
    assert_one_sentence(result, folder)


def assert_one_sentence(result: subprocess.CompletedProcess[str], folder: Path) -> None:
    told = result.stdout + result.stderr
    assert "Traceback" not in told
    assert len(told.strip().splitlines()) == 1
    assert leftovers(folder) == []
