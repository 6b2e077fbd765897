"""Start of a decode worker process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.decode.worker import DecodeService
from shared.config import Settings
from shared.garbage import collect_garbage_rarely
from shared.transfer.importer import Importer
from shared.worker.context import WorkerContext
from shared.worker.life import Worker

PREFILL_SHARE = 0.25
"""Share of a step's token budget that local prefill (recovery) may take from running streams."""


async def run_decode(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until `stop`, then drain. Raises ConfigurationError and other faults that end the process."""
    await Worker("decode", settings, _service, prefill_share=PREFILL_SHARE).run(stop)


@asynccontextmanager
async def _service(context: WorkerContext) -> AsyncIterator[DecodeService]:
    transports = context.transfer_settings.transports
    importer = Importer(context.built.cache, context.identity, context.secret, context.transfer_limits, transports)
    collect_garbage_rarely()
    try:
        yield DecodeService(context, importer)
    finally:
        await importer.close()
