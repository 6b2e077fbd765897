"""The handshake: both sides prove the secret, and every connection has keys of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shared.errors import ConfigurationError, TransferError
from shared.transfer.auth import (
    GREETING,
    MAC_BYTES,
    NONCE_BYTES,
    LinkKeys,
    authenticate_exporter,
    authenticate_importer,
    check_secret,
)

SECRET = b"correct horse battery staple"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[Stream, Stream]]:
    """Two ends of one connection: exporter's, importer's."""
    first, second = socket.socketpair()
    ends = await asyncio.open_connection(sock=first), await asyncio.open_connection(sock=second)
    try:
        yield ends
    finally:
        for _, writer in ends:
            writer.close()
            await writer.wait_closed()


async def _handshake(exporter_secret: bytes, importer_secret: bytes) -> list[LinkKeys | BaseException]:
    async with connection() as (exporter, importer):
        return list(
            await asyncio.gather(
                authenticate_exporter(*exporter, exporter_secret),
                authenticate_importer(*importer, importer_secret),
                return_exceptions=True,
            )
        )


async def test_equal_secrets_give_matching_keys() -> None:
    exporter, importer = await _handshake(SECRET, SECRET)
    assert isinstance(exporter, LinkKeys)
    assert isinstance(importer, LinkKeys)
    assert exporter.outgoing == importer.incoming
    assert exporter.incoming == importer.outgoing
    assert exporter.outgoing != exporter.incoming


async def test_every_connection_has_its_own_keys() -> None:
    keys = [await _handshake(SECRET, SECRET) for _ in range(2)]
    first, second = keys[0][0], keys[1][0]
    assert isinstance(first, LinkKeys)
    assert isinstance(second, LinkKeys)
    assert len({first.outgoing, first.incoming, second.outgoing, second.incoming}) == 4


@pytest.mark.parametrize("other", [b"correct horse battery stapl", SECRET + b"\0", b"x" * 28])
async def test_unequal_secrets_are_refused_on_both_sides(other: bytes) -> None:
    for outcome in await _handshake(SECRET, other):
        assert isinstance(outcome, TransferError)
        assert outcome.reason == "auth"


async def test_the_proof_of_one_role_is_none_of_the_other() -> None:
    """An impostor without the secret sends the importer's own proof back."""
    async with connection() as ((reader, writer), importer):
        task = asyncio.create_task(authenticate_importer(*importer, SECRET))
        writer.write(GREETING + bytes(NONCE_BYTES))
        answer = await reader.readexactly(NONCE_BYTES + MAC_BYTES)
        writer.write(answer[NONCE_BYTES:])
        with pytest.raises(TransferError) as raised:
            await task
        assert raised.value.reason == "auth"


async def test_a_recorded_proof_is_worth_nothing_later() -> None:
    async with connection() as (exporter, (reader, writer)):
        task = asyncio.create_task(authenticate_exporter(*exporter, SECRET))
        challenge = await reader.readexactly(len(GREETING) + NONCE_BYTES)
        recorded = await _answer_to(challenge)
        writer.write(recorded)
        assert isinstance(await task, LinkKeys)
    async with connection() as (exporter, (reader, writer)):
        task = asyncio.create_task(authenticate_exporter(*exporter, SECRET))
        writer.write(recorded)
        with pytest.raises(TransferError) as raised:
            await task
        assert raised.value.reason == "auth"


async def _answer_to(challenge: bytes) -> bytes:
    """What an importer with the secret says to `challenge`."""
    async with connection() as ((reader, writer), importer):
        task = asyncio.create_task(authenticate_importer(*importer, SECRET))
        writer.write(challenge)
        answer = await reader.readexactly(NONCE_BYTES + MAC_BYTES)
        task.cancel()
        await asyncio.wait([task])
        return answer


async def test_a_stranger_is_answered_zeros() -> None:
    async with connection() as (exporter, (reader, writer)):
        writer.write(bytes(NONCE_BYTES + MAC_BYTES))
        with pytest.raises(TransferError):
            await authenticate_exporter(*exporter, SECRET)
        await reader.readexactly(len(GREETING) + NONCE_BYTES)
        assert await reader.readexactly(MAC_BYTES) == bytes(MAC_BYTES)


async def test_another_service_at_the_address_is_refused() -> None:
    async with connection() as ((_, writer), importer):
        writer.write(b"HTTP/1.1 400 Bad Request\r\n" + bytes(100))
        with pytest.raises(TransferError, match="does not belong to a KV exporter"):
            await authenticate_importer(*importer, SECRET)


async def test_no_more_than_the_fixed_lengths_is_read() -> None:
    async with connection() as (exporter, (_, writer)):
        writer.write(bytes(NONCE_BYTES + MAC_BYTES) + b"rest")
        with pytest.raises(TransferError):
            await authenticate_exporter(*exporter, SECRET)
        assert await exporter[0].read(4) == b"rest"


def test_a_secret_has_a_least_length() -> None:
    check_secret(b"s" * 16)
    with pytest.raises(ConfigurationError, match="at least 16 bytes"):
        check_secret(b"s" * 15)
