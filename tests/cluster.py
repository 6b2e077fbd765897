"""The real topology for tests: embedded bus, worker and gateway processes, on a small model.

Every process is a child with its own log file; `stop` ends them all and fails when one does not end by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

from shared.bus.connection import as_text
from shared.bus.embedded import EmbeddedServer
from shared.protocol.codec import decode
from shared.protocol.keys import Keys
from shared.protocol.messages import WorkerBeat

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0


@dataclass(slots=True, eq=False)
class Process:
    role: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self.popen.kill()
        self.popen.wait()

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass(slots=True)
class Cluster:
    """`with Cluster(folder, model) as cluster:` starts workers and one gateway, and waits until they are ready.

    `module` is run instead of the command line, by tests that change something in every process.
    """

    folder: Path
    model_path: str
    prefill: int = 1
    decode: int = 1
    api_key: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    module: str = "services.cli"
    model: str = ""
    url: str = ""
    redis_url: str = ""
    processes: list[Process] = field(default_factory=list)
    _server: EmbeddedServer = field(default_factory=EmbeddedServer)

    def __enter__(self) -> Cluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._server.start()
        self.redis_url = self._server.url
        try:
            for role in ["prefill"] * self.prefill + ["decode"] * self.decode:
                self.start(role)
            self.start_gateway()
            self.wait_ready()
            self.model = self.get("/v1/models")["data"][0]["id"]
        except BaseException:
            self.stop(strict=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(strict=kind is None)

    def start(self, role: str, **settings: str) -> Process:
        """Start one process of `role`; `settings` are environment variables on top of the cluster's."""
        log = self.folder / f"{role}-{len(self.processes)}.log"
        with log.open("wb") as out:
            popen = subprocess.Popen(
                [sys.executable, "-m", self.module, role], env=self._environment(settings), stdout=out, stderr=out
            )
        process = Process(role, popen, log)
        self.processes.append(process)
        return process

    def start_gateway(self) -> Process:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self.start("gateway", SLIPSTREAM_GATEWAY__PORT=str(port))

    def of_role(self, role: str) -> list[Process]:
        """Running processes of a role, oldest first."""
        return [process for process in self.processes if process.role == role and process.popen.poll() is None]

    def wait_ready(self, prefill: int | None = None, decode: int | None = None) -> None:
        """Until /health is 200 and that many workers of each role are ready."""
        wanted = {"prefill": prefill or self.prefill, "decode": decode or self.decode}

        def ready() -> bool:
            beats = [beat for beat in self.workers() if beat["state"] == "ready"]
            roles = [beat["role"] for beat in beats]
            return all(roles.count(role) >= n for role, n in wanted.items()) and self.status("/health") == 200

        self.wait_for(ready, "the cluster to be ready")

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = [process for process in self.processes if process.popen.poll() not in (None, 0, -9)]
            if time.monotonic() > deadline or ended:
                logs = "\n".join(f"== {p.role} {p.pid}\n{p.log_text()[-2000:]}" for p in self.processes)
                raise AssertionError(f"gave up waiting for {what}\n{logs}")
            time.sleep(0.05)

    def workers(self) -> list[dict[str, Any]]:
        """What `slipstream ps --json` prints."""
        command = [sys.executable, "-m", "services.cli", "ps", "--json", "--log-level", "error"]
        result = subprocess.run(command, env=self._environment({}), capture_output=True, text=True, check=False)
        beats: list[dict[str, Any]] = json.loads(result.stdout) if result.returncode == 0 else []
        return beats

    def busy(self, role: str) -> list[Process]:
        """Processes of a role that own a request now; a heartbeat tells of it up to its interval later."""
        pids: set[int] = set()
        with redis.Redis.from_url(self.redis_url) as client:
            for key in client.scan_iter(match="*:req:*"):
                state, owner = (as_text(value or b"") for value in client.hmget(key, "state", "owner"))
                beat = client.get(Keys("default").worker(owner.partition(":")[0])) if state == role and owner else None
                if beat:
                    pids.add(decode(WorkerBeat, beat).pid)
        return [process for process in self.of_role(role) if process.pid in pids]

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self._request(path), timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self._request(path), timeout=30) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any], timeout: float = 60) -> Any:
        """The decoded answer; HTTP errors are raised as urllib's HTTPError."""
        with urllib.request.urlopen(self._request(path, body), timeout=timeout) as response:
            return json.load(response)

    def complete(self, prompt: str | list[int], **fields: Any) -> dict[str, Any]:
        """A whole /v1/completions answer, with token ids."""
        body = {"model": self.model, "prompt": prompt, "return_token_ids": True, **fields}
        answer: dict[str, Any] = self.post("/v1/completions", body)
        return answer

    def metric(self, name: str) -> float:
        """Sum of all samples of a metric of the gateway."""
        with urllib.request.urlopen(self._request("/metrics"), timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def stop(self, *, strict: bool) -> None:
        """SIGTERM everything; with `strict`, a process that has to be killed is a failure."""
        stubborn = []
        for roles in (("gateway",), ("prefill", "decode")):
            running = [process for process in self.processes if process.role in roles and process.popen.poll() is None]
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    process.popen.send_signal(signal.SIGCONT)
                    process.popen.terminate()
            for process in running:
                try:
                    process.popen.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    stubborn.append(process)
                    process.kill()
        self._server.stop()
        if strict and stubborn:
            logs = "\n".join(f"== {p.role}\n{p.log_text()[-3000:]}" for p in stubborn)
            raise AssertionError(f"these processes did not end by themselves:\n{logs}")

    def _request(self, path: str, body: dict[str, Any] | None = None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(self.url + path, data=data, headers=headers)

    def _environment(self, settings: dict[str, str]) -> dict[str, str]:
        ours = {
            "SLIPSTREAM_REDIS__URL": self.redis_url,
            "SLIPSTREAM_MODEL": self.model_path,
            "SLIPSTREAM_CLUSTER_SECRET": "secret of the tests",
            "SLIPSTREAM_API_KEYS": self.api_key,
            "SLIPSTREAM_ENGINE__THREADS": "1",
            "SLIPSTREAM_ENGINE__KV_CACHE_TOKENS": "4096",
            "SLIPSTREAM_DRAIN_TIMEOUT_S": "8",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
        return inherited | ours | self.settings | settings
