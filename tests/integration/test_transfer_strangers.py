"""What anyone who reaches the KV port can do without the secret: be told no, soon, and take nothing from others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

import pytest

from shared.errors import TransferError
from shared.transfer.address import Address, decode_address, encode_address
from shared.transfer.auth import GREETING, MAC_BYTES, NONCE_BYTES, authenticate_exporter, authenticate_importer
from shared.transfer.base import HANDSHAKE_TIMEOUT_S, ExportKey, TransferLimits
from shared.transfer.connections import MAX_STRANGERS, Connections
from shared.transfer.control import Welcome
from shared.transfer.frame import Kind
from shared.transfer.link import Link, close_writer
from tests.transfer_rig import DEADLINE_S, IDENTITY, LAYOUT, LIMITS, SECRET, Pair, failure, transfer_pair

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PATIENT = replace(LIMITS, progress_timeout_s=60.0)
HELLO_LENGTH = len(GREETING) + NONCE_BYTES
NO = bytes(MAC_BYTES)


@asynccontextmanager
async def stranger(pair: Pair) -> AsyncIterator[Stream]:
    address = decode_address(pair.exporter.address)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        yield reader, writer
    finally:
        await close_writer(writer)


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the other side closes."""
    with suppress(ConnectionResetError):
        return await asyncio.wait_for(reader.read(), DEADLINE_S)
    return b""


async def refused(pair: Pair, reason: str, count: int = 1) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while pair.exporter.refused.get(reason, 0) < count:
            await asyncio.sleep(0.005)


def test_the_handshake_has_a_deadline_of_its_own() -> None:
    assert TransferLimits(progress_timeout_s=600.0).handshake_timeout_s == HANDSHAKE_TIMEOUT_S
    assert TransferLimits(progress_timeout_s=0.2).handshake_timeout_s == 0.2


@pytest.mark.parametrize("sent", [b"", b"x", bytes(NONCE_BYTES), bytes(NONCE_BYTES + MAC_BYTES - 1)])
async def test_half_a_handshake_is_closed_at_the_deadline(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patience of a link, 60 s here, is not given to it."""
    monkeypatch.setattr("shared.transfer.base.HANDSHAKE_TIMEOUT_S", 0.2)
    async with transfer_pair(limits=PATIENT) as pair, stranger(pair) as (reader, writer):
        writer.write(sent)
        assert (await rest(reader)).startswith(GREETING)
        await refused(pair, "timeout")


async def test_a_stranger_who_leaves_in_mid_handshake_is_a_lost_peer() -> None:
    async with transfer_pair(limits=PATIENT) as pair:
        async with stranger(pair) as (_, writer):
            writer.write(b"half")
        await refused(pair, "peer_lost")


async def test_a_whole_recorded_handshake_is_worth_nothing_later() -> None:
    """Recorded from a real importer, then played again: the exporter's nonce is another."""
    recorded = bytearray()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keep: bytearray | None) -> None:
        with suppress(OSError):
            while piece := await reader.read(4096):
                if keep is not None:
                    keep += piece
                writer.write(piece)
        await close_writer(writer)

    async with transfer_pair() as pair:
        address = decode_address(pair.exporter.address)
        tasks: list[asyncio.Task[None]] = []

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(address.host, address.port)
            tasks.append(asyncio.create_task(relay(reader, far_writer, recorded)))
            tasks.append(asyncio.create_task(relay(far_reader, writer, None)))

        server = await asyncio.start_server(between, "127.0.0.1", 0)
        export = pair.finished(4)
        through = encode_address(Address("127.0.0.1", server.sockets[0].getsockname()[1], {"tcp": {}}))
        await pair.importer.pull(through, export.key, 4, [1])
        server.close()
        await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
        assert len(recorded) > NONCE_BYTES + MAC_BYTES, "the recording holds the handshake and what followed"
        async with stranger(pair) as (reader, writer):
            writer.write(bytes(recorded))
            assert (await rest(reader))[HELLO_LENGTH:] in (b"", NO)
        await refused(pair, "auth")
        assert pair.exporter.frames_sent == 1


async def test_a_flood_before_the_proof_stays_outside() -> None:
    """Neither parsed nor kept: the stranger is told no after 64 bytes, whatever else it sends."""
    async with transfer_pair(limits=PATIENT) as pair, stranger(pair) as (reader, writer):
        with suppress(ConnectionError):
            for _ in range(256):
                writer.write(b"SLKV\x01\x01" * (64 << 10))
                await asyncio.wait_for(writer.drain(), DEADLINE_S)
        assert (await rest(reader))[HELLO_LENGTH:] in (b"", NO)
        await refused(pair, "auth")


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.FRAME, Kind.FINAL])
async def test_a_huge_length_is_refused_from_a_proven_peer_too(kind: Kind) -> None:
    async with transfer_pair(limits=PATIENT) as pair, stranger(pair) as (reader, writer):
        await authenticate_importer(reader, writer, SECRET)
        writer.write(b"SLKV" + bytes([1, kind]) + (4096).to_bytes(2, "big") + b"\xff" * 4 + bytes(8))
        await rest(reader)
        await refused(pair, "malformed")


@pytest.mark.parametrize("kind", [Kind.PROGRESS, Kind.ACK, Kind.WELCOME])
async def test_a_proven_peer_begins_with_hello(kind: Kind) -> None:
    async with transfer_pair(limits=PATIENT) as pair, stranger(pair) as (reader, writer):
        link = Link(reader, writer, await authenticate_importer(reader, writer, SECRET), DEADLINE_S)
        await link.send(kind)
        await rest(reader)
        await refused(pair, "malformed")


async def test_two_hundred_silent_connections_keep_nobody_out() -> None:
    """Every one of them would sit there for 60 s; pulls go through, and no more than the bound are held."""
    async with transfer_pair(limits=replace(PATIENT, max_connections=2)) as pair, AsyncExitStack() as stack:
        held = [await stack.enter_async_context(stranger(pair)) for _ in range(200)]
        await refused(pair, "peer_lost", 200 - MAX_STRANGERS)
        for _ in range(3):
            export = pair.finished(8)
            await pair.pull(export)
            pair.assert_received(export)
        connections = pair.exporter._connections
        assert connections.num_strangers <= MAX_STRANGERS
        for _, writer in held:
            writer.close()


async def test_only_a_connections_own_task_can_prove_it() -> None:
    connections = Connections(max_links=1)
    with pytest.raises(RuntimeError):
        connections.prove()
    await connections.close(1)


async def test_an_answer_out_of_place_is_malformed() -> None:
    """An exporter that knows the secret but answers HELLO with something else is not taken for a welcome."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(TransferError):
            link = Link(reader, writer, await authenticate_exporter(reader, writer, SECRET), DEADLINE_S)
            await link.receive()
            await link.send(Kind.FINAL, Welcome(LAYOUT.fingerprint(), IDENTITY).encode())
            await link.receive()
        await close_writer(writer)

    tasks: list[asyncio.Task[None]] = []
    server = await asyncio.start_server(lambda r, w: tasks.append(asyncio.create_task(serve(r, w))), "127.0.0.1", 0)
    async with transfer_pair() as pair:
        address = encode_address(Address("127.0.0.1", server.sockets[0].getsockname()[1], {"tcp": {}}))
        error = await failure(pair.importer.pull(address, ExportKey("r", 1, "n"), 4, [1]))
        assert error.reason == "malformed"
    server.close()
    await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
