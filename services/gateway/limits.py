"""Every limit in force, said once at start."""

from __future__ import annotations

import resource

import structlog

from services.gateway.server import MAX_HEADER_BYTES, MAX_HEADERS
from shared.config import Settings

_log = structlog.get_logger()


def log_limits(settings: Settings, admission_limit: int, num_keys: int) -> None:
    """One line with every limit in force, so that what a client runs into can be looked up in the log."""
    edge = settings.gateway
    limits = {
        name: value for name, value in edge.model_dump().items() if name.startswith("max_") or name.endswith("_s")
    }
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    _log.info(
        "gateway_limits",
        **limits,
        admission_limit=admission_limit,
        num_keys=num_keys,
        open_files=open_files,
        header_bytes=MAX_HEADER_BYTES,
        header_lines=MAX_HEADERS,
        drain_timeout_s=settings.drain_timeout_s,
    )
