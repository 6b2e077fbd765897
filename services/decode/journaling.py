"""Journals and publishes what the engine produced: one round trip a step, while the next step runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Sequence_

import structlog
from redis.exceptions import RedisError

from services.decode.request import DecodeRequest
from shared import faultpoints
from shared.bus.requests import RequestStore
from shared.bus.results import Append, Appended, AppendResult, Behind, Cancelled, Touched
from shared.engine.engine import Output, Sampled
from shared.engine.sequence import Sequence
from shared.protocol.messages import TokenLogprob
from shared.tasks import heed_cancellation
from shared.worker.bridge import EngineBridge

log = structlog.get_logger()

TOUCH_INTERVAL_S = 1.0
_RETRY_S = 0.2
_FLUSH_TIMEOUT_S = 5.0


class Journaler:
    """The one writer of tokens in a decode worker. Requests are added at commit and removed at their end."""

    def __init__(self, store: RequestStore, bridge: EngineBridge) -> None:
        self._store = store
        self._bridge = bridge
        self._requests: dict[Sequence, DecodeRequest] = {}
        self._num_journaled = 0
        self._progress = asyncio.Event()

    def add(self, request: DecodeRequest) -> None:
        for sequence in request.sequences:
            self._requests[sequence] = request

    def remove(self, request: DecodeRequest) -> None:
        for sequence in request.sequences:
            self._requests.pop(sequence, None)

    def requests(self) -> list[tuple[str, str]]:
        return [(request.lease.request_id, request.gateway) for request in set(self._requests.values())]

    async def run(self) -> None:
        while True:
            steps = await self._bridge.outputs()
            await self._journal(self._collect(steps))
            self._num_journaled += len(steps)
            self._progress.set()
            heed_cancellation()

    async def keep_touching(self) -> None:
        """Refresh the lease of every request each second and hear of those that were cancelled or taken away."""
        while True:
            await asyncio.sleep(TOUCH_INTERVAL_S)
            requests = set(self._requests.values())
            try:
                touched = await asyncio.gather(*(self._store.touch(request.lease) for request in requests))
            except (RedisError, OSError) as error:
                log.warning("touch_failed", error=type(error).__name__)
                continue
            finally:
                heed_cancellation()
            for request, result in zip(requests, touched, strict=True):
                self._heed(request, result)

    async def requeue_all(self) -> None:
        """Hand every request to another worker, with all its tokens so far: first stop, then write, then give back."""
        requests = set(self._requests.values())
        sequences = [sequence for request in requests for sequence in request.sequences]
        await self._bridge.call(lambda engine: engine.free_all(sequences))
        await self._flush()
        for request in requests:
            await self._store.requeue(request.lease)
            request.end("requeued")

    async def _flush(self) -> None:
        """Until everything the engine has produced so far is journaled, or Redis has had its time."""
        target = self._bridge.num_delivered
        try:
            async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                while self._num_journaled < target:
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            log.warning("flush_timed_out", steps=target - self._num_journaled)

    def _heed(self, request: DecodeRequest, touched: Touched) -> None:
        if touched.gateway:
            request.gateway = touched.gateway
        if not touched.owner or touched.cancel:
            request.end("cancelled" if touched.cancel else "owned by another")

    def _collect(self, steps: Sequence_[Sequence_[Output]]) -> list[tuple[DecodeRequest, Append]]:
        """Merge the samples of all finished steps into one append for each choice."""
        merged: dict[Sequence, list[Sampled]] = {}
        prompts: dict[Sequence, tuple[TokenLogprob | None, ...]] = {}
        for output in (output for step in steps for output in step):
            request = self._requests.get(output.sequence)
            if request is None:
                continue
            if output.error:
                request.fail(output.error)
            elif output.samples:
                merged.setdefault(output.sequence, []).extend(output.samples)
                prompts[output.sequence] = output.prompt_logprobs
        owned = ((self._requests[sequence], sequence, samples) for sequence, samples in merged.items())
        return [
            (request, request.append_of(samples, prompts[sequence]))
            for request, sequence, samples in owned
            if not request.done.done()
        ]

    async def _journal(self, appends: list[tuple[DecodeRequest, Append]]) -> None:
        """Write until Redis has answered: an append may be repeated, so a lost reply does no harm."""
        if any(append.tokens.finish for _, append in appends):
            faultpoints.fault_point("decode.ending")
        while appends:
            try:
                results = await self._store.append([append for _, append in appends])
            except (RedisError, OSError) as error:
                log.warning("append_failed", error=type(error).__name__, pending=len(appends))
                await asyncio.sleep(_RETRY_S)
                continue
            faultpoints.fault_point("decode.appended")
            again = (self._settle(*pair, result) for pair, result in zip(appends, results, strict=True))
            appends = [pair for pair in again if pair is not None]

    def _settle(
        self, request: DecodeRequest, append: Append, result: AppendResult
    ) -> tuple[DecodeRequest, Append] | None:
        """Act on one answer; returns what has to be written again."""
        match result:
            case Appended(done=False):
                request.journaled()
                return None
            case Cancelled(choice_only=True):
                request.stop_choice(append.tokens.choice)
            case Behind(n=n, h=h, choice=choice) if request.state.choices[choice].hash_at(n) == h:
                return request, request.append_from(choice, n)
            case _:
                request.end(type(result).__name__.lower())
        return None
