"""What a worker tells of itself: its state and its load, written every `heartbeat_s` with a time to live."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

from shared.bus.sweeper import SweepCounters
from shared.protocol.messages import WorkerBeat
from shared.worker.context import Service, WorkerContext

STATE_READY = "ready"
STATE_STALLED = "stalled"


class Heartbeat:
    """Owns the worker's state, "loading" at first; `now` makes the heartbeat of this moment."""

    def __init__(self, worker_id: str, role: str, model: str, is_stalled: Callable[[], bool]) -> None:
        self.state = "loading"
        self.progress = 0.0
        self.requests_done = 0
        self._identity = WorkerBeat(
            worker_id=worker_id,
            role=role,
            state=self.state,
            model=model,
            numerics="",
            layout="",
            pid=os.getpid(),
            version=version("slipstream"),
            host=socket.gethostname(),
        )
        self._is_stalled = is_stalled
        self._rate = _Rate()
        self._serving: tuple[WorkerContext, Callable[[], int], SweepCounters] | None = None

    @property
    def model(self) -> str:
        return self._identity.model

    def set_progress(self, fraction: float) -> None:
        """How much of the model is loaded; called from the loading thread."""
        self.progress = fraction

    def serve(
        self, context: WorkerContext, service: Service, num_claimed: Callable[[], int], swept: SweepCounters
    ) -> None:
        """The model is loaded: heartbeats tell numerics, room, load and what was swept from now on."""
        built = context.built
        self._identity = replace(
            self._identity,
            numerics=built.numerics,
            layout=built.layout.fingerprint(),
            addresses=service.addresses,
            max_request_tokens=built.max_request_tokens,
            max_num_seqs=context.engine_settings.max_num_seqs,
            equal_tokens=built.invariance.ok,
        )
        self._serving = context, num_claimed, swept

    def now(self) -> WorkerBeat:
        is_stalled = self.state != "draining" and self._is_stalled()
        beat = replace(self._identity, state=STATE_STALLED if is_stalled else self.state, progress=self.progress)
        if self._serving is None:
            return beat
        context, num_claimed, swept = self._serving
        load = context.built.engine.load()
        produced = load.computed_tokens if beat.role == "prefill" else load.generated_tokens
        return replace(
            beat,
            progress=1.0,
            running=load.running,
            waiting=max(load.waiting, num_claimed() - load.running - load.held),
            kv_tokens=load.kv_tokens,
            kv_tokens_used=load.kv_tokens_used,
            tokens_per_second=self._rate.update(produced),
            requests_done=self.requests_done,
            dead_workers_swept=swept.dead_workers,
            requests_swept=swept.requests,
            own_entries_swept=swept.own,
            orphans_cancelled=swept.orphans,
            generated_tokens=load.generated_tokens,
            sequence_steps=load.sequence_steps,
            drafted=load.drafted,
            accepted=load.accepted,
        )


class _Rate:
    """Tokens per second over the last few heartbeats."""

    def __init__(self) -> None:
        self._last = (time.monotonic(), 0)
        self._value = 0.0

    def update(self, total: int) -> float:
        now = time.monotonic()
        elapsed, produced = now - self._last[0], total - self._last[1]
        self._last = (now, total)
        if elapsed > 0:
            self._value += 0.5 * (produced / elapsed - self._value)
        return round(self._value, 2)
