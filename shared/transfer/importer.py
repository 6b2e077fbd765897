"""The decode side: pull one hand-off, verify all of it, and only then say that it is there."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog

from shared.errors import TransferError
from shared.kv.cache import KVCache
from shared.transfer.address import Address, decode_address
from shared.transfer.auth import authenticate_importer, check_secret
from shared.transfer.base import (
    ABORTED,
    REASON_ADDRESS,
    REASON_LAYOUT,
    REASON_MALFORMED,
    REASON_REFUSED,
    REASONS,
    ExportKey,
    Identity,
    Pulled,
    Route,
    TransferLimits,
)
from shared.transfer.control import Hello, Notice, Welcome
from shared.transfer.frame import Kind
from shared.transfer.link import STREAM_LIMIT, Link, close_writer, peer_errors
from shared.transfer.receiver import Destination, Receiver
from shared.transfer.registry import load_transport

_COPY_THREADS = 2
_log = structlog.get_logger()


class Importer:
    """Pulls hand-offs into one worker's cache, by the first of `transports` that reaches the peer."""

    def __init__(
        self,
        cache: KVCache,
        identity: Identity,
        secret: bytes,
        limits: TransferLimits | None = None,
        transports: Sequence[str] = ("shm", "tcp"),
    ) -> None:
        check_secret(secret)
        self._cache = cache
        self._identity = identity
        self._secret = secret
        self._limits = limits or TransferLimits()
        self._networks = tuple(ipaddress.ip_network(network) for network in self._limits.allowed_networks)
        self._transports = {name: load_transport(name) for name in transports}
        self._threads = ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="kv-import")
        self._closing: set[asyncio.Task[None]] = set()
        self._draining = False
        self.bytes_received = 0
        self.frames_received = 0
        self.refused: dict[str, int] = {}

    async def pull(
        self, address: bytes, key: ExportKey, num_tokens: int, block_ids: Sequence[int], skip_blocks: int = 0
    ) -> Pulled:
        """Fetch positions `[0, num_tokens)` into `block_ids`, one id for each block of the request.

        The first `skip_blocks` are held already (prefix cache) and are neither fetched nor written.
        The blocks may be reused when this returns or raises, not before: no copy into them is running
        then. Raises TransferError with a reason of `base`; an incomplete or unverified hand-off never
        returns. When cancelled, tells the exporter that its blocks can go (see `drain`).
        """
        if len(block_ids) != self._cache.layout.num_blocks(num_tokens) or not 0 <= skip_blocks <= len(block_ids):
            raise ValueError(f"{len(block_ids)} blocks, {skip_blocks} of them held, do not fit {num_tokens} tokens")
        destination = Destination(self._cache, self._identity, key, num_tokens, tuple(block_ids), skip_blocks)
        try:
            return await self._pull(decode_address(address), destination)
        except TransferError as error:
            self.refused[error.reason] = self.refused.get(error.reason, 0) + 1
            _log.warning(
                "kv_pull_failed", request_id=key.request_id, epoch=key.epoch, reason=error.reason, detail=str(error)
            )
            raise

    def drain(self) -> None:
        """From now on a cancelled pull leaves its export open: another worker will take the request over."""
        self._draining = True

    async def close(self) -> None:
        """Wait for last words to be sent. Pulls must have ended."""
        await asyncio.gather(*self._closing)
        self._threads.shutdown()

    async def _pull(self, address: Address, destination: Destination) -> Pulled:
        started = time.monotonic()
        name, route = self._choose_route(address)
        try:
            receiver = Receiver(destination, route, self._threads)
            record = await self._receive(address, name, receiver)
        finally:
            route.close()
        elapsed_ms = (time.monotonic() - started) * 1000
        return Pulled(record, receiver.bytes_received, name, elapsed_ms)

    def _choose_route(self, address: Address) -> tuple[str, Route]:
        for name, transport in self._transports.items():
            info = address.routes.get(name)
            route = transport.connect(info, self._cache.layout) if info is not None else None
            if route is not None:
                return name, route
        raise TransferError(
            REASON_REFUSED, f"no common transport: here {list(self._transports)}, there {list(address.routes)}"
        )

    async def _receive(self, address: Address, transport: str, receiver: Receiver) -> bytes:
        reader, writer = await self._connect(address)
        try:
            link = await self._authenticate(reader, writer)
            try:
                await self._introduce(link, transport, receiver.destination)
                return await receiver.run(link, self._limits.progress_timeout_s)
            except TransferError as error:
                link.post(Kind.BYE, Notice(error.reason).encode())
                raise
            except asyncio.CancelledError:
                link.post(Kind.BYE, Notice("cancelled", keep=self._draining).encode())
                raise
        finally:
            self.bytes_received += receiver.bytes_received
            self.frames_received += receiver.frames_received
            self._close_later(writer)

    async def _connect(self, address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        with peer_errors():
            async with asyncio.timeout(self._limits.progress_timeout_s):
                host = await self._permitted_host(address) if self._networks else address.host
                return await asyncio.open_connection(host, address.port, limit=STREAM_LIMIT)

    async def _permitted_host(self, address: Address) -> str:
        """The address came through Redis: whoever can write there must not choose where workers connect."""
        loop = asyncio.get_running_loop()
        for *_, target in await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
            host = ipaddress.ip_address(target[0])
            if any(host in network for network in self._networks):
                return str(host)
        raise TransferError(
            REASON_ADDRESS,
            f"{address.host} is in none of the networks allowed for KV transfer; "
            "add its network to SLIPSTREAM_TRANSFER__ALLOWED_NETWORKS if it is one of your workers",
        )

    async def _authenticate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Link:
        with peer_errors():
            async with asyncio.timeout(self._limits.handshake_timeout_s):
                keys = await authenticate_importer(reader, writer, self._secret)
        return Link(reader, writer, keys, self._limits.progress_timeout_s)

    async def _introduce(self, link: Link, transport: str, wanted: Destination) -> None:
        timeout_s = self._limits.progress_timeout_s
        layout = self._cache.layout.fingerprint()
        hello = Hello(
            transport, layout, self._identity, wanted.key, wanted.num_tokens, wanted.skip_blocks, int(timeout_s * 1000)
        )
        await link.send(Kind.HELLO, hello.encode())
        message = await link.receive(timeout_s=timeout_s)
        if message.kind is Kind.REFUSE:
            notice = Notice.decode(message.payload)
            raise TransferError(notice.reason if notice.reason in REASONS else REASON_REFUSED, notice.message)
        if message.kind is Kind.ABORT:
            raise TransferError(ABORTED + Notice.decode(message.payload).reason)
        if message.kind is not Kind.WELCOME:
            raise TransferError(REASON_MALFORMED, f"an exporter answers HELLO with WELCOME, not {message.kind.name}")
        theirs = Welcome.decode(message.payload)
        if theirs != Welcome(layout, self._identity):
            raise TransferError(REASON_LAYOUT, f"workers do not match: importer has {layout}, exporter has {theirs}")

    def _close_later(self, writer: asyncio.StreamWriter) -> None:
        """Close without holding up the caller, who may be cancelled and has blocks to free."""
        task = asyncio.get_running_loop().create_task(close_writer(writer))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
