"""Fixtures shared by all tests: one real server a session, one deployment a test."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import structlog
from redis.asyncio import Redis

from shared.bus.connection import connect, connect_blocking
from shared.bus.embedded import EmbeddedServer
from shared.protocol.keys import Keys

# Before torch is loaded: on shared cores, threads that spin while they wait make small products many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A test that sets up logging, as every command does, leaves it as it was: tests run in any order."""
    root = logging.getLogger()
    config, handlers, level = structlog.get_config(), root.handlers[:], root.level
    yield
    structlog.configure(**config)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of a Valkey server of this test session."""
    with EmbeddedServer() as server:
        yield server.url


@pytest.fixture
def deployment() -> str:
    """A deployment name no other test uses, so that tests share a server without meeting."""
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
def keys(deployment: str) -> Keys:
    return Keys(deployment)


@pytest_asyncio.fixture
async def redis_client(redis_url: str) -> AsyncIterator[Redis]:
    """Client for commands, closed after the test."""
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest_asyncio.fixture
async def blocking_client(redis_url: str) -> AsyncIterator[Redis]:
    """Client for blocking reads and subscriptions, closed after the test."""
    client = connect_blocking(redis_url)
    yield client
    await client.aclose()
