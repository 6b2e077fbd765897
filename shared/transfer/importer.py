"""typed signatures; body follows in minutes"""
from __future__ import annotations

from collections.abc import Sequence

from shared.kv.cache import KVCache
from shared.transfer.base import ExportKey, Identity, Pulled, TransferLimits


class Importer:
    def __init__(self, cache: KVCache, identity: Identity, secret: bytes,
                 limits: TransferLimits = TransferLimits(), transports: Sequence[str] = ("shm", "tcp")) -> None: ...
    async def pull(self, address: bytes, key: ExportKey, num_tokens: int, block_ids: Sequence[int],
                   skip_blocks: int = 0, transports: Sequence[str] | None = None) -> Pulled: ...
    def drain(self) -> None: ...  # from now on a cancelled pull leaves its export for another reader
    async def close(self) -> None: ...
    bytes_received: int
    frames_received: int
    refused: dict[str, int]
