"""A worker without an engine: answers requests on the real bus with tokens its test chose.

It speaks for both roles and stays in the prefill state to the end, which the scripts allow; to the
gateway it looks like any cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Self

from shared.bus.connection import connect, connect_blocking
from shared.bus.registry import Registry
from shared.bus.requests import RequestStore
from shared.bus.results import Append, Begun, Cancelled, Lease, Refused
from shared.bus.workqueue import WorkQueue
from shared.protocol.journal import chain
from shared.protocol.keys import Keys
from shared.protocol.messages import PATH_REMOTE, Job, TokenLogprob, Tokens, Usage, WorkerBeat
from shared.tasks import end_tasks, heed_cancellation

USAGE = Usage(
    path=PATH_REMOTE,
    transport="shm",
    kv_bytes=4096,
    prefill_cached_tokens=2,
    handoff_ms=1.5,
    prefill_worker="fake-prefill",
    decode_worker="fake-decode",
)

AnswerOf = Callable[[Job, int], Sequence[int]]


def scores(token: int, k: int) -> TokenLogprob:
    """A made-up log-probability of a token, and k alternatives, the token itself the best."""
    return TokenLogprob(-0.25, tuple((token + rank, -0.25 - rank) for rank in range(k)))


class FakeWorker:
    """`async with FakeWorker(...) as worker`: `answer(job, choice)` gives each choice's tokens.

    A choice ends as its parameters say, or with "stop" after its last token. While `gate` is
    cleared only the first `pause_at` tokens of each choice are sent.
    """

    def __init__(self, url: str, keys: Keys, model: str, answer: AnswerOf, max_request_tokens: int = 4096) -> None:
        self._url = url
        self._keys = keys
        self._model = model
        self._answer = answer
        self._max_request_tokens = max_request_tokens
        self._tasks: list[asyncio.Task[None]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.pause_at = 1
        self.roles = ["prefill", "decode"]
        self.jobs: list[Job] = []
        self.ended: list[str] = []
        self.cancelled: list[str] = []
        self.fail_with: tuple[str, str] | None = None
        self.max_num_seqs = 0

    async def __aenter__(self) -> Self:
        self._commands, self._reader = connect(self._url), connect_blocking(self._url)
        self.store = RequestStore(self._commands, self._keys)
        self._registry = Registry(self._commands, self._keys)
        self._queue = WorkQueue(self._reader, self._commands, self._work(), "fake-prefill")
        await self.beat()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._keep_beating())]
        return self

    async def __aexit__(self, *_: object) -> None:
        await end_tasks(self._tasks)
        for role in ("prefill", "decode"):
            await self._registry.leave(f"fake-{role}")
        await self._commands.aclose()
        await self._reader.aclose()

    def _work(self) -> list[str]:
        return [work("prefill", self._model) for work in (self._keys.express_work, self._keys.work)]

    async def beat(self) -> None:
        """One heartbeat of each role in `roles`; the others leave."""
        for role in ("prefill", "decode"):
            if role in self.roles:
                await self._registry.beat(self._beat(role))
            else:
                await self._registry.leave(f"fake-{role}")

    def _beat(self, role: str) -> WorkerBeat:
        return WorkerBeat(
            worker_id=f"fake-{role}",
            role=role,
            state="ready",
            model=self._model,
            numerics="n",
            layout="l",
            kv_tokens=self._max_request_tokens,
            max_request_tokens=self._max_request_tokens,
            max_num_seqs=self.max_num_seqs,
        )

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            await self.beat()

    async def _read(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                for stream, entry, fields in await self._queue.read(8, 200):
                    group.create_task(self._serve(stream, entry, fields["id"]))
                heed_cancellation()

    async def _serve(self, stream: str, entry: str, request_id: str) -> None:
        begun = await self.store.begin(stream, entry, request_id, "fake-prefill")
        if not isinstance(begun, Begun):
            return
        self.jobs.append(begun.job)
        if self.fail_with is not None:
            await self.store.fail(begun.lease, *self.fail_with)
            return
        outputs = [list(self._answer(begun.job, choice)) for choice in range(begun.job.params.n)]
        longest = max(map(len, outputs))
        for step in range(longest):
            if step >= self.pause_at and not await self._may_go_on(begun.lease):
                self.cancelled.append(request_id)
                return
            appends = [self._append(begun, choice, ids, step) for choice, ids in enumerate(outputs) if step < len(ids)]
            wanted = [append for append in appends if append is not None]
            results = await self.store.append(wanted)
            if any(isinstance(one, Refused) or (isinstance(one, Cancelled) and not one.choice_only) for one in results):
                self.cancelled.append(request_id)
                return
        self.ended.append(request_id)

    async def _may_go_on(self, lease: Lease) -> bool:
        """Wait for the gate, asking as a real worker does whether the request is still wanted."""
        while not self.gate.is_set():
            if not (await self.store.touch(lease)).owner:
                return False
            try:
                async with asyncio.timeout(0.02):
                    await self.gate.wait()
            except TimeoutError:
                continue
        return True

    def _append(self, begun: Begun, choice: int, ids: Sequence[int], step: int) -> Append | None:
        """The step's token of one choice; None once the choice ended."""
        params = begun.job.params
        if step and params.finish_reason(ids[:step]) is not None:
            return None
        held, token = ids[:step], ids[step]
        h = chain("", held)
        finish = params.finish_reason(ids[: step + 1]) or ("stop" if step + 1 == len(ids) else None)
        prompt: tuple[TokenLogprob | None, ...] = ()
        if params.prompt_logprobs is not None and step == 0 and choice == 0:
            k = params.prompt_logprobs
            prompt = (None, *(scores(one, k) for one in begun.job.prompt_ids[1:]))
        event = Tokens(
            choice=choice,
            base=step,
            h_base=h,
            h=chain(h, [token]),
            tokens=(token,),
            logprobs=() if params.logprobs is None else (scores(token, params.logprobs),),
            finish=finish,
            prompt_logprobs=prompt,
        )
        return Append(begun.lease, event, USAGE)
