"""A worker proves itself before it is ready: a tiny request of its own goes through the whole path.

It travels on streams no user's request uses (this worker's own on its side, the probe stream on the other), so a peer
of the other role, ready or itself in self-test, does the other half. Passed means: the tokens came, prefill and decode
were two workers, and KV bytes were handed over and verified.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

import structlog

from shared.bus.registry import Registry
from shared.bus.requests import RequestStore
from shared.protocol.journal import JournalState, fold
from shared.protocol.keys import Keys
from shared.protocol.messages import OUTCOME_FINISHED, PATH_REMOTE, Job
from shared.protocol.sampling import SamplingParams

log = structlog.get_logger()

_BUDGET_MS = 10_000
_POLL_S = 0.05
_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Everything one self-test depends on; `block_size` makes the prompt span more than one block."""

    store: RequestStore
    registry: Registry
    keys: Keys
    role: str
    model: str
    worker_id: str
    block_size: int
    vocab_size: int

    @property
    def private_stream(self) -> str:
        return self.keys.private_work(self.role, self.model, self.worker_id)

    async def run_until_passed(self) -> None:
        """Repeat until the path works; the log says what is missing."""
        while True:
            problem = await self._attempt()
            if not problem:
                log.info("self_test_passed", worker_id=self.worker_id)
                return
            log.info("self_test_not_passed", worker_id=self.worker_id, problem=problem)
            await asyncio.sleep(_PAUSE_S)

    async def _attempt(self) -> str:
        """One request; "" when it took the whole path, otherwise what went wrong."""
        job = self._job()
        await self.store.submit(job)
        state = await self._await_end(job.request_id)
        if state is None or state.end is None:
            return f"no {'decode' if self.role == 'prefill' else 'prefill'} worker answered yet"
        usage = state.end.usage
        if state.end.outcome != OUTCOME_FINISHED:
            return f"it ended as {state.end.outcome}: {state.end.code}"
        if usage.path != PATH_REMOTE or usage.kv_bytes <= 0:
            return f"no KV was handed over (path {usage.path}, reason {usage.reason or 'none'})"
        return ""

    async def _await_end(self, request_id: str) -> JournalState | None:
        deadline = asyncio.get_running_loop().time() + _BUDGET_MS / 1000 + 2
        while asyncio.get_running_loop().time() < deadline:
            await self.registry.beat_gateway(self.worker_id)  # somebody waits for the answer: no orphan
            polled = await self.store.poll(request_id, self.worker_id)
            if polled is None:
                return None
            state = fold(polled.entries, 1)
            if state.end is not None:
                return state
            await asyncio.sleep(_POLL_S)
        await self.store.cancel(request_id, "self_test", force=True)
        return None

    def _job(self) -> Job:
        streams = {role: self.keys.probe_work(role, self.model) for role in ("prefill", "decode")}
        streams[self.role] = self.private_stream
        return Job(
            request_id=f"selftest-{secrets.token_hex(8)}",
            model=self.model,
            prompt_ids=tuple(1 + i % (self.vocab_size - 1) for i in range(self.block_size + 1)),
            params=SamplingParams(max_tokens=2, seed=0, temperature=0.0),
            gateway=self.worker_id,
            prefill_stream=streams["prefill"],
            decode_stream=streams["decode"],
            tenant=secrets.token_hex(8),  # no prefix to hit, so that bytes have to move
            budget_ms=_BUDGET_MS,
        )
