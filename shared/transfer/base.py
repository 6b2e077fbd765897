"""What both ends of a KV hand-off agree on: keys, limits, reasons, and the Transport seam.

A hand-off is a *pull*: the decode worker connects to the prefill worker's exporter, both prove that
they know the cluster secret, compare fingerprints, and the exporter streams frames as chunks of the
prompt are computed. One connection serves one pull.

    importer                                exporter
       │ ◄──────── challenge ─────────────────│   auth.py: nothing is parsed before it passes
       │ ───────── answer + challenge ───────►│
       │ ◄──────── answer ────────────────────│
       │ ───────── HELLO ────────────────────►│   fingerprints, key, prefix blocks already held
       │ ◄──────── WELCOME | REFUSE ──────────│
       │ ◄──────── FRAME … KEEPALIVE … ───────│   while prefill computes
       │ ───────── PROGRESS ─────────────────►│   after each verified frame; extends the lease
       │ ◄──────── FINAL(record) | ABORT ─────│
       │ ───────── ACK | BYE(reason) ────────►│

Frames differ between transports only in how their content travels: `tcp` puts the bytes in the
frame, `shm` puts the block numbers there and the importer reads the bytes from the mapped pool.
The digest covers header and content in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout

# Reasons a TransferError carries. An abort by the peer is "aborted:<its reason>".
REASON_REFUSED = "refused"  # the exporter does not hold this key (any more), or cannot take a reader
REASON_DIGEST = "digest"  # bytes changed on the way, or blocks were reused under the reader
REASON_LAYOUT = "layout"  # layout, numerics fingerprint or model differ
REASON_COVERAGE = "coverage"  # a frame is missing, doubled, out of order or out of range
REASON_EPOCH = "epoch"  # another attempt of the same request
REASON_PEER_LOST = "peer_lost"  # connection refused, reset or closed early
REASON_TIMEOUT = "timeout"  # no frame and no keepalive within the progress deadline
REASON_AUTH = "auth"  # the peer does not know the cluster secret
REASON_ADDRESS = "address"  # the peer's address lies in none of the networks this worker may connect to
REASON_MALFORMED = "malformed"  # bytes that no version of this protocol sends
ABORTED = "aborted:"

REASONS = frozenset(
    {
        REASON_REFUSED,
        REASON_DIGEST,
        REASON_LAYOUT,
        REASON_COVERAGE,
        REASON_EPOCH,
        REASON_PEER_LOST,
        REASON_TIMEOUT,
        REASON_AUTH,
        REASON_ADDRESS,
        REASON_MALFORMED,
    }
)

OUTCOME_ACKED = "acked"
OUTCOME_EXPIRED = "expired"

MAX_RECORD_BYTES = 1 << 20
HANDSHAKE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ExportKey:
    """Names one attempt of one request; the nonce tells apart epochs reused after a Redis loss."""

    request_id: str
    epoch: int
    nonce: str


@dataclass(frozen=True, slots=True)
class Identity:
    """What two workers must share, besides the layout, to use each other's KV: model and arithmetic."""

    model: str
    numerics: str


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """Deadlines and sizes of one worker's links. Times in seconds.

    `lease_s`: how long finished blocks wait for a reader that makes no progress.
    `progress_timeout_s`: longest silence on a link; never a limit on the whole transfer.
    `max_connections`: links of peers that proved the secret. Those that have not yet are bounded apart (`exporter.py`).
    `allowed_networks`: where an importer may connect to (CIDR); empty allows every network.
    """

    lease_s: float = 30.0
    progress_timeout_s: float = 5.0
    frame_bytes: int = 4 << 20
    max_connections: int = 128
    allowed_networks: tuple[str, ...] = ()

    @property
    def handshake_timeout_s(self) -> float:
        """How long a peer may take to prove the secret: strangers are not given the patience of a link."""
        return min(self.progress_timeout_s, HANDSHAKE_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Pulled:
    """A verified hand-off: every block from `skip_blocks` on is in the local cache.

    `bytes_moved` counts KV content, the same for every transport.
    """

    record: bytes
    bytes_moved: int
    transport: str
    elapsed_ms: float


@dataclass(frozen=True, slots=True)
class Part:
    """What one frame carries: `[layer_start, layer_stop) x [block_start, block_stop)`, `slots` valid slots a block.

    Blocks are counted within the request, from 0. `slots` is below the block size only for the
    last, partly filled block, which travels alone.
    """

    layer_start: int
    layer_stop: int
    block_start: int
    block_stop: int
    slots: int

    @property
    def num_layers(self) -> int:
        return self.layer_stop - self.layer_start

    @property
    def num_blocks(self) -> int:
        return self.block_stop - self.block_start

    def num_bytes(self, layout: KVLayout) -> int:
        """Bytes of content: `[layer, block, k|v, kv_head, slot < slots, head_dim]`."""
        return self.num_layers * self.num_blocks * self.slots * layout.bytes_per_token // layout.num_layers


RouteInfo = Mapping[str, str | int]


class Route(Protocol):
    """An importer's way to one exporter's blocks by one transport. Not shared between pulls."""

    def wire_length(self, part: Part) -> int:
        """Exact number of payload bytes a frame of `part` has on the wire."""
        ...

    def content(self, part: Part, wire: bytearray) -> torch.Tensor:
        """Bytes of the blocks as `uint8 [part.num_bytes]`, a copy that the peer cannot change.

        Runs in a thread. Raises TransferError("malformed") when `wire` points outside the pool.
        """
        ...

    def close(self) -> None:
        """Let go of the peer's memory; idempotent."""
        ...


class Transport(Protocol):
    """How the content of frames travels. Stateless: one instance serves all links of a worker."""

    def describe(self, pool: KVCache) -> RouteInfo | None:
        """What a peer needs to reach `pool` this way, for the address; None if it cannot be reached."""
        ...

    def connect(self, info: RouteInfo, layout: KVLayout) -> Route | None:
        """A route to the pool described by a peer's (untrusted) `info`; None where there is none."""
        ...

    def wire(self, content: memoryview, block_ids: Sequence[int]) -> memoryview:
        """Payload that lets a route find `content`, which lies in the local blocks `block_ids`."""
        ...


class FrameTap(Protocol):
    """Test hook on the exporter: sees each outgoing frame whole and returns the bytes really sent."""

    def __call__(self, frame: bytes) -> bytes: ...
