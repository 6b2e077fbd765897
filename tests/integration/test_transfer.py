"""Exporter and importer against each other and against peers that misbehave. One transport is enough here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from shared.errors import ConfigurationError, TransferError
from shared.kv.cache import KVCache
from shared.transfer import exporter as exporter_module
from shared.transfer.address import Address, decode_address, encode_address
from shared.transfer.auth import GREETING, MAC_BYTES, NONCE_BYTES, authenticate_importer
from shared.transfer.base import ExportKey, Identity, Part, TransferLimits
from shared.transfer.control import Hello, Notice, Welcome
from shared.transfer.exporter import Exporter
from shared.transfer.frame import Kind
from shared.transfer.importer import Importer
from shared.transfer.link import Link
from tests.transfer_rig import (
    DEADLINE_S,
    IDENTITY,
    IMPATIENT,
    LAYOUT,
    LIMITS,
    NUM_BLOCKS,
    SECRET,
    failure,
    fake_exporter,
    fake_reader,
    random_cache,
    readers_are,
    sealed,
    transfer_pair,
    until_abort,
    within,
)

KEY = ExportKey("request", 3, "nonce")
WHOLE = Part(0, LAYOUT.num_layers, 0, 1, LAYOUT.block_size)


# Who may pull what.


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (replace(KEY, epoch=2), "epoch"),
        (replace(KEY, epoch=4), "epoch"),
        (replace(KEY, nonce="other"), "epoch"),
        (replace(KEY, request_id="another"), "refused"),
    ],
)
async def test_another_attempt_is_refused(key: ExportKey, reason: str) -> None:
    async with transfer_pair() as pair:
        pair.exporter.open(KEY, [10], 4)
        error = await failure(pair.importer.pull(pair.exporter.address, key, 4, [1]))
        assert error.reason == reason
        assert pair.exporter.refused == pair.importer.refused == {reason: 1}


async def test_another_length_is_refused() -> None:
    async with transfer_pair() as pair:
        pair.exporter.open(KEY, [10, 11], 8)
        error = await failure(pair.importer.pull(pair.exporter.address, KEY, 7, [1, 2]))
        assert error.reason == "coverage"


@pytest.mark.parametrize(
    ("layout", "identity"),
    [
        (replace(LAYOUT, num_layers=4), IDENTITY),
        (replace(LAYOUT, dtype="bfloat16"), IDENTITY),
        (replace(LAYOUT, block_size=8), IDENTITY),
        (LAYOUT, replace(IDENTITY, numerics="ffffffffffffffff")),
        (LAYOUT, replace(IDENTITY, model="other")),
    ],
)
async def test_unlike_workers_are_refused_with_both_sides_named(layout: object, identity: Identity) -> None:
    async with transfer_pair() as pair:
        export = pair.finished(4)
        assert isinstance(layout, type(LAYOUT))
        other = Importer(KVCache(layout, NUM_BLOCKS), identity, SECRET, LIMITS, ("tcp",))
        error = await failure(other.pull(pair.exporter.address, export.key, 4, [1]))
        await other.close()
        assert error.reason == "layout"
        for side in (LAYOUT.fingerprint(), layout.fingerprint(), IDENTITY.numerics, identity.numerics, identity.model):
            assert side in str(error)
        assert pair.exporter.refused == other.refused == {"layout": 1}
        assert pair.exporter.frames_sent == 0


async def test_the_importer_checks_the_exporter_too() -> None:
    async def nothing(link: Link, hello: Hello) -> None:
        await _until_gone(link)

    async with fake_exporter(nothing, welcome=Welcome(LAYOUT.fingerprint(), Identity("tiny", "other"))) as address:
        assert (await _pull_from(address)).reason == "layout"


async def test_a_transport_the_exporter_cannot_do_is_refused() -> None:
    async with transfer_pair() as pair:
        export = pair.finished(4)
        with pytest.raises(AssertionError):
            async with fake_reader(pair, export, transport="nixl"):
                pass
        assert export.outcome is None
        await pair.exporter.close()
        assert pair.exporter.refused == {"refused": 1}


# The secret.


async def test_a_wrong_secret_is_refused_before_anything_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[object] = []
    monkeypatch.setattr(exporter_module, "Link", lambda *args: parsed.append(args))
    async with transfer_pair() as pair:
        export = pair.finished(4)
        stranger = Importer(pair.target, IDENTITY, b"a different secret of some length", LIMITS, ("tcp",))
        error = await failure(stranger.pull(pair.exporter.address, export.key, 4, [1]))
        await stranger.close()
        assert error.reason == "auth"
        assert "SLIPSTREAM_CLUSTER_SECRET" in str(error)
        assert pair.exporter.refused == {"auth": 1}
        assert not parsed


async def test_an_exporter_without_the_secret_is_refused() -> None:
    async def never(link: Link, hello: Hello) -> None:
        raise AssertionError("got past the handshake")

    async with fake_exporter(never, secret=b"an impostor's own secret") as address:
        assert (await _pull_from(address)).reason == "auth"


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 8, b"\xff" * 4096, bytes(64)])
async def test_garbage_is_told_no_and_closed_at_once(garbage: bytes) -> None:
    async with transfer_pair(limits=replace(LIMITS, progress_timeout_s=60.0)) as pair:
        address = decode_address(pair.exporter.address)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(garbage)
        with suppress(ConnectionResetError):  # closed with our bytes unread
            answer = await asyncio.wait_for(reader.read(), DEADLINE_S)
            assert answer.startswith(GREETING)
            assert answer[len(GREETING) + NONCE_BYTES :] in (b"", bytes(MAC_BYTES))
        writer.close()
        assert pair.exporter.refused == {"auth": 1}


async def test_a_silent_stranger_is_dropped() -> None:
    async with transfer_pair(limits=IMPATIENT) as pair:
        address = decode_address(pair.exporter.address)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(b"half a nonce")
        await asyncio.wait_for(reader.read(), DEADLINE_S)
        writer.close()
        assert pair.exporter.refused == {"timeout": 1}


async def test_no_more_links_than_the_limit() -> None:
    async with transfer_pair(limits=replace(LIMITS, max_connections=1)) as pair:
        first = pair.open(8, 4)
        async with fake_reader(pair, first):
            await readers_are(first, 1)
            error = await failure(pair.pull(pair.finished(4)))
            assert error.reason == "refused"
            assert "links are open" in str(error)
        await readers_are(first, 0)
        await pair.pull(pair.finished(4))


@pytest.mark.parametrize("build", [Exporter, Importer])
def test_a_short_secret_is_a_configuration_error(build: Callable[..., object]) -> None:
    with pytest.raises(ConfigurationError, match="SLIPSTREAM_CLUSTER_SECRET"):
        build(random_cache(), IDENTITY, b"short")


# Exporters that misbehave.


async def _pull_from(address: bytes, limits: TransferLimits = LIMITS, num_tokens: int = 8) -> TransferError:
    """How pulling two blocks from a peer fails; no other block may have been written."""
    target = KVCache(LAYOUT, NUM_BLOCKS)
    importer = Importer(target, IDENTITY, SECRET, limits, ("tcp",))
    try:
        error = await failure(importer.pull(address, KEY, num_tokens, [1, 2]))
    finally:
        await importer.close()
    assert importer.refused == {error.reason: 1}
    assert not target.data[:, [0, *range(3, NUM_BLOCKS)]].any()
    return error


async def _until_gone(link: Link) -> None:
    """Take whatever the importer still says, until it closes."""
    with suppress(TransferError):
        while True:
            await link.receive()


async def _end_with(*parts: Part, key: ExportKey = KEY, layout: str | None = None, record: bool = True) -> str:
    """Reason of a pull whose exporter sends `parts`, each rightly sealed, then the record."""
    source = random_cache()

    async def script(link: Link, hello: Hello) -> None:
        for part in parts:
            await link.send_frame(sealed(link, source, key, part, range(10, 10 + part.num_blocks), layout))
        if record:
            await link.send(Kind.FINAL, b"record")
        await _until_gone(link)

    async with fake_exporter(script) as address:
        return (await _pull_from(address)).reason


@pytest.mark.parametrize("key", [replace(KEY, epoch=4), replace(KEY, nonce="x"), replace(KEY, request_id="other")])
async def test_a_frame_of_another_attempt_is_refused(key: ExportKey) -> None:
    assert await _end_with(WHOLE, key=key) == "epoch"


async def test_a_frame_of_another_layout_is_refused() -> None:
    assert await _end_with(WHOLE, layout="f" * 16) == "layout"


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [WHOLE],
        [WHOLE, WHOLE],
        [replace(WHOLE, layer_stop=2), replace(WHOLE, block_start=1, block_stop=2)],
        [replace(WHOLE, block_start=2, block_stop=3)],
        [replace(WHOLE, slots=3)],
    ],
)
async def test_frames_that_do_not_cover_the_request_once_are_refused(parts: list[Part]) -> None:
    assert await _end_with(*parts) == "coverage"


async def test_a_frame_longer_than_it_says_is_refused_before_it_is_read() -> None:
    source = random_cache()

    async def script(link: Link, hello: Hello) -> None:
        frame = sealed(link, source, KEY, WHOLE, [10])
        grown = bytearray(frame.head)
        grown[8:12] = (len(frame.wire) + 1).to_bytes(4, "big")
        await link.send_raw(bytes(grown))
        await _until_gone(link)

    async with fake_exporter(script) as address:
        assert (await _pull_from(address)).reason == "malformed"


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.ACK, Kind.BYE, Kind.REFUSE, Kind.WELCOME])
async def test_a_message_out_of_place_is_refused(kind: Kind) -> None:
    async def script(link: Link, hello: Hello) -> None:
        await link.send(kind, Notice("x").encode())
        await _until_gone(link)

    async with fake_exporter(script) as address:
        assert (await _pull_from(address)).reason == "malformed"


async def test_the_importer_says_why_it_leaves() -> None:
    words: list[str] = []

    async def script(link: Link, hello: Hello) -> None:
        await link.send(Kind.FINAL, b"")
        words.append(Notice.decode((await link.receive()).payload).reason)

    async with fake_exporter(script) as address:
        await _pull_from(address)
    assert words == ["coverage"]


@pytest.mark.parametrize("num_bytes", [0, 1, 21, 300])
async def test_a_peer_killed_in_mid_transfer_is_lost(num_bytes: int) -> None:
    source = random_cache()

    async def script(link: Link, hello: Hello) -> None:
        await link.send_frame(sealed(link, source, KEY, WHOLE, [10]))
        await link.receive()
        frame = sealed(link, source, KEY, replace(WHOLE, block_start=1, block_stop=2), [11])
        await link.send_raw((frame.head + bytes(frame.wire))[:num_bytes])
        link.abort()

    async with fake_exporter(script) as address:
        assert (await _pull_from(address)).reason == "peer_lost"


async def test_nobody_listening_is_a_lost_peer() -> None:
    async with transfer_pair() as pair:
        address = pair.exporter.address
    assert (await _pull_from(address)).reason == "peer_lost"


async def _silent_after(num_frames: int) -> Callable[[Link, Hello], Awaitable[None]]:
    source = random_cache()

    async def script(link: Link, hello: Hello) -> None:
        for index in range(num_frames):
            part = replace(WHOLE, block_start=index, block_stop=index + 1)
            await link.send_frame(sealed(link, source, KEY, part, [10 + index]))
        await _until_gone(link)

    return script


@pytest.mark.parametrize("num_frames", [0, 1])
async def test_a_silent_peer_is_given_up_after_the_progress_timeout(num_frames: int) -> None:
    async with fake_exporter(await _silent_after(num_frames)) as address:
        started = time.monotonic()
        assert (await _pull_from(address, IMPATIENT)).reason == "timeout"
        assert IMPATIENT.progress_timeout_s <= time.monotonic() - started < DEADLINE_S / 2


async def test_a_peer_that_accepts_and_says_nothing_is_given_up() -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert (await _pull_from(encode_address(Address("127.0.0.1", port, {"tcp": {}})), IMPATIENT)).reason == "timeout"
    server.close()


# Readers that misbehave.


async def test_a_lease_is_extended_by_progress_and_ends_without() -> None:
    limits = replace(LIMITS, lease_s=0.5)
    async with transfer_pair(limits=limits) as pair:
        export = pair.finished(20)
        async with fake_reader(pair, export) as link:
            end = time.monotonic() + 2 * limits.lease_s
            while time.monotonic() < end:
                await link.send(Kind.PROGRESS)
                await export.changed(0.02)
                assert export.outcome is None
            assert await asyncio.wait_for(export.closed(), DEADLINE_S) == "expired"
            assert await until_abort(link, lambda header: header.part.num_bytes(LAYOUT)) == "expired"
        await within(export.released())


async def test_a_reader_that_ignores_an_abort_is_cut_off() -> None:
    async with transfer_pair() as pair:
        export = pair.open(20, 8)
        async with fake_reader(pair, export):
            await readers_are(export, 1)
            export.abort("cancelled")
            started = time.monotonic()
            await within(export.released())
            assert 0.5 < time.monotonic() - started < 5


async def test_a_reader_that_takes_no_bytes_is_cut_off() -> None:
    """Enough data to fill every socket buffer, and a reader that never reads."""
    layout = replace(LAYOUT, num_kv_heads=32, head_dim=128, block_size=16)
    async with transfer_pair(limits=replace(IMPATIENT, frame_bytes=4 << 20), layout=layout) as pair:
        block_ids = [10] * 24
        export = pair.exporter.open(KEY, block_ids, 24 * 16)
        address = decode_address(pair.exporter.address)
        reader, writer = await asyncio.open_connection(address.host, address.port, limit=1024)
        link = Link(reader, writer, await authenticate_importer(reader, writer, SECRET), DEADLINE_S)
        await link.send(Kind.HELLO, Hello("tcp", layout.fingerprint(), IDENTITY, KEY, 384, 0, 1000).encode())
        await readers_are(export, 1)
        export.progress(384)
        await readers_are(export, 0)
        assert pair.exporter.refused == {"timeout": 1}
        assert export.outcome is None
        export.abort("done")
        link.abort()


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.WELCOME, Kind.FINAL, Kind.KEEPALIVE])
async def test_a_reader_speaking_out_of_turn_is_dropped(kind: Kind) -> None:
    async with transfer_pair() as pair:
        export = pair.open(8)
        async with fake_reader(pair, export) as link:
            await link.send(kind)
            await readers_are(export, 0)
        assert export.outcome is None
        await pair.exporter.close()
        assert pair.exporter.refused == {"malformed": 1}


async def test_a_replayed_message_of_the_reader_is_refused() -> None:
    async with transfer_pair() as pair:
        export = pair.open(8)
        async with fake_reader(pair, export) as link:
            await link.send(Kind.PROGRESS)
            link._num_sent -= 1
            await link.send(Kind.PROGRESS)
            await readers_are(export, 0)
        await pair.exporter.close()
        assert pair.exporter.refused == {"coverage": 1}


# Which transport.


async def test_shm_is_preferred_where_both_see_the_pool() -> None:
    async with transfer_pair(("shm", "tcp")) as pair:
        assert (await pair.pull(pair.finished(4))).transport == "shm"


async def test_the_order_of_preference_counts() -> None:
    async with transfer_pair(("tcp", "shm")) as pair:
        assert (await pair.pull(pair.finished(4))).transport == "tcp"


@pytest.mark.parametrize(
    "change",
    [{"host": "another boot"}, {"inode": 1}, {"device": 1}, {"num_blocks": 63}, {"path": "/etc/hostname"}, {"path": 5}],
)
async def test_falls_through_to_tcp_where_the_pool_is_not_the_same_file(change: dict[str, str | int]) -> None:
    async with transfer_pair(("shm", "tcp")) as pair:
        address = decode_address(pair.exporter.address)
        routes = {**address.routes, "shm": {**address.routes["shm"], **change}}
        export = pair.finished(5)
        pulled = await pair.importer.pull(encode_address(replace(address, routes=routes)), export.key, 5, [2, 1])
        assert pulled.transport == "tcp"
        pair.assert_received(export)


async def test_a_private_pool_is_offered_by_tcp_only() -> None:
    exporter = Exporter(random_cache(), IDENTITY, SECRET)
    await exporter.start()
    assert set(decode_address(exporter.address).routes) == {"tcp"}
    await exporter.close()


async def test_no_common_transport_is_refused_by_name() -> None:
    async with transfer_pair(("shm",)) as pair:
        address = replace(decode_address(pair.exporter.address), routes={"tcp": {}, "nixl": {}})
        error = await failure(pair.importer.pull(encode_address(address), KEY, 4, [1]))
        assert error.reason == "refused"
        assert "nixl" in str(error)


def test_an_unknown_transport_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="shm, tcp"):
        Importer(random_cache(), IDENTITY, SECRET, transports=("rdma",))


@pytest.mark.parametrize(("networks", "reason"), [(("10.0.0.0/8", "fd00::/8"), "address"), (("127.0.0.0/8",), None)])
async def test_connects_only_into_the_allowed_networks(networks: tuple[str, ...], reason: str | None) -> None:
    async with transfer_pair(limits=replace(LIMITS, allowed_networks=networks)) as pair:
        export = pair.finished(4)
        if reason is None:
            assert (await pair.pull(export)).record == b"record"
        else:
            assert (await failure(pair.pull(export))).reason == reason


# Starting and misuse.


async def test_a_taken_port_names_the_setting() -> None:
    async with transfer_pair() as pair:
        port = decode_address(pair.exporter.address).port
        second = Exporter(random_cache(), IDENTITY, SECRET)
        with pytest.raises(ConfigurationError, match="SLIPSTREAM_TRANSFER__PORT"):
            await second.start("127.0.0.1", port)
        await second.close()


async def test_advertises_another_host() -> None:
    exporter = Exporter(random_cache(), IDENTITY, SECRET)
    await exporter.start("127.0.0.1", 0, advertise="prefill-1")
    assert decode_address(exporter.address).host == "prefill-1"
    assert exporter.endpoint.startswith("prefill-1:")
    await exporter.close()


async def test_a_wildcard_is_never_advertised() -> None:
    exporter = Exporter(random_cache(), IDENTITY, SECRET)
    await exporter.start("0.0.0.0", 0)
    assert decode_address(exporter.address).host not in ("", "0.0.0.0")
    await exporter.close()


async def test_a_key_is_opened_once() -> None:
    async with transfer_pair() as pair:
        pair.exporter.open(KEY, [10], 4).abort("x")
        with pytest.raises(ValueError, match="opened before"):
            pair.exporter.open(KEY, [10], 4)


async def test_blocks_must_fit_the_tokens() -> None:
    async with transfer_pair() as pair:
        with pytest.raises(ValueError, match="2 blocks"):
            pair.exporter.open(KEY, [10, 11], 4)
        with pytest.raises(ValueError, match="do not fit"):
            await pair.importer.pull(pair.exporter.address, KEY, 4, [1, 2])
        with pytest.raises(ValueError, match="do not fit"):
            await pair.importer.pull(pair.exporter.address, KEY, 4, [1], skip_blocks=2)


async def test_a_poisoned_address_is_malformed() -> None:
    async with transfer_pair() as pair:
        error = await failure(pair.importer.pull(b"\x93\x01\x02", KEY, 4, [1]))
        assert error.reason == "malformed"
