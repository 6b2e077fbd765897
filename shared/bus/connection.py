"""Clients of the one Redis: every timeout and retry is set here, none is left to the library.

Commands may be retried, because every script may be repeated. Blocking reads and subscriptions
have clients of their own, with a socket timeout above their longest block and no silent retry:
their loops have to notice a cut connection.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Mapping
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from shared.errors import BusUnavailable, ConfigurationError

MAX_BLOCK_MS = 2000
COMMAND_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 5.0
BLOCKING_TIMEOUT_S = MAX_BLOCK_MS / 1000 + COMMAND_TIMEOUT_S
MAX_CONNECTIONS = 64
MIN_REDIS = (7, 0, 0)
MIN_VALKEY = (8, 0, 0)


def connect(url: str, timeout_s: float = COMMAND_TIMEOUT_S) -> Redis:
    """Client for ordinary commands and scripts: 3 retries within about a second, each within `timeout_s`."""
    return _client(url, timeout_s, Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), 3))


def connect_blocking(url: str) -> Redis:
    """Client for XREADGROUP and subscriptions: blocks of at most `MAX_BLOCK_MS`, no retries."""
    return _client(url, BLOCKING_TIMEOUT_S, Retry(NoBackoff(), 0))


def connect_lane(url: str) -> Redis:
    """Client whose connections wait without bound and repeat nothing: a lane has a time for the whole call."""
    return _client(url, None, Retry(NoBackoff(), 0))


def _client(url: str, timeout: float | None, retry: Retry) -> Redis:
    keepalive = {} if url.startswith("unix:") else {"socket_keepalive": True}
    try:
        return Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            health_check_interval=15,
            max_connections=MAX_CONNECTIONS,
            retry=retry,
            protocol=2,
            legacy_responses=False,
            decode_responses=False,
            # Else the library introduces itself before it looks at the reply to a health check, and where the server
            # asks for a password that the URL lacks, connecting and checking call each other without end.
            driver_info=None,
            **keepalive,
        )
    except ValueError as error:
        raise ConfigurationError(f"SLIPSTREAM_REDIS__URL is not a Redis URL: {error}") from None


def as_text(value: bytes | str | int) -> str:
    """A reply's text; our clients answer bytes, the library's types allow more."""
    return value.decode() if isinstance(value, bytes) else str(value)


async def check(client: Redis) -> str:
    """Ask for the server's version and check it; answers "Valkey 9.1.2" or "Redis 7.0.15"."""
    try:
        info = await client.info("server")
    except NoPermissionError:
        raise ConfigurationError(
            "the user in SLIPSTREAM_REDIS__URL may not run INFO; give it the rights listed in docker-compose.yml"
        ) from None
    except (RedisError, OSError) as error:
        if _is_refused(error):
            raise ConfigurationError("Redis refused user or password; set them in SLIPSTREAM_REDIS__URL") from None
        if _is_untrusted(error):
            raise ConfigurationError(
                "the certificate of Redis cannot be verified; name the file of its authority in SLIPSTREAM_REDIS__URL, "
                "as in rediss://redis.example:6379/0?ssl_ca_certs=/etc/redis/ca.pem, and call the server by the name "
                "that the certificate has"
            ) from None
        raise BusUnavailable(
            f"Redis cannot be reached ({type(error).__name__}); is SLIPSTREAM_REDIS__URL right?"
        ) from None
    return require_version(info)


def _is_refused(error: BaseException) -> bool:
    """Whether a wrong password is behind `error`."""
    return any(isinstance(one, AuthenticationError) for one in _chain(error))


def _is_untrusted(error: BaseException) -> bool:
    """Whether a certificate that TLS does not accept is behind `error`."""
    return any(isinstance(one, ssl.SSLCertVerificationError) for one in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it: the library wraps the one in the other, with and without saying so."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def require_version(info: Mapping[str, Any]) -> str:
    """Name and version from INFO server; raises ConfigurationError below Redis 7.0 and Valkey 8.0."""
    is_valkey = info.get("server_name") == "valkey" or "valkey_version" in info
    text = str(info.get("valkey_version" if is_valkey else "redis_version", ""))
    name, least = ("Valkey", MIN_VALKEY) if is_valkey else ("Redis", MIN_REDIS)
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if found is None:
        raise ConfigurationError(f"the server at SLIPSTREAM_REDIS__URL does not tell its version (it says {text!r})")
    if tuple(int(part or 0) for part in found.groups()) < least:
        raise ConfigurationError(f"{name} {text} is too old; Slipstream needs Redis ≥ 7.0 or Valkey ≥ 8.0")
    return f"{name} {text}"
