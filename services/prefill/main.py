"""Start of a prefill worker process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.prefill.worker import PrefillService
from shared.config import Settings
from shared.garbage import collect_garbage_rarely
from shared.transfer.exporter import Exporter
from shared.worker.context import WorkerContext
from shared.worker.life import Worker


async def run_prefill(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until `stop`, then drain. Raises ConfigurationError and other faults that end the process."""
    await Worker("prefill", settings, _service, prefill_share=1.0).run(stop)


@asynccontextmanager
async def _service(context: WorkerContext) -> AsyncIterator[PrefillService]:
    settings = context.transfer_settings
    exporter = Exporter(context.built.cache, context.identity, context.secret, context.transfer_limits)
    await exporter.start(settings.host, settings.port, settings.advertise_host or None, settings.advertise_port)
    collect_garbage_rarely()
    try:
        yield PrefillService(context, exporter)
    finally:
        await exporter.close()
