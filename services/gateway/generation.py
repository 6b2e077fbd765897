"""One client request while it is generated: its jobs on the bus, and the text that comes of them.

A request of k prompts is k jobs of n choices each; choice c of prompt p is choice p·n + c to the
client. Whatever way it ends, leaving the context cancels what is still running.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import structlog

from services.gateway.errors import GenerationFailed
from services.gateway.metrics import GatewayMetrics
from shared.bus.stream import StreamHandle
from shared.protocol.messages import FINISH_LENGTH, FINISH_STOP, OUTCOME_FINISHED, End, Job, TokenLogprob, Tokens, Usage
from shared.tokenizer.detokenizer import ChoiceText

_log = structlog.get_logger()


class JobOpener(Protocol):
    """What is needed of `RequestStreams`."""

    async def open(self, job: Job) -> StreamHandle:
        """Submit a job. Raises BusUnavailable."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one journal entry adds to one choice. `event_id` names the entry; `scores` one per token id."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    event_id: str
    scores: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class TextRules:
    """How the tokens of a request become its text; `scores_only`: the client wants none of them."""

    eos_ids: frozenset[int]
    include_stop: bool
    wants_every_token: bool
    scores_only: bool
    new_text: Callable[[], ChoiceText]


class ChoiceOutput:
    """One choice as it grows; turns its Tokens into Deltas and knows where it ended."""

    def __init__(self, index: int, job: Job, rules: TextRules) -> None:
        self._index = index
        self._stop_ids = frozenset(job.params.stop_ids)
        self._rules = rules
        self._text = rules.new_text()
        self.num_tokens = 0
        self.finished = False
        self.stopped_at: int | None = None
        self.last_token_at: float | None = None

    def push(self, event: Tokens, event_id: str) -> Delta | None:
        """Take an entry of this choice; None when there is nothing to show for it."""
        if self.finished:
            return None
        delta = self._text.push(self._visible(event))
        text, stopped = delta.text, delta.stopped
        if stopped is None and event.finish is not None:
            tail = self._text.flush()
            text, stopped = text + tail.text, tail.stopped
        if stopped is not None:
            shown = event.tokens[: delta.num_tokens - self.num_tokens]
            if event.finish is None:
                self.stopped_at = delta.num_tokens
            return self._delta(event, event_id, shown, text, FINISH_STOP, stopped)
        return self._delta(event, event_id, event.tokens, text, event.finish, self._stop_reason(event))

    def _visible(self, event: Tokens) -> tuple[int, ...]:
        """The tokens that are text: all but the stop token that ended the choice."""
        ends_in_stop = event.finish == FINISH_STOP and event.tokens and event.tokens[-1] in self._stop_ids
        return event.tokens[:-1] if ends_in_stop and not self._rules.include_stop else event.tokens

    def _delta(
        self,
        event: Tokens,
        event_id: str,
        shown: tuple[int, ...],
        text: str,
        finish: str | None,
        stop_reason: str | int | None,
    ) -> Delta | None:
        self.finished = finish is not None
        if self._rules.scores_only:
            return Delta(self._index, "", (), event_id, (), FINISH_LENGTH) if self.finished else None
        self.num_tokens += len(shown)
        if not text and finish is None and not (shown and self._rules.wants_every_token):
            return None
        return Delta(self._index, text, shown, event_id, event.logprobs[: len(shown)], finish, stop_reason)

    def _stop_reason(self, event: Tokens) -> int | None:
        """The stop token the client asked for; None for the model's own end of sequence, as vLLM does."""
        if event.finish != FINISH_STOP or not event.tokens or event.tokens[-1] in self._rules.eos_ids:
            return None
        return event.tokens[-1]


class _JobOutput:
    """One job: its handle, its choices and, once it ended, how it was served."""

    def __init__(self, position: int, job: Job, handle: StreamHandle, rules: TextRules) -> None:
        n = job.params.n
        self.position = position
        self.job = job
        self.handle = handle
        self.choices = [ChoiceOutput(position * n + c, job, rules) for c in range(n)]
        self.prompt_scores: tuple[TokenLogprob | None, ...] = ()
        self.end: End | None = None


@dataclass(frozen=True, slots=True)
class UsageTotals:
    """Token counts of a request and how each of its jobs was served."""

    prompt_tokens: int
    completion_tokens: int
    served: tuple[Usage, ...]


class Generation:
    """Async context manager: submits on entry, cancels what has not ended on exit."""

    def __init__(self, jobs: tuple[Job, ...], opener: JobOpener, rules: TextRules, metrics: GatewayMetrics) -> None:
        self._jobs = jobs
        self._opener = opener
        self._rules = rules
        self._metrics = metrics
        self._started = time.monotonic()
        self._first = True
        self._outputs: list[_JobOutput] = []
        self._inbox: asyncio.Queue[tuple[_JobOutput, str, Tokens | End | Exception]] = asyncio.Queue()
        self._pumps: list[asyncio.Task[None]] = []
        self.last_event_id = ""

    async def __aenter__(self) -> Self:
        try:
            for position, job in enumerate(self._jobs):
                handle = await self._opener.open(job)
                output = _JobOutput(position, job, handle, self._rules)
                self._outputs.append(output)
                self._pumps.append(asyncio.create_task(self._pump(output)))
                self._metrics.prompt_tokens.inc(len(job.prompt_ids))
        except BaseException:
            await self._stop("submit_failed")
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop("client_gone" if kind is not None else "done")

    async def next(self, timeout_s: float) -> list[Delta] | None:
        """The deltas that are there, at least one; [] after `timeout_s` without any, None at the end.

        Raises GenerationFailed when a job ends without finishing.
        """
        while not self._ended:
            try:
                async with asyncio.timeout(timeout_s):
                    items = [await self._inbox.get()]
            except TimeoutError:
                return []
            while not self._inbox.empty():
                items.append(self._inbox.get_nowait())
            deltas = [delta for item in items if (delta := await self._take(*item)) is not None]
            if deltas:
                return deltas
        return None

    def usage(self) -> UsageTotals:
        """Counts so far; complete once `next` answered None."""
        return UsageTotals(
            prompt_tokens=sum(len(job.prompt_ids) for job in self._jobs),
            completion_tokens=sum(choice.num_tokens for output in self._outputs for choice in output.choices),
            served=tuple(output.end.usage for output in self._outputs if output.end is not None),
        )

    def prompt_scores(self, position: int) -> tuple[TokenLogprob | None, ...]:
        """Log-probabilities of a prompt's tokens, when asked for and arrived."""
        return self._outputs[position].prompt_scores

    @property
    def _ended(self) -> bool:
        return all(output.end is not None for output in self._outputs)

    async def _pump(self, output: _JobOutput) -> None:
        """Move events into the one inbox, so that all that are there can be written at once."""
        try:
            async for event in output.handle:
                self._inbox.put_nowait((output, output.handle.last_event_id, event))
        except Exception as exc:
            self._inbox.put_nowait((output, "", exc))

    async def _take(self, output: _JobOutput, event_id: str, event: Tokens | End | Exception) -> Delta | None:
        if isinstance(event, Exception):
            raise event
        self.last_event_id = self._name(output, event_id)
        if isinstance(event, End):
            output.end = event
            self._metrics.observe_usage(event.usage)
            if event.outcome != OUTCOME_FINISHED and not all(choice.finished for choice in output.choices):
                raise GenerationFailed(event)
            return None
        if event.prompt_logprobs:
            output.prompt_scores = event.prompt_logprobs
        choice = output.choices[event.choice]
        self._observe(choice, len(event.tokens))
        delta = choice.push(event, self.last_event_id)
        if choice.stopped_at is not None:
            await output.handle.cancel("stop_string", upto={event.choice: choice.stopped_at})
            choice.stopped_at = None
        return delta

    def _observe(self, choice: ChoiceOutput, num_tokens: int) -> None:
        if not num_tokens or choice.finished:
            return
        now = time.monotonic()
        if self._first:
            self._first = False
            self._metrics.ttft.observe(now - self._started)
        if choice.last_token_at is not None:
            self._metrics.itl.observe((now - choice.last_token_at) / num_tokens)
        choice.last_token_at = now
        self._metrics.generation_tokens.inc(num_tokens)

    def _name(self, output: _JobOutput, event_id: str) -> str:
        """The journal id; with several jobs, the job's position before it."""
        return event_id if len(self._jobs) == 1 else f"{output.position}:{event_id}"

    async def _stop(self, reason: str) -> None:
        for pump in self._pumps:
            pump.cancel()
        for output in self._outputs:
            if output.end is None:
                await output.handle.cancel(reason, force=True)
                _log.info("request_cancelled", request_id=output.job.request_id, reason=reason)
