"""A request this worker owns while it decodes: its lease, its sequences, and what it has journaled."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from shared.bus.results import Append, Lease
from shared.engine.engine import Sampled
from shared.engine.sequence import Sequence
from shared.protocol.journal import JournalState
from shared.protocol.messages import Job, TokenLogprob, Usage
from shared.worker.bridge import EngineBridge
from shared.worker.jobs import events_from, tokens_event
from shared.worker.probation import Start


class DecodeRequest:
    """Owned by the handler that committed it; the journaler reads and advances `state`."""

    def __init__(
        self, job: Job, lease: Lease, state: JournalState, usage: Usage, bridge: EngineBridge, start: Start
    ) -> None:
        self.job = job
        self.lease = lease
        self.state = state
        self.sequences: list[Sequence] = []
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.failure = ""
        self.gateway = job.gateway
        """The gateway that holds the request, as the last touch told."""
        self._start = start
        self._usage = usage
        self._bridge = bridge

    def append_of(self, samples: list[Sampled], prompt_logprobs: tuple[TokenLogprob | None, ...] = ()) -> Append:
        """The journal append for new consecutive samples of one choice; `state` then holds them.

        `prompt_logprobs` go with a first token that was sampled here, because the prefill worker did not get to it.
        """
        event = tokens_event(self.state, samples, prompt_logprobs)
        self.state.choices[event.choice].take(event)
        return Append(self.lease, event, self._usage_now() if event.finish else None)

    def append_from(self, choice: int, base: int) -> Append:
        """All tokens from `base` on once more, for a Redis that lost its last writes."""
        event = events_from(self.state, choice, base, self.state.choices[choice].finish)
        return Append(self.lease, event, self._usage_now() if event.finish else None)

    def journaled(self) -> None:
        """The first tokens made here are in the journal: the request is through its start."""
        self._start.over()

    def stop_choice(self, choice: int) -> None:
        """One choice was ended by the gateway (a stop string); the others go on."""
        for sequence in self.sequences:
            if choice in sequence.choices:
                self._bridge.post(lambda engine, ended=sequence: engine.free(ended))  # type: ignore[misc]

    def fail(self, message: str) -> None:
        """The engine could not go on with it; the handler ends the request with this message."""
        self.failure = message
        self.end("failed")

    def end(self, why: str) -> None:
        """Nothing more is to be done here; the handler frees the sequences. May be repeated."""
        if not self.done.done():
            self.done.set_result(why)

    def _usage_now(self) -> Usage:
        return replace(self._usage, preemptions=sum(sequence.num_preemptions for sequence in self.sequences))
