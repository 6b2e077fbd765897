"""The end of a gateway's life: new requests are refused, running ones finish or are let go."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog

from services.gateway.errors import Draining
from services.gateway.gateway import Gateway

_FAREWELL_S = 2.0
"""How long the clients of requests that a drain let go may take to be told."""

_log = structlog.get_logger()


async def drain(gateway: Gateway, timeout_s: float) -> None:
    """Refuse new requests and wait for the running ones, at most `timeout_s`; then let go of the rest.

    What was let go runs on: its clients are told to resume at another gateway, which has the orphan grace to adopt it.
    """
    gateway.cluster.draining = True
    _log.info("gateway_draining", in_flight=gateway.admission.in_flight, queued=gateway.admission.queued)
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await gateway.admission.wait_idle()
    gateway.admission.refuse_waiting(lambda: Draining("This gateway is shutting down; send the request to another.", 2))
    num_let_go = gateway.streams.let_go()
    if num_let_go:
        _log.warning("requests_let_go", count=num_let_go)
    with suppress(TimeoutError):
        async with asyncio.timeout(_FAREWELL_S):
            await gateway.admission.wait_idle()
    await gateway.sockets.close()
