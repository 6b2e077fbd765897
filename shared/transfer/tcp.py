"""Frames that carry the bytes themselves, over the link's own TCP connection. Works everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.transfer.base import Part, RouteInfo


class TcpTransport:
    """Transport "tcp"; any pool on any device can be reached."""

    def describe(self, pool: KVCache) -> RouteInfo | None:
        return {}

    def connect(self, info: RouteInfo, layout: KVLayout) -> TcpRoute | None:
        return TcpRoute(layout)

    def wire(self, content: memoryview, block_ids: Sequence[int]) -> memoryview:
        return content


class TcpRoute:
    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout

    def wire_length(self, part: Part) -> int:
        return part.num_bytes(self._layout)

    def content(self, part: Part, wire: bytearray) -> torch.Tensor:
        return torch.frombuffer(wire, dtype=torch.uint8)

    def close(self) -> None:
        """Nothing is held."""
