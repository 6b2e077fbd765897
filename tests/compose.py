"""What the containers of docker-compose.yml run, for tests without containers."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from shared.bus.embedded import find_binary

FILE = Path(__file__).resolve().parents[1] / "docker-compose.yml"
_ROOT_PASSWORD = "of-the-tests"

# Stands in for the image's program: the rules it is given, and one user more, with which a test looks at the rest.
_SERVER = """#!/bin/sh
printf 'user root on >%s ~* &* +@all\\n' "{password}" >> "$2"
exec "{binary}" "$@" --port 0 --unixsocket "{folder}/bus.sock"
"""


def services(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The compose file's services, its `${NAME:-default}` filled in from `variables`."""

    def fill(match: re.Match[str]) -> str:
        return (variables or {}).get(match[1]) or match[2] or ""

    text = re.sub(r"(?<!\$)\$\{([A-Z0-9_]+)(?::-([^}]*))?\}", fill, FILE.read_text())
    loaded: dict[str, Any] = yaml.safe_load(text)["services"]
    return loaded


class RedisService:
    """The Redis of the compose file: its command and its users, on a Unix socket in `folder`."""

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        self._folder = folder
        self._service = services(variables)["redis"]
        self._users = services(variables)

    def url(self, service: str) -> str:
        """How the containers of `service` reach Redis, with this socket in place of the host."""
        url: str = self._users[service]["environment"]["SLIPSTREAM_REDIS__URL"]
        user, password = re.fullmatch(r"redis://(\w+):([^@]+)@redis:6379/0", url).groups()  # type: ignore[union-attr]
        return self.url_of(user, password)

    def url_of(self, user: str, password: str) -> str:
        return f"unix://{user}:{password}@{self._folder}/bus.sock?db=0"

    @property
    def root_url(self) -> str:
        return self.url_of("root", _ROOT_PASSWORD)

    @contextmanager
    def running(self) -> Iterator[None]:
        command = [part.replace("$$", "$").replace("/data", str(self._folder)) for part in self._service["command"]]
        program = self._folder / "redis-server"
        program.write_text(_SERVER.format(password=_ROOT_PASSWORD, binary=find_binary(), folder=self._folder))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        env = {**self._service["environment"], "PATH": f"{self._folder}:{os.environ['PATH']}"}
        process = subprocess.Popen(command, env={**env, "TMPDIR": str(self._folder)}, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 20
            while not (self._folder / "bus.sock").exists():
                assert process.poll() is None, "the server stopped at once"
                assert time.monotonic() < deadline, "the server did not come up"
                time.sleep(0.01)
            yield
        finally:
            process.terminate()
            process.wait(10)
