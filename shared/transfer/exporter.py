"""typed signatures; body follows in minutes"""
from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from shared.kv.cache import KVCache
from shared.transfer.base import ExportKey, FrameTap, Identity, TransferLimits


class Export:
    key: ExportKey

    def progress(self, num_computed_tokens: int) -> None: ...
    def finish(self, record: bytes) -> None: ...
    def abort(self, reason: str) -> None: ...
    async def closed(self) -> str: ...  # "acked" | "aborted:<reason>" | "expired"
    async def released(self) -> None: ...  # closed, and no reader attached, no copy running
    @property
    def num_readers(self) -> int: ...


class Exporter:  # async context manager; start() listens
    def __init__(self, cache: KVCache, identity: Identity, secret: bytes,
                 limits: TransferLimits = TransferLimits(), tap: FrameTap | None = None) -> None: ...
    async def start(self, host: str = "127.0.0.1", port: int = 0, advertise: str | None = None) -> None: ...
    async def close(self) -> None: ...
    @property
    def address(self) -> bytes: ...
    def open(self, key: ExportKey, block_ids: Sequence[int], num_tokens: int) -> Export: ...
    bytes_sent: int
    frames_sent: int
    refused: dict[str, int]
