"""One choice of an answer as it grows: journal entries in, what the client is shown of them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from shared.protocol.messages import FINISH_LENGTH, FINISH_STOP, Job, TokenLogprob, Tokens
from shared.tokenizer.detokenizer import ChoiceText


@dataclass(frozen=True, slots=True)
class Delta:
    """What one journal entry adds to one choice; `scores` one per token id.

    `event_id` is the position of every job after this entry. `known`: the client had it before it resumed.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    event_id: str
    scores: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    known: bool = False


@dataclass(frozen=True, slots=True)
class TextRules:
    """How the tokens of a request become its text; `scores_only`: the client wants none of them."""

    eos_ids: frozenset[int]
    include_stop: bool
    wants_every_token: bool
    scores_only: bool
    new_text: Callable[[], ChoiceText]


class _Mark(NamedTuple):
    """What each delta says of where it stands."""

    event_id: str
    known: bool


class ChoiceOutput:
    """One choice as it grows; turns its Tokens into Deltas and knows where it ended."""

    def __init__(self, index: int, job: Job, rules: TextRules) -> None:
        self.index = index
        self._stop_ids = frozenset(job.params.stop_ids)
        self._rules = rules
        self._text = rules.new_text()
        self._last: int | None = None
        self.num_tokens = 0
        self.finished = False
        self.stopped_at: int | None = None

    def push(self, event: Tokens, event_id: str, known: bool = False) -> Delta | None:
        """Take an entry of this choice; None when there is nothing to show for it."""
        if self.finished:
            return None
        mark = _Mark(event_id, known)
        self._last = event.tokens[-1] if event.tokens else self._last
        delta = self._text.push(self._visible(event))
        text, stopped = delta.text, delta.stopped
        if stopped is None and event.finish is not None:
            tail = self._text.flush()
            text, stopped = text + tail.text, tail.stopped
        if stopped is not None:
            shown = event.tokens[: delta.num_tokens - self.num_tokens]
            if event.finish is None:
                self.stopped_at = delta.num_tokens
            return self._delta(event, mark, shown, text, FINISH_STOP, stopped)
        return self._delta(event, mark, event.tokens, text, event.finish, self._stop_reason(event))

    def _visible(self, event: Tokens) -> tuple[int, ...]:
        """The tokens that are text: all but a stop token, which ends its choice wherever it comes."""
        is_stop = bool(event.tokens) and event.tokens[-1] in self._stop_ids
        return event.tokens[:-1] if is_stop and not self._rules.include_stop else event.tokens

    def _delta(
        self,
        event: Tokens,
        mark: _Mark,
        shown: tuple[int, ...],
        text: str,
        finish: str | None,
        stop_reason: str | int | None,
    ) -> Delta | None:
        self.finished = finish is not None
        if self._rules.scores_only:
            end = Delta(self.index, "", (), mark.event_id, (), FINISH_LENGTH, known=mark.known)
            return end if self.finished else None
        self.num_tokens += len(shown)
        if not text and finish is None and not (shown and self._rules.wants_every_token):
            return None
        scores = event.logprobs[: len(shown)]
        return Delta(self.index, text, shown, mark.event_id, scores, finish, stop_reason, mark.known)

    def _stop_reason(self, event: Tokens) -> int | None:
        """The stop token the client asked for; None for the model's own end of sequence, as vLLM does."""
        if event.finish != FINISH_STOP or self._last in self._rules.eos_ids or self._last not in self._stop_ids:
            return None
        return self._last
