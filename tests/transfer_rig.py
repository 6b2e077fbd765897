"""An exporter and an importer in one process, and hand-driven ends of a link, for the transfer tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import pytest
import torch

from shared.errors import TransferError
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.transfer.address import Address, decode_address, encode_address
from shared.transfer.auth import authenticate_exporter, authenticate_importer
from shared.transfer.base import ExportKey, FrameTap, Identity, Part, Pulled, TransferLimits
from shared.transfer.blocks import as_memory, gather
from shared.transfer.control import Hello, Notice, Welcome
from shared.transfer.exporter import Export, Exporter
from shared.transfer.frame import FrameHeader, Kind, digest, encode_header
from shared.transfer.importer import Importer
from shared.transfer.link import Link, SealedFrame, close_writer

SECRET = b"a secret for the transfer tests"
IDENTITY = Identity("tiny", "0123456789abcdef")
LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=4)
NUM_BLOCKS = 64
DEADLINE_S = 10.0
# Two blocks a frame, so that a few blocks make several frames.
LIMITS = TransferLimits(lease_s=20.0, progress_timeout_s=2.0, frame_bytes=2 * LAYOUT.bytes_per_block)
IMPATIENT = replace(LIMITS, progress_timeout_s=0.15)


def random_cache(layout: KVLayout = LAYOUT, seed: int = 0, shared: bool = False) -> KVCache:
    cache = KVCache(layout, NUM_BLOCKS, shared=shared)
    generator = torch.Generator().manual_seed(seed)
    cache.data.copy_(torch.randn(cache.data.shape, generator=generator))
    return cache


@dataclass
class Pair:
    """`source` is the prefill worker's cache, `target` the decode worker's, all zeros at first."""

    source: KVCache
    target: KVCache
    exporter: Exporter
    importer: Importer
    _keys: int = field(default=0)

    def open(self, num_tokens: int, computed: int = 0) -> Export:
        """An export of fresh key, in source blocks 10, 11, ..., with `computed` tokens ready."""
        self._keys += 1
        layout = self.source.layout
        block_ids = range(10, 10 + layout.num_blocks(num_tokens))
        export = self.exporter.open(ExportKey(f"request-{self._keys}", 3, "nonce"), block_ids, num_tokens)
        export.progress(computed)
        return export

    def finished(self, num_tokens: int, record: bytes = b"record") -> Export:
        export = self.open(num_tokens, num_tokens)
        export.finish(record)
        return export

    def local_blocks(self, num_tokens: int) -> list[int]:
        """Target blocks, in an order unlike the source's."""
        return list(range(1, 1 + self.source.layout.num_blocks(num_tokens)))[::-1]

    async def pull(self, export: Export, skip_blocks: int = 0) -> Pulled:
        blocks = self.local_blocks(export.num_tokens)
        return await self.importer.pull(self.exporter.address, export.key, export.num_tokens, blocks, skip_blocks)

    def pulling(self, export: Export, skip_blocks: int = 0) -> asyncio.Task[Pulled]:
        return asyncio.create_task(self.pull(export, skip_blocks))

    def source_tokens(self, export: Export, start: int = 0) -> torch.Tensor:
        return tokens_of(self.source, export.block_ids, export.num_tokens)[:, start:]

    def target_tokens(self, export: Export, start: int = 0) -> torch.Tensor:
        return tokens_of(self.target, self.local_blocks(export.num_tokens), export.num_tokens)[:, start:]

    def assert_received(self, export: Export, start: int = 0) -> None:
        """Bytes, not values: equal NaNs and signed zeros count too."""
        want, got = self.source_tokens(export, start), self.target_tokens(export, start)
        assert torch.equal(want.contiguous().view(torch.uint8), got.contiguous().view(torch.uint8))

    def assert_target_untouched(self) -> None:
        assert not self.target.data.any()


def tokens_of(cache: KVCache, block_ids: Sequence[int], num_tokens: int) -> torch.Tensor:
    """KV of each token, read the slow and obvious way: `[layer, token, k|v, kv_head, head_dim]`."""
    size = cache.layout.block_size
    rows = [cache.data[:, block_ids[token // size], :, :, token % size] for token in range(num_tokens)]
    return torch.stack(rows, dim=1)


@asynccontextmanager
async def transfer_pair(
    transports: Sequence[str] = ("tcp",),
    limits: TransferLimits = LIMITS,
    layout: KVLayout = LAYOUT,
    tap: FrameTap | None = None,
) -> AsyncIterator[Pair]:
    source, target = random_cache(layout, shared=True), KVCache(layout, NUM_BLOCKS)
    exporter = Exporter(source, IDENTITY, SECRET, limits, tap)
    importer = Importer(target, IDENTITY, SECRET, limits, transports)
    await exporter.start()
    try:
        yield Pair(source, target, exporter, importer)
    finally:
        await importer.close()
        await exporter.close()
        source.close()


async def within(awaitable: Awaitable[object]) -> None:
    await asyncio.wait_for(awaitable, DEADLINE_S)


async def readers_are(export: Export, count: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while export.num_readers != count:
            await export.changed()


async def failure(pull: Awaitable[Pulled]) -> TransferError:
    """The error a pull must end with."""
    try:
        pulled = await asyncio.wait_for(pull, DEADLINE_S)
    except TransferError as error:
        return error
    raise AssertionError(f"the pull succeeded with {pulled}")


def sealed(
    link: Link, cache: KVCache, key: ExportKey, part: Part, block_ids: Sequence[int], layout: str | None = None
) -> SealedFrame:
    """A frame for TCP whose digest is right, whatever it says."""
    content = as_memory(gather(cache, part, block_ids))
    header = encode_header(FrameHeader(layout or cache.layout.fingerprint(), IDENTITY, key, part))
    head = link.next_prefix(Kind.FRAME, len(header), len(content)) + header
    return SealedFrame(head, content, digest(link.keys.outgoing, head, content), len(content))


Script = Callable[[Link, Hello], Awaitable[None]]


@asynccontextmanager
async def fake_exporter(script: Script, secret: bytes = SECRET, welcome: Welcome | None = None) -> AsyncIterator[bytes]:
    """A peer that authenticates, welcomes, then does what `script` says; yields its address."""
    connections: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(TransferError, asyncio.IncompleteReadError):
                link = Link(reader, writer, await authenticate_exporter(reader, writer, secret), DEADLINE_S)
                hello = Hello.decode((await link.receive()).payload)
                await link.send(Kind.WELCOME, (welcome or Welcome(LAYOUT.fingerprint(), IDENTITY)).encode())
                await script(link, hello)
        finally:
            await close_writer(writer)

    server = await asyncio.start_server(
        lambda r, w: connections.append(asyncio.create_task(serve(r, w))), "127.0.0.1", 0
    )
    try:
        yield encode_address(Address("127.0.0.1", server.sockets[0].getsockname()[1], {"tcp": {}}))
    finally:
        server.close()
        await asyncio.wait_for(asyncio.gather(*connections), DEADLINE_S)


@asynccontextmanager
async def fake_reader(pair: Pair, export: Export, transport: str = "tcp") -> AsyncIterator[Link]:
    """A reader that was welcomed and from then on does what the test says."""
    address = decode_address(pair.exporter.address)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        link = Link(reader, writer, await authenticate_importer(reader, writer, SECRET), DEADLINE_S)
        hello = Hello(transport, LAYOUT.fingerprint(), IDENTITY, export.key, export.num_tokens, 0, 2000)
        await link.send(Kind.HELLO, hello.encode())
        assert (await link.receive()).kind is Kind.WELCOME
        yield link
    finally:
        await close_writer(writer)


async def until_abort(link: Link, accept: Callable[[FrameHeader], int]) -> str:
    """Read on until the exporter says why it stops."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            message = await link.receive(accept)
            if message.kind is Kind.ABORT:
                return Notice.decode(message.payload).reason


def paused_copies(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """The next copy out of a pool tells that it was entered, and waits until it may go on."""
    entered, go_on = threading.Event(), threading.Event()

    def slow_gather(*args: object) -> torch.Tensor:
        entered.set()
        go_on.wait(10)
        return gather(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("shared.transfer.session.gather", slow_gather)
    return entered, go_on
