"""What the gateway knows of the cluster: live workers, whether Redis answers, whether it can serve.

`/live` says that the process turns, `/health` that a request would be served now.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import structlog
from redis.exceptions import RedisError, ResponseError

from services.gateway.looptime import LoopTime
from services.gateway.params import Limits
from shared.bus.registry import Registry
from shared.errors import BusUnavailable, NoWorkers
from shared.protocol.keys import ROLES
from shared.protocol.messages import WorkerBeat
from shared.tasks import end_tasks

_READY = "ready"
_HEADROOM = 1.25
"""Prompts let in for each sequence the decode workers can run: the rest are being prefilled meanwhile."""

_log = structlog.get_logger()


class ClusterView:
    """The latest heartbeats of the workers of one model, refreshed by `run`; also beats for the gateway itself."""

    def __init__(
        self,
        registry: Registry,
        gateway_id: str,
        model: str,
        interval_s: float,
        ttl_s: float,
        loop_time: LoopTime | None = None,
    ) -> None:
        self._registry = registry
        self._gateway_id = gateway_id
        self._model = model
        self._interval_s = interval_s
        self._ttl_s = ttl_s
        self._loop_time = loop_time or LoopTime()
        self._seen_at: float | None = None
        self._listeners: list[Callable[[], None]] = []
        self.beats: tuple[WorkerBeat, ...] = ()
        self.num_gateways = 1
        self.refused = ""
        self.draining = False

    def on_refresh(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each refresh that read the workers' beats."""
        self._listeners.append(listener)

    async def run(self) -> None:
        """Refresh for ever; ends by cancellation only."""
        ticking = asyncio.create_task(self._loop_time.run(), name="loop-time")
        try:
            await self._refresh_forever()
        finally:
            await end_tasks([ticking])

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.refresh()
            except (RedisError, OSError) as exc:
                _log.warning("cluster_view_failed", error=type(exc).__name__)
            except Exception:
                _log.exception("cluster_view_failed")

    async def refresh(self) -> None:
        """Beat once and read all workers' beats. Raises redis errors.

        A Redis that refuses the beat (out of memory, read-only, disk full) would refuse a request as well.
        """
        try:
            await self._registry.beat_gateway(self._gateway_id)
            self._note_writes("")
        except ResponseError as exc:
            self._note_writes(type(exc).__name__)
        live = await self._registry.live()
        self.num_gateways = max(1, len(await self._registry.live_gateways()))
        self.beats = tuple(beat for beat in live if beat.model == self._model)
        self._seen_at = self._loop_time.now()
        for listener in self._listeners:
            listener()

    def _note_writes(self, refused: str) -> None:
        if refused != self.refused:
            _log.warning("redis_writes_refused" if refused else "redis_writes_accepted", error=refused or self.refused)
        self.refused = refused

    async def leave(self) -> None:
        """Take the gateway off the list at the end of its drain; without Redis the heartbeat just expires."""
        try:
            await self._registry.leave_gateway(self._gateway_id)
        except (RedisError, OSError) as exc:
            _log.warning("gateway_leave_failed", error=type(exc).__name__)

    @property
    def redis_answers(self) -> bool:
        """Redis was read within one heartbeat TTL; older beats say nothing about the workers either.

        A time in which our own loop stood still is not Redis' silence: it had no chance to be heard.
        """
        return self._seen_at is not None and self._loop_time.now() - self._seen_at <= self._ttl_s

    def ready(self, role: str) -> list[WorkerBeat]:
        return [beat for beat in self.beats if beat.role == role and beat.state == _READY]

    def reasons(self) -> list[str]:
        """Why no request can be served now; empty when it can."""
        if self.draining:
            return ["the gateway is draining"]
        if not self.redis_answers:
            return ["Redis does not answer"]
        if self.refused:
            return ["Redis cannot be written"]
        return [f"no {role} worker is ready" for role in ROLES if not self.ready(role)]

    def require_ready(self) -> None:
        """Raises BusUnavailable or NoWorkers when a new request could not be served."""
        if not self.redis_answers:
            raise BusUnavailable("The server cannot reach its queue; try again in a moment.", retry_after=2)
        if self.refused:
            raise BusUnavailable("The server cannot write to its queue; try again in a moment.", retry_after=5)
        missing = [role for role in ROLES if not self.ready(role)]
        if missing:
            raise NoWorkers(f"No {' and no '.join(missing)} worker is ready; try again in a moment.", retry_after=2)

    def limits(self, max_model_len: int, vocab_size: int) -> Limits:
        """Bounds of a request that every ready worker can hold: any of them may claim it, or take it over later."""
        rooms = [beat.max_request_tokens for role in ROLES for beat in self.ready(role)]
        return Limits(context=min([max_model_len, *rooms]), vocab_size=vocab_size)

    def room(self) -> int | None:
        """Prompts this gateway may have running, its part of what the decode workers can; None: they do not say."""
        sizes = [beat.max_num_seqs for beat in self.ready("decode")]
        if not sizes or 0 in sizes:
            return None
        return math.ceil(_HEADROOM * sum(sizes) / self.num_gateways)

    def report(self) -> dict[str, Any]:
        """Body of /health."""
        reasons = self.reasons()
        workers = {
            role: {"ready": len(self.ready(role)), "live": sum(beat.role == role for beat in self.beats)}
            for role in ROLES
        }
        return {
            "status": "unavailable" if reasons else "ok",
            "reasons": reasons,
            "redis": self.redis_answers and not self.refused,
            "workers": workers,
        }
