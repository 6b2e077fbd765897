"""Servers under measurement are awaited and stopped; one that does not start says why."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.server import Server
from tests.faults.ports import free_port

ANSWERS = """
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

def end(*_):  # not by an exception, which may come where it is only reported
    print("interrupted", flush=True)
    os._exit(0)

signal.signal(signal.SIGINT, end)

class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

print("listening", flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""


def test_a_server_runs_while_it_is_measured_and_is_interrupted_afterwards(tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = Server("tiny", (sys.executable, "-c", ANSWERS, "{port}"))
    with server.running(free_port(), log) as process:
        assert process.poll() is None
        assert "listening" in log.read_text()
    assert process.returncode == 0
    assert "interrupted" in log.read_text()


def test_a_server_that_ends_at_once_is_told_with_its_command_and_last_words(tmp_path: Path) -> None:
    server = Server("broken", (sys.executable, "-c", "import sys; sys.exit('no such model')", "{port}"))
    with (
        pytest.raises(RuntimeError, match=r"broken did not start: .*no such model.*\nno such model$"),
        server.running(free_port(), tmp_path / "log"),
    ):
        pytest.fail("it was measured all the same")


MEASURES_FOR_EVER = """
import sys
import time
from pathlib import Path
from benchmarks.server import Server

with Server("tiny", (sys.executable, "-c", sys.argv[1], "{port}")).running(int(sys.argv[2]), Path(sys.argv[3])):
    print("measuring", flush=True)
    time.sleep(600)
"""


def test_a_benchmark_that_is_terminated_leaves_no_server_running(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", MEASURES_FOR_EVER, ANSWERS, str(free_port()), str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as benchmark:
        assert benchmark.stdout is not None
        assert benchmark.stdout.readline() == b"measuring\n"
        benchmark.terminate()
    assert benchmark.returncode == 128 + signal.SIGTERM
    assert "interrupted" in log.read_text()
