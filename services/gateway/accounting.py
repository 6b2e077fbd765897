"""Every generation request is counted once as received and once by how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.gateway.metrics import OUTCOME_REJECTED, GatewayMetrics
from shared.errors import CapacityError, RequestError
from shared.protocol.messages import OUTCOME_CANCELLED, OUTCOME_ERROR, OUTCOME_FINISHED


@asynccontextmanager
async def accounted(metrics: GatewayMetrics, route: str) -> AsyncIterator[float]:
    """Count a request; gives the time it arrived."""
    metrics.received.inc()
    metrics.in_flight.inc()
    started = time.monotonic()
    outcome = OUTCOME_FINISHED
    try:
        yield started
        metrics.e2e.observe(time.monotonic() - started)
    except (asyncio.CancelledError, ConnectionError):
        outcome = OUTCOME_CANCELLED
        raise
    except (RequestError, CapacityError) as exc:
        outcome = OUTCOME_REJECTED
        metrics.rejections.labels(exc.code).inc()
        raise
    except BaseException:
        outcome = OUTCOME_ERROR
        raise
    finally:
        metrics.in_flight.dec()
        metrics.outcomes.labels(route, outcome).inc()
