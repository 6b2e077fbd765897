"""A process that has imported everything and forks services on demand: a worker starts in half a second, not in four.

It reads one JSON object a line from standard input, `{"command": [...], "environment": {...}, "log": path}`, and
answers with one a line: `{"started": pid}` for each of them in order, and `{"ended": pid, "status": exit status or
minus the signal}` whenever a child has ended. A command of one word that names a service is forked, any other one is
executed.
The process has one thread only, so that forking is safe. When its input closes, it kills its children and ends.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
from io import FileIO
from typing import Any

MODULES = (
    "services.cli.main",
    "services.gateway.app",
    "services.prefill.main",
    "services.decode.main",
)
FORKED = ("prefill", "decode", "gateway")
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main() -> None:
    """Serve until standard input closes."""
    for name in MODULES:
        importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) != 1:
        raise SystemExit("an imported library started a thread; forking would not be safe")
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    orders = FileIO(sys.stdin.fileno(), closefd=False)  # without a buffer, in which an order could wait unseen
    _say({"ready": os.getpid()})
    while True:
        readable, _, _ = select.select([sys.stdin.fileno(), awake], [], [])
        if awake in readable:
            os.read(awake, 4096)
            _reap(children)
        if sys.stdin.fileno() in readable:
            line = orders.readline()
            if not line:
                break
            children.add(_fork(json.loads(line)))
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _fork(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        _say({"started": pid})
        return pid
    status = 1
    try:
        _become(order)
        _run(order["command"])
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(command: list[str]) -> None:
    if len(command) != 1 or command[0] not in FORKED:
        os.execvp(command[0], command)
    from services.cli.main import app
    from shared import faultpoints

    faultpoints.fault_point = faultpoints.chosen(os.environ)
    app(command, prog_name="slipstream")


def _become(order: dict[str, Any]) -> None:
    """Look like a process that was started afresh: signals, environment, standard streams."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.environ["_SLIPSTREAM_PARENT_PID"] = str(os.getppid())
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.closerange(3, 256)


def _reap(children: set[int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        children.discard(pid)
        _say({"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _say(message: dict[str, int]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
