"""One answer while it is generated: its jobs on the bus, and the text that comes of them.

An answer to k prompts is k jobs of n choices each; choice c of prompt p is choice p·n + c to the
client. Tokens become text the same way whoever reads them and however they are grouped: what is
shown after token t depends on the tokens up to t only. So a client may go on from any event at any
gateway. Whatever way it ends, leaving the context leaves the jobs, and the last to leave cancels.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import structlog

from services.gateway.choices import ChoiceOutput, Delta, TextRules
from services.gateway.errors import GenerationFailed, StreamNotFound
from services.gateway.metering import TokenMeter
from services.gateway.wakeup import Wakeup
from shared import faultpoints
from shared.bus.handle import Restore, StreamReader
from shared.protocol.messages import OUTCOME_FINISHED, End, Job, TokenLogprob, Tokens, Usage
from shared.protocol.position import START, Position, Standing

MAX_AT_ONCE = 256
"""Events of one step; nothing more is taken ahead of a client that reads slowly, the rest stays with the bus."""

_log = structlog.get_logger()

Readers = AsyncGenerator[StreamReader, None]


class Streams(Protocol):
    """What is needed of `RequestStreams`."""

    async def open(self, job: Job, *, detachable: bool = False, restore: Restore | None = None) -> StreamReader:
        """Submit a job; `restore` is called before it has to be submitted again. Raises BusUnavailable."""

    async def attach(
        self, request_id: str, *, detachable: bool = False, restore: Restore | None = None
    ) -> StreamReader | None:
        """Join a job from its first event on; None: unknown. Raises BusUnavailable."""

    async def standing(self, request_id: str, num_choices: int, after: Position) -> Standing | None:
        """Whether a client that has come to `after` can go on; None: unknown. Raises BusUnavailable."""

    def let_go(self) -> int:
        """End every stream here without cancelling its job."""


async def submitted(
    jobs: Sequence[Job], streams: Streams, meter: TokenMeter, detachable: bool = False, restore: Restore | None = None
) -> Readers:
    """Submit jobs one by one. Raises BusUnavailable."""
    for job in jobs:
        yield await streams.open(job, detachable=detachable, restore=restore)
        meter.submitted(job)


async def attached(
    request_ids: Sequence[str], streams: Streams, detachable: bool = False, restore: Restore | None = None
) -> Readers:
    """Join jobs that were submitted before. Raises StreamNotFound and BusUnavailable."""
    for request_id in request_ids:
        reader = await streams.attach(request_id, detachable=detachable, restore=restore)
        if reader is None:
            raise StreamNotFound("This stream is not known here any more.")
        yield reader


@dataclass(frozen=True, slots=True)
class UsageTotals:
    """Token counts of a request and how each of its jobs was served."""

    prompt_tokens: int
    completion_tokens: int
    served: tuple[Usage, ...]


class _JobOutput:
    """One job: its reader, its choices and, once it ended, how it was served.

    `after` is what the client has already, `position` what it has with all that was taken here.
    """

    def __init__(self, first_index: int, reader: StreamReader, rules: TextRules, after: Position) -> None:
        self.reader = reader
        self.job = reader.job
        self.after = self.position = after
        self.choices = [ChoiceOutput(first_index + c, reader.job, rules) for c in range(reader.job.params.n)]
        self.prompt_scores: tuple[TokenLogprob | None, ...] = ()
        self.end: End | None = None


class Generation:
    """Async context manager: takes its readers on entry, leaves them on exit.

    `after`: what the client has already, one position a job; nothing when it begins.
    """

    def __init__(
        self, readers: Readers, rules: TextRules, meter: TokenMeter | None = None, after: Sequence[Position] = ()
    ) -> None:
        self._readers = readers
        self._rules = rules
        self._meter = meter
        self._after = after
        self._outputs: list[_JobOutput] = []
        self._wakeup = Wakeup()
        self._heard: dict[int, None] = {}
        self._stops: list[tuple[_JobOutput, int, int]] = []
        self._failure: Exception | None = None
        self._is_first = True

    async def __aenter__(self) -> Self:
        try:
            async with aclosing(self._readers) as readers:
                async for reader in readers:
                    self._add(reader)
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

        Raises GenerationFailed when a job ends without finishing, after everything before that was given out.
        """
        while self._failure is None and not self._ended:
            if not self._heard and not await self._wakeup.wait(timeout_s):
                return []
            deltas = self._take_all()
            await self._send_stops()
            if self._heard:
                await asyncio.sleep(0)  # there is more than one step may take: others come first
            if deltas:
                return deltas
        if self._failure is not None:
            raise self._failure
        return None

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(output.job for output in self._outputs)

    @property
    def last_event_id(self) -> str:
        """How far the client has come with everything that was taken: every job's position, commas between."""
        if len(self._outputs) == 1:
            return str(self._outputs[0].position)
        return ",".join(str(output.position) for output in self._outputs)

    @property
    def is_resumed(self) -> bool:
        """The client had begun to read it before."""
        return bool(self._after)

    @property
    def is_all_known(self) -> bool:
        """The client had everything to the very end before it resumed."""
        return bool(self._after) and all(output.position == output.after for output in self._outputs)

    @property
    def was_abandoned(self) -> bool:
        """A job was cancelled because nobody read it; known as soon as the readers are there."""
        return any(output.reader.was_abandoned for output in self._outputs)

    def usage(self) -> UsageTotals:
        """Counts so far; complete once `next` answered None."""
        return UsageTotals(
            prompt_tokens=sum(len(output.job.prompt_ids) for output in self._outputs),
            completion_tokens=sum(choice.num_tokens for output in self._outputs for choice in output.choices),
            served=tuple(output.end.usage for output in self._outputs if output.end is not None),
        )

    def prompt_scores(self, position: int) -> tuple[TokenLogprob | None, ...]:
        """Log-probabilities of a prompt's tokens, when asked for and arrived."""
        return self._outputs[position].prompt_scores

    @property
    def _ended(self) -> bool:
        return all(output.end is not None for output in self._outputs)

    def _add(self, reader: StreamReader) -> None:
        number = len(self._outputs)
        after = self._after[number] if self._after else START
        first_index = sum(len(output.choices) for output in self._outputs)
        self._outputs.append(_JobOutput(first_index, reader, self._rules, after))
        reader.on_news(lambda: self._hear(number))
        self._hear(number)

    def _hear(self, number: int) -> None:
        """A job may have events for us."""
        self._heard[number] = None
        self._wakeup.wake()

    async def _send_stops(self) -> None:
        """End on the bus what a stop string has ended; a bus that fails does not keep back what was taken."""
        try:
            while self._stops:
                output, choice, num_tokens = self._stops.pop()
                await output.reader.cancel("stop_string", upto={choice: num_tokens})
        except Exception as exc:
            self._failure = self._failure or exc

    def _take_all(self) -> list[Delta]:
        """Deltas of all events that are there, up to one that fails; the failure is raised once they were given out."""
        deltas: list[Delta] = []
        room = MAX_AT_ONCE
        while self._heard and room and self._failure is None:
            number = next(iter(self._heard))
            output = self._outputs[number]
            try:
                event = output.reader.take()
                if event is None:
                    del self._heard[number]
                    continue
                room -= 1
                delta = self._take(output, output.reader.position, event)
            except Exception as exc:
                self._failure = exc
                break
            if delta is not None:
                deltas.append(delta)
        return deltas

    def _take(self, output: _JobOutput, position: Position, event: Tokens | End) -> Delta | None:
        if isinstance(event, End):
            self._end(output, event)
            output.position = max(output.position, position)
            return None
        output.position = max(output.position, position)
        if event.prompt_logprobs:
            output.prompt_scores = event.prompt_logprobs
        choice = output.choices[event.choice]
        self._observe(choice, len(event.tokens))
        delta = choice.push(event, self.last_event_id, position <= output.after)
        if choice.stopped_at is not None:
            self._stops.append((output, event.choice, choice.stopped_at))
            choice.stopped_at = None
        return delta

    def _end(self, output: _JobOutput, end: End) -> None:
        output.end = end
        if self._meter is not None:
            self._meter.ended(end)
        if end.outcome != OUTCOME_FINISHED and not all(choice.finished for choice in output.choices):
            raise GenerationFailed(end)

    def _observe(self, choice: ChoiceOutput, num_tokens: int) -> None:
        if not num_tokens or choice.finished:
            return
        if self._is_first:
            self._is_first = False
            faultpoints.fault_point("gateway.first_event")
        if self._meter is not None:
            self._meter.tokens(choice.index, num_tokens)

    async def _stop(self, reason: str) -> None:
        self._wakeup.close()
        for output in self._outputs:
            if output.end is None:
                _log.info("request_left", request_id=output.job.request_id, reason=reason)
            output.reader.leave(reason)
