"""What a role's service is given to work with, and what it has to offer the worker around it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import structlog

from shared.bus.registry import Registry
from shared.bus.requests import RequestStore
from shared.bus.workqueue import WorkItem
from shared.config import EngineSettings, TransferSettings
from shared.protocol.messages import Job
from shared.transfer.base import Identity, TransferLimits
from shared.worker.bridge import EngineBridge
from shared.worker.build import BuiltEngine
from shared.worker.jobs import CacheScope

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """Everything one role needs; nothing in it is shared with another process."""

    worker_id: str
    model: str
    store: RequestStore
    registry: Registry
    bridge: EngineBridge
    built: BuiltEngine
    engine_settings: EngineSettings
    transfer_settings: TransferSettings
    secret: bytes

    def can_hold(self, job: Job) -> bool:
        """Whether prompt and output of each choice fit this worker's KV cache when it has it alone."""
        return len(job.prompt_ids) + job.params.max_tokens <= self.built.max_request_tokens

    @property
    def identity(self) -> Identity:
        return Identity(self.model, self.built.numerics)

    @property
    def scope(self) -> CacheScope:
        return CacheScope(self.built.source.revision, self.built.layout.dtype, self.built.numerics)

    @property
    def transfer_limits(self) -> TransferLimits:
        settings = self.transfer_settings
        return TransferLimits(
            lease_s=settings.lease_s,
            progress_timeout_s=settings.progress_timeout_s,
            max_connections=settings.max_connections,
            allowed_networks=settings.allowed_networks,
        )

    def log_limits(self) -> None:
        """Say at start what this worker will take: what it holds of memory, and each of its deadlines."""
        engine, transfer = self.engine_settings, self.transfer_limits
        log.info(
            "worker_limits",
            worker_id=self.worker_id,
            kv_tokens=self.built.engine.max_request_tokens,
            max_request_tokens=self.built.max_request_tokens,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            hang_timeout_s=engine.hang_timeout_s,
            lease_s=transfer.lease_s,
            progress_timeout_s=transfer.progress_timeout_s,
            handshake_timeout_s=transfer.handshake_timeout_s,
            max_connections=transfer.max_connections,
        )


class Service(Protocol):
    """One role's work. The worker claims entries for it and owns its tasks.

    `handle` serves one claimed entry to its end; it may be cancelled at any await and frees what it holds then.
    Redis errors leave it: the entry stays pending and is swept back. `run` holds the service's own tasks.
    """

    @property
    def addresses(self) -> tuple[tuple[str, str], ...]: ...

    @property
    def in_flight(self) -> int: ...

    def requests(self) -> Iterable[tuple[str, str]]:
        """(request id, gateway id) of every request owned or waiting here."""
        ...

    def room(self, *, express: bool = False) -> int:
        """How many more entries may be claimed now; `express`: of those that go first."""
        ...

    async def handle(self, item: WorkItem) -> None: ...

    async def run(self) -> None: ...

    async def hand_back(self) -> None:
        """Give every request still held back to the queue; the drain has run out of time."""
        ...
