"""The bus over TLS (`rediss://`): lane and token channel, whose sockets are not left to the client library."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import uvloop
from redis.exceptions import ConnectionError as RedisConnectionError

from shared.bus.connection import check, connect, connect_blocking
from shared.bus.embedded import EmbeddedServer
from shared.bus.events import EventFeed, Resubscribed
from shared.bus.lane import open_lane
from shared.bus.results import Appended
from shared.bus.subscription import Subscription
from shared.errors import ConfigurationError
from shared.protocol.keys import Keys
from shared.protocol.messages import Tokens
from tests.integration.bus_helpers import Bench, tokens
from tests.integration.test_subscription import exchange, received, subscribed
from tests.integration.tls import Certificate, TlsProxy

TIMEOUT_S = 20.0
HOST = "127.0.0.1"
REFUSED = "certificate verify failed"

Run = Callable[[Awaitable[None]], None]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate.make(tmp_path_factory.mktemp("certificate"), HOST)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """An authority that has signed nothing here."""
    return Certificate.make(tmp_path_factory.mktemp("stranger"), HOST)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    """On a port: a proxy has to reach it."""
    with EmbeddedServer(port=0) as own:
        yield own


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a test on the loop of the standard library, and on the one that services run on."""

    async def bounded(test: Awaitable[None]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test

    def run_on_loop(test: Awaitable[None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(bounded(test))

    return run_on_loop


@asynccontextmanager
async def behind_tls(server: EmbeddedServer, certificate: Certificate) -> AsyncIterator[tuple[str, TlsProxy]]:
    """The server's URL without a word on whom to trust, and the proxy that everything has to come through."""
    address, _, port = server.url.removesuffix("/0").rpartition(":")
    proxy = TlsProxy(int(port))
    async with proxy.listening(certificate) as guarded:
        yield f"{address.replace('redis://', 'rediss://', 1)}:{guarded}/0", proxy


def trusting(url: str, certificate: Certificate) -> str:
    return f"{url}?ssl_ca_certs={certificate.certificate}"


async def heard(feed: EventFeed, count: int) -> list[int]:
    """The next tokens that are published; the subscription must not be cut meanwhile."""
    found: list[int] = []
    async for published in feed:
        assert not isinstance(published, Resubscribed)
        found += [token for _, entry in published if isinstance(entry.event, Tokens) for token in entry.event.tokens]
        if len(found) >= count:
            break
    return found


def test_appends_by_the_lane_are_heard_on_the_channel(
    run: Run, server: EmbeddedServer, certificate: Certificate, keys: Keys
) -> None:
    async def test() -> None:
        async with behind_tls(server, certificate) as (plain_url, proxy):
            url = trusting(plain_url, certificate)
            async with connect(url) as client, connect_blocking(url) as blocking, open_lane(url, TIMEOUT_S) as lane:
                bench, feed = Bench.of(client, keys, lane=lane), EventFeed(blocking, keys, "g")
                lease = await bench.committed()
                await feed.subscribe()
                before = proxy.num_forwarded
                held = [1]
                for token in range(50):
                    assert await bench.append(lease, tokens(held, [token])) == [Appended()]
                    held.append(token)
                assert proxy.num_forwarded == before + 1, "the lane's one connection"
                assert await heard(feed, 50) == held[1:]
                assert (await bench.journal()).choices[0].tokens == held
                await feed.aclose()

    run(test())


def test_messages_come_whole_and_in_order(
    run: Run, server: EmbeddedServer, certificate: Certificate, deployment: str
) -> None:
    async def test() -> None:
        async with behind_tls(server, certificate) as (url, _):
            await exchange(trusting(url, certificate), deployment)

    run(test())


def test_a_cut_connection_is_told_after_what_came_before(
    run: Run, server: EmbeddedServer, certificate: Certificate, deployment: str
) -> None:
    async def test() -> None:
        async with (
            behind_tls(server, certificate) as (url, _),
            subscribed(trusting(url, certificate), deployment) as (subscription, commands),
        ):
            await commands.publish(deployment, b"last")
            await commands.client_kill_filter(_type="pubsub")
            assert await received(subscription, 1) == [b"last"]
            with pytest.raises(OSError, match="closed the connection"):
                await received(subscription, 1)

    run(test())


async def is_refused(url: str) -> None:
    """Each way to the server ends with the reason, and the check at the start with what to do."""
    async with connect(url) as client, connect_blocking(url) as blocking, open_lane(url, TIMEOUT_S) as lane:
        with pytest.raises(RedisConnectionError, match=REFUSED):
            await Subscription.open(blocking, "channel")
        with pytest.raises(RedisConnectionError, match=REFUSED):
            await lane.call("0" * 40, [], [])
        with pytest.raises(ConfigurationError, match=r"certificate of Redis.*\?ssl_ca_certs="):
            await check(client)


def test_a_server_of_an_unknown_authority_is_told_nothing(
    run: Run, server: EmbeddedServer, certificate: Certificate, stranger: Certificate
) -> None:
    async def test() -> None:
        async with behind_tls(server, certificate) as (url, proxy):
            await is_refused(trusting(url, stranger))
            assert proxy.num_forwarded == 0

    run(test())


def test_a_server_of_another_name_is_told_nothing(
    run: Run, server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = Certificate.make(tmp_path_factory.mktemp("elsewhere"), "127.0.0.2")

    async def test() -> None:
        async with behind_tls(server, elsewhere) as (url, proxy):
            await is_refused(trusting(url, elsewhere))
            assert proxy.num_forwarded == 0

    run(test())
