"""Which servers are accepted, and what the refusal says."""

from __future__ import annotations

import pytest

from shared.bus.connection import connect, require_version
from shared.errors import ConfigurationError


@pytest.mark.parametrize(
    ("info", "answer"),
    [
        ({"redis_version": "7.0.15"}, "Redis 7.0.15"),
        ({"redis_version": "8.4.0"}, "Redis 8.4.0"),
        ({"redis_version": "7.2.4", "valkey_version": "8.0.1", "server_name": "valkey"}, "Valkey 8.0.1"),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, "Valkey 9.1.2"),
    ],
)
def test_servers_that_are_new_enough(info: dict[str, str], answer: str) -> None:
    assert require_version(info) == answer


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"redis_version": "6.2.14"}, "Redis 6.2.14 is too old"),
        ({"redis_version": "7.2.4", "valkey_version": "7.2.5", "server_name": "valkey"}, "Valkey 7.2.5 is too old"),
        ({}, "does not tell its version"),
    ],
)
def test_servers_that_are_not(info: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        require_version(info)


def test_a_url_that_is_none_names_the_setting() -> None:
    with pytest.raises(ConfigurationError, match="SLIPSTREAM_REDIS__URL"):
        connect("localhost:6379")
