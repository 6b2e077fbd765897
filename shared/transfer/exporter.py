"""The prefill side: one listener that serves all exports of a worker.

Life of a connection: prove the secret, read HELLO, refuse it by name or welcome it, stream the
export (`session.py`). The caller owns the blocks; this side owns the sockets, the copies and the
lease, and says through `Export.released()` when the blocks may be used again.
"""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog

from shared.errors import ConfigurationError, TransferError
from shared.kv.cache import KVCache
from shared.transfer.address import Address, encode_address
from shared.transfer.auth import authenticate_exporter, check_secret
from shared.transfer.base import (
    REASON_COVERAGE,
    REASON_EPOCH,
    REASON_LAYOUT,
    REASON_MALFORMED,
    REASON_REFUSED,
    ExportKey,
    FrameTap,
    Identity,
    TransferLimits,
    Transport,
)
from shared.transfer.connections import Connections
from shared.transfer.control import Hello, Notice, Welcome
from shared.transfer.coverage import check_frame_bytes
from shared.transfer.export import Export
from shared.transfer.frame import Kind
from shared.transfer.link import Link, close_writer, peer_errors
from shared.transfer.registry import TRANSPORTS, load_transport
from shared.transfer.session import Session, Source

__all__ = ["Export", "Exporter"]

_COPY_THREADS = 2
_STREAM_LIMIT = 16 << 10  # importers send small messages only, and strangers must not fill memory
_MAX_REMEMBERED = 1024
_WILDCARDS = frozenset({"", "0.0.0.0", "::"})
_log = structlog.get_logger()


class Exporter:
    """Serves exports to authenticated importers. `start` it before `address` is asked for, `close` it once."""

    def __init__(
        self,
        cache: KVCache,
        identity: Identity,
        secret: bytes,
        limits: TransferLimits | None = None,
        tap: FrameTap | None = None,
    ) -> None:
        check_secret(secret)
        self._limits = limits or TransferLimits()
        check_frame_bytes(cache.layout, self._limits.frame_bytes)
        self._secret = secret
        self._threads = ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="kv-export")
        self._source = Source(cache, identity, self._limits.frame_bytes, self._threads, tap)
        self._exports: dict[ExportKey, Export] = {}
        self._outcomes: OrderedDict[ExportKey, str] = OrderedDict()
        self._connections = Connections(self._limits.max_connections)
        self._server: asyncio.Server | None = None
        self._host = ""
        self._port = 0
        self._transports: dict[str, Transport] = {}
        self._address = b""

    async def start(
        self, host: str = "127.0.0.1", port: int = 0, advertise: str | None = None, advertise_port: int = 0
    ) -> None:
        """Listen. Peers are told `advertise`, or `host`, or this machine's name when `host` is a wildcard.
        They are told `advertise_port` instead of the bound one unless it is 0: for a forwarded port.

        Raises ConfigurationError when the address cannot be bound.
        """
        try:
            self._server = await asyncio.start_server(self._accept, host, port, limit=_STREAM_LIMIT)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen for KV transfers on {host}:{port} ({error.strerror}); "
                "set SLIPSTREAM_TRANSFER__HOST and SLIPSTREAM_TRANSFER__PORT"
            ) from error
        self._host = advertise or (socket.gethostname() if host in _WILDCARDS else host)
        self._port = advertise_port or int(self._server.sockets[0].getsockname()[1])
        routes = {}
        for name in TRANSPORTS:
            transport = load_transport(name)
            info = transport.describe(self._source.cache)
            if info is not None:
                routes[name] = info
                self._transports[name] = transport
        self._address = encode_address(Address(self._host, self._port, routes))
        _log.info("kv_exporter_listening", endpoint=self.endpoint, transports=list(routes))

    async def close(self) -> None:
        """Abort every export, tell readers, and return when no connection or copy is left."""
        for export in list(self._exports.values()):
            export.abort("shutdown")
        if self._server is not None:
            self._server.close()
        await self._connections.close(2 * self._limits.progress_timeout_s)
        self._threads.shutdown()

    @property
    def address(self) -> bytes:
        """Where importers find this worker's blocks; goes into an offer as it is."""
        return self._address

    @property
    def endpoint(self) -> str:
        """The advertised "host:port", for people."""
        return f"{self._host}:{self._port}"

    @property
    def bytes_sent(self) -> int:
        """KV content sent, by any transport."""
        return self._source.bytes_sent

    @property
    def frames_sent(self) -> int:
        return self._source.frames_sent

    @property
    def refused(self) -> dict[str, int]:
        """Connections refused or lost, by reason."""
        return self._source.refused

    @property
    def num_exports(self) -> int:
        return len(self._exports)

    def open(self, key: ExportKey, block_ids: Sequence[int], num_tokens: int) -> Export:
        """Offer the blocks that hold, or will hold, positions `[0, num_tokens)`; none is ready yet.

        Every export must be closed: by a reader's ack, by `abort`, or by its lease after `finish`.
        """
        if key in self._exports or key in self._outcomes:
            raise ValueError(f"the hand-off of {key.request_id} epoch {key.epoch} was opened before")
        layout = self._source.cache.layout
        export = Export(key, block_ids, num_tokens, layout, self._limits.lease_s, self._forget)
        self._exports[key] = export
        return export

    def _forget(self, export: Export) -> None:
        """Keep only how it ended, so that a late pull hears why it is refused."""
        del self._exports[export.key]
        self._outcomes[export.key] = export.outcome or ""
        if len(self._outcomes) > _MAX_REMEMBERED:
            self._outcomes.popitem(last=False)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.serve(self._serve(reader, writer), writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = str((writer.get_extra_info("peername") or ("?",))[0])
        try:
            link, hello = await self._greet(reader, writer)
            session = await self._admit(link, hello)
            await session.run()
        except TransferError as error:
            self._source.count_refused(error.reason)
            _log.warning("kv_connection_ended", peer=peer, reason=error.reason, detail=str(error))
        finally:
            await close_writer(writer)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[Link, Hello]:
        timeout_s = self._limits.progress_timeout_s
        with peer_errors():
            async with asyncio.timeout(self._limits.handshake_timeout_s):
                keys = await authenticate_exporter(reader, writer, self._secret)
        has_room = self._connections.prove()
        link = Link(reader, writer, keys, timeout_s)
        message = await link.receive(timeout_s=timeout_s)
        if message.kind is not Kind.HELLO:
            raise TransferError(REASON_MALFORMED, f"an importer begins with HELLO, not {message.kind.name}")
        if not has_room:
            error = TransferError(REASON_REFUSED, f"{self._limits.max_connections} links are open, as many as may be")
            await link.send(Kind.REFUSE, Notice(error.reason, str(error)).encode())
            raise error
        return link, Hello.decode(message.payload)

    async def _admit(self, link: Link, hello: Hello) -> Session:
        """Welcome the importer, or tell it why not and raise that."""
        source = self._source
        try:
            self._check_same(hello)
            export = self._find(hello.key)
            if hello.num_tokens != export.num_tokens or hello.skip_blocks > len(export.block_ids):
                raise TransferError(
                    REASON_COVERAGE,
                    f"asked for {hello.num_tokens} tokens past {hello.skip_blocks} blocks of {export.num_tokens}",
                )
            transport = self._transports.get(hello.transport)
            if transport is None:
                raise TransferError(REASON_REFUSED, f"transport {hello.transport!r} is not available here")
        except TransferError as error:
            await link.send(Kind.REFUSE, Notice(error.reason, str(error)).encode())
            raise
        await link.send(Kind.WELCOME, Welcome(source.cache.layout.fingerprint(), source.identity).encode())
        return Session(link, export, hello, transport, source)

    def _check_same(self, hello: Hello) -> None:
        ours = (self._source.cache.layout.fingerprint(), self._source.identity)
        if (hello.layout, hello.identity) != ours:
            raise TransferError(
                REASON_LAYOUT,
                f"workers do not match: exporter has layout {ours[0]} and {ours[1]}, "
                f"importer has layout {hello.layout} and {hello.identity}",
            )

    def _find(self, key: ExportKey) -> Export:
        export = self._exports.get(key)
        if export is not None:
            return export
        if key in self._outcomes:
            raise TransferError(REASON_REFUSED, f"this hand-off is over: {self._outcomes[key]}")
        if any(held.request_id == key.request_id for held in self._exports):
            raise TransferError(REASON_EPOCH, "another attempt of this request is held here")
        raise TransferError(REASON_REFUSED, "no such hand-off here")
