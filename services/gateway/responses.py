"""The JSON that clients get: chunks of a stream, whole answers, usage.

A chunk is pieced together around the text instead of being dumped from objects, because one is
made for every stream and step.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.gateway.choices import Delta
from services.gateway.generation import UsageTotals
from services.gateway.prepare import Plan
from services.gateway.presentation import CHAT
from shared.protocol.messages import PATH_RECOMPUTE, TokenLogprob, Usage
from shared.tokenizer.codec import TextCodec

MIN_LOGPROB = -9999.0
"""What minus infinity becomes, since JSON has none; the value OpenAI's API shows too."""

dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


@dataclass(slots=True)
class Answer:
    """One choice of a whole answer, collected from its deltas."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.scores += delta.scores
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class ResponseFormat(Protocol):
    """One route's JSON. Streamed parts come encoded, whole answers as an object to encode."""

    def opening(self) -> list[str]:
        """Chunks before any token, one per choice where the route has such."""

    def chunk(self, delta: Delta, usage: UsageTotals | None) -> str:
        """The chunk of one delta, with the usage so far when given."""

    def usage_chunk(self, usage: UsageTotals) -> str:
        """The last chunk under include_usage."""

    def whole(
        self,
        answers: Sequence[Answer],
        prompt_scores: Sequence[Sequence[TokenLogprob | None]],
        usage: UsageTotals,
    ) -> dict[str, Any]:
        """The answer in one piece; `prompt_scores` one sequence per prompt, empty unless asked for."""


def make_format(plan: Plan, model: str, codec: TextCodec) -> ResponseFormat:
    return ChatFormat(plan, model, codec) if plan.shown.kind == CHAT else CompletionFormat(plan, model, codec)


def usage_object(usage: UsageTotals) -> dict[str, Any]:
    """OpenAI's usage with a `slipstream` part: the proof of which way the request went."""
    served = usage.served
    cached = sum(_cached(one) for one in served)
    total = usage.prompt_tokens + usage.completion_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": total,
        "prompt_tokens_details": {"cached_tokens": cached},
        "slipstream": {
            "path": _common(one.path for one in served),
            "reason": _common(one.reason for one in served),
            "transport": _common(one.transport for one in served),
            "kv_bytes": sum(one.kv_bytes for one in served),
            "prefill_cached_tokens": sum(one.prefill_cached_tokens for one in served),
            "decode_cached_tokens": sum(one.decode_cached_tokens for one in served),
            "handoff_ms": round(max((one.handoff_ms for one in served), default=0.0), 3),
            "preemptions": sum(one.preemptions for one in served),
            "prefill_worker": _common(one.prefill_worker for one in served),
            "decode_worker": _common(one.decode_worker for one in served),
        },
    }


def _cached(usage: Usage) -> int:
    return usage.decode_cached_tokens if usage.path == PATH_RECOMPUTE else usage.prefill_cached_tokens


def _common(values: Iterable[str]) -> str:
    """The value all jobs share, else `mixed`."""
    counts = Counter(values)
    return "mixed" if len(counts) > 1 else next(iter(counts), "")


class _ChunkWriter:
    """Puts choices into the envelope of one stream."""

    def __init__(self, plan: Plan, kind: str, model: str) -> None:
        self._head = (
            f'{{"id":"{plan.response_id}","object":"{kind}","created":{plan.created},"model":{dumps(model)},"choices":['
        )
        self._null_usage = ',"usage":null' if plan.shown.include_usage else ""

    def choice(self, choice: str, usage: UsageTotals | None = None, extra: str = "") -> str:
        tail = self._null_usage if usage is None else f',"usage":{dumps(usage_object(usage))}'
        return f"{self._head}{choice}]{extra}{tail}}}"

    def usage(self, usage: UsageTotals) -> str:
        return f'{self._head}],"usage":{dumps(usage_object(usage))}}}'


class ChatFormat:
    """`chat.completion` and its chunks."""

    def __init__(self, plan: Plan, model: str, codec: TextCodec) -> None:
        self._plan = plan
        self._model = model
        self._codec = codec
        self._writer = _ChunkWriter(plan, "chat.completion.chunk", model)

    def opening(self) -> list[str]:
        extra = ""
        if self._plan.shown.return_token_ids:
            extra = f',"prompt_token_ids":{dumps(list(self._plan.jobs[0].prompt_ids))}'
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        return [self._writer.choice(f'{{"index":{index},{delta}}}', extra=extra) for index in range(self._plan.shown.n)]

    def chunk(self, delta: Delta, usage: UsageTotals | None) -> str:
        content = f'{{"content":{dumps(delta.text)}}}' if delta.text or delta.finish_reason is None else "{}"
        scores = dumps({"content": self._scores(delta.token_ids, delta.scores)}) if delta.scores else "null"
        choice = f'{{"index":{delta.index},"delta":{content},"logprobs":{scores}{_ending(self._plan, delta)}}}'
        return self._writer.choice(choice, usage)

    def usage_chunk(self, usage: UsageTotals) -> str:
        return self._writer.usage(usage)

    def whole(
        self,
        answers: Sequence[Answer],
        prompt_scores: Sequence[Sequence[TokenLogprob | None]],
        usage: UsageTotals,
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            **{"id": self._plan.response_id, "object": "chat.completion", "created": self._plan.created},
            **{"model": self._model, "system_fingerprint": None},
            "choices": [self._choice(index, answer) for index, answer in enumerate(answers)],
            "usage": usage_object(usage),
        }
        if self._plan.shown.prompt_logprobs:
            body["prompt_logprobs"] = prompt_logprobs(self._codec, self._plan.jobs[0].prompt_ids, prompt_scores[0])
        if self._plan.shown.return_token_ids:
            body["prompt_token_ids"] = list(self._plan.jobs[0].prompt_ids)
        return body

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        wants = self._plan.shown.logprobs
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(answer.texts), "refusal": None},
            "logprobs": {"content": self._scores(answer.token_ids, answer.scores)} if wants else None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self._plan.shown.return_token_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    def _scores(self, ids: Sequence[int], scores: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        return [
            {
                **self._score(token, score.logprob),
                "top_logprobs": [self._score(other, logprob) for other, logprob in score.top],
            }
            for token, score in zip(ids, scores, strict=False)
        ]

    def _score(self, token: int, logprob: float) -> dict[str, Any]:
        raw = list(self._codec.token_bytes(token))
        return {"token": self._codec.token_text(token), "logprob": finite(logprob), "bytes": raw}


class CompletionFormat:
    """`text_completion`, streamed and whole, with `echo`."""

    def __init__(self, plan: Plan, model: str, codec: TextCodec) -> None:
        self._plan = plan
        self._model = model
        self._codec = codec
        self._writer = _ChunkWriter(plan, "text_completion", model)
        self._offsets = [len(self._echo(index)) for index in range(len(plan.jobs) * plan.shown.n)]

    def opening(self) -> list[str]:
        if not self._plan.shown.echo_texts:
            return []
        return [
            self._writer.choice(
                f'{{"index":{index},"text":{dumps(self._echo(index))},"logprobs":null,"finish_reason":null}}'
            )
            for index in range(len(self._offsets))
        ]

    def chunk(self, delta: Delta, usage: UsageTotals | None) -> str:
        scores = "null"
        if delta.scores:
            table = _ScoreTable(self._codec, self._offsets[delta.index])
            table.extend(delta.token_ids, delta.scores)
            self._offsets[delta.index] = table.offset
            scores = dumps(table.as_object())
        choice = f'{{"index":{delta.index},"text":{dumps(delta.text)},"logprobs":{scores}{_ending(self._plan, delta)}}}'
        return self._writer.choice(choice, usage)

    def usage_chunk(self, usage: UsageTotals) -> str:
        return self._writer.usage(usage)

    def whole(
        self,
        answers: Sequence[Answer],
        prompt_scores: Sequence[Sequence[TokenLogprob | None]],
        usage: UsageTotals,
    ) -> dict[str, Any]:
        return {
            **{"id": self._plan.response_id, "object": "text_completion", "created": self._plan.created},
            **{"model": self._model, "system_fingerprint": None},
            "choices": [
                self._choice(index, answer, prompt_scores[index // self._plan.shown.n])
                for index, answer in enumerate(answers)
            ],
            "usage": usage_object(usage),
        }

    def _choice(self, index: int, answer: Answer, prompt_scores: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        presentation = self._plan.shown
        ids = self._plan.jobs[index // presentation.n].prompt_ids
        choice: dict[str, Any] = {
            "index": index,
            "text": self._echo(index) + "".join(answer.texts),
            "logprobs": self._table(index, ids, prompt_scores, answer),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if presentation.prompt_logprobs:
            choice["prompt_logprobs"] = prompt_logprobs(self._codec, ids, prompt_scores)
        if presentation.return_token_ids:
            choice["token_ids"] = answer.token_ids
            choice["prompt_token_ids"] = list(ids)
        return choice

    def _table(
        self, index: int, ids: Sequence[int], prompt_scores: Sequence[TokenLogprob | None], answer: Answer
    ) -> dict[str, Any] | None:
        if not self._plan.shown.logprobs:
            return None
        echoes = bool(self._plan.shown.echo_texts)
        table = _ScoreTable(self._codec, 0)
        if echoes:
            table.extend(ids, prompt_scores)
        table.offset = max(table.offset, len(self._echo(index)))
        table.extend(answer.token_ids, answer.scores)
        return table.as_object()

    def _echo(self, index: int) -> str:
        texts = self._plan.shown.echo_texts
        return texts[index // self._plan.shown.n] if texts else ""


class _ScoreTable:
    """The columns of a completion's logprobs; `offset` is where the next token starts in the text."""

    def __init__(self, codec: TextCodec, offset: int) -> None:
        self._codec = codec
        self.offset = offset
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def extend(self, ids: Sequence[int], scores: Sequence[TokenLogprob | None]) -> None:
        for token, score in zip(ids, scores, strict=False):
            text = self._codec.token_text(token)
            self._tokens.append(text)
            self._offsets.append(self.offset)
            self.offset += len(text)
            self._logprobs.append(None if score is None else finite(score.logprob))
            self._top.append(None if score is None else self._row(text, score))

    def as_object(self) -> dict[str, Any]:
        return {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }

    def _row(self, text: str, score: TokenLogprob) -> dict[str, float]:
        """Alternatives by text, best first; of two tokens with one text the better is kept."""
        row: dict[str, float] = {}
        for token, logprob in score.top:
            row.setdefault(self._codec.token_text(token), finite(logprob))
        row.setdefault(text, finite(score.logprob))
        return row


def prompt_logprobs(
    codec: TextCodec, ids: Sequence[int], scores: Sequence[TokenLogprob | None]
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: per prompt token, id → its log-probability, rank (where known) and text."""
    return [None if score is None else _ranked(codec, token, score) for token, score in zip(ids, scores, strict=False)]


def _ranked(codec: TextCodec, token: int, score: TokenLogprob) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {
        str(other): {"logprob": finite(logprob), "rank": rank, "decoded_token": codec.token_text(other)}
        for rank, (other, logprob) in enumerate(score.top, 1)
    }
    own: dict[str, Any] = {"logprob": finite(score.logprob), "rank": None, "decoded_token": codec.token_text(token)}
    rows.setdefault(str(token), own)
    return rows


def finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB) if math.isfinite(logprob) else MIN_LOGPROB


def _ending(plan: Plan, delta: Delta) -> str:
    """The fields every streamed choice ends with."""
    ids = f',"token_ids":{dumps(list(delta.token_ids))}' if plan.shown.return_token_ids else ""
    if delta.finish_reason is None:
        return f',"finish_reason":null{ids}'
    return f',"finish_reason":{dumps(delta.finish_reason)},"stop_reason":{dumps(delta.stop_reason)}{ids}'
