"""The JSON that clients get: chunks of a stream, whole answers, usage.

A chunk is pieced together around the text instead of being dumped from objects, because one is
made for every stream and step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.gateway.choices import Delta
from services.gateway.generation import UsageTotals
from services.gateway.prepare import Plan
from services.gateway.presentation import CHAT
from services.gateway.scores import ScoreTable, chat_scores, prompt_logprobs
from shared.protocol.messages import PATH_RECOMPUTE, TokenLogprob, Usage
from shared.tokenizer.codec import TextCodec

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


class _Envelope:
    """What both routes say alike: the fields around the choices, and those every choice ends with."""

    def __init__(self, plan: Plan, model: str, kind: str, chunk_kind: str) -> None:
        self._plan = plan
        self._fields = {"id": plan.response_id, "object": kind, "created": plan.created, "model": model}
        self._head = f'{dumps({**self._fields, "object": chunk_kind})[:-1]},"choices":['
        self._null_usage = ',"usage":null' if plan.shown.include_usage else ""

    def chunk(self, choice: str, usage: UsageTotals | None = None, extra: str = "") -> str:
        tail = self._null_usage if usage is None else f',"usage":{dumps(usage_object(usage))}'
        return f"{self._head}{choice}]{extra}{tail}}}"

    def delta_chunk(self, delta: Delta, content: str, scores: str, usage: UsageTotals | None) -> str:
        """The chunk of one delta; `content` is the encoded field with its text."""
        ids = f',"token_ids":{dumps(list(delta.token_ids))}' if self._plan.shown.return_token_ids else ""
        end = '"finish_reason":null'
        if delta.finish_reason is not None:
            end = f'"finish_reason":{dumps(delta.finish_reason)},"stop_reason":{dumps(delta.stop_reason)}'
        return self.chunk(f'{{"index":{delta.index},{content},"logprobs":{scores},{end}{ids}}}', usage)

    def usage_chunk(self, usage: UsageTotals) -> str:
        return f'{self._head}],"usage":{dumps(usage_object(usage))}}}'

    def whole(self, choices: list[dict[str, Any]], usage: UsageTotals) -> dict[str, Any]:
        return {**self._fields, "system_fingerprint": None, "choices": choices, "usage": usage_object(usage)}


def _choice(index: int, content: dict[str, Any], logprobs: dict[str, Any] | None, answer: Answer) -> dict[str, Any]:
    """One choice of a whole answer; `content` is the field with its text."""
    ending = {"finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
    return {"index": index, **content, "logprobs": logprobs, **ending}


class ChatFormat:
    """`chat.completion` and its chunks."""

    def __init__(self, plan: Plan, model: str, codec: TextCodec) -> None:
        self._plan = plan
        self._codec = codec
        self._envelope = _Envelope(plan, model, "chat.completion", "chat.completion.chunk")

    def opening(self) -> list[str]:
        extra = ""
        if self._plan.shown.return_token_ids:
            extra = f',"prompt_token_ids":{dumps(list(self._plan.jobs[0].prompt_ids))}'
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        choices = [f'{{"index":{index},{delta}}}' for index in range(self._plan.shown.n)]
        return [self._envelope.chunk(choice, extra=extra) for choice in choices]

    def chunk(self, delta: Delta, usage: UsageTotals | None) -> str:
        content = f'{{"content":{dumps(delta.text)}}}' if delta.text or delta.finish_reason is None else "{}"
        scores = dumps(self._scores(delta.token_ids, delta.scores)) if delta.scores else "null"
        return self._envelope.delta_chunk(delta, f'"delta":{content}', scores, usage)

    def usage_chunk(self, usage: UsageTotals) -> str:
        return self._envelope.usage_chunk(usage)

    def whole(
        self,
        answers: Sequence[Answer],
        prompt_scores: Sequence[Sequence[TokenLogprob | None]],
        usage: UsageTotals,
    ) -> dict[str, Any]:
        body = self._envelope.whole([self._choice(index, answer) for index, answer in enumerate(answers)], usage)
        if self._plan.shown.prompt_logprobs:
            body["prompt_logprobs"] = prompt_logprobs(self._codec, self._plan.jobs[0].prompt_ids, prompt_scores[0])
        if self._plan.shown.return_token_ids:
            body["prompt_token_ids"] = list(self._plan.jobs[0].prompt_ids)
        return body

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(answer.texts), "refusal": None}
        scores = self._scores(answer.token_ids, answer.scores) if self._plan.shown.logprobs else None
        choice = _choice(index, {"message": message}, scores, answer)
        if self._plan.shown.return_token_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    def _scores(self, ids: Sequence[int], scores: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"content": chat_scores(self._codec, ids, scores)}


class CompletionFormat:
    """`text_completion`, streamed and whole, with `echo`."""

    def __init__(self, plan: Plan, model: str, codec: TextCodec) -> None:
        self._plan = plan
        self._codec = codec
        self._envelope = _Envelope(plan, model, "text_completion", "text_completion")
        self._offsets = [len(self._echo(index)) for index in range(len(plan.jobs) * plan.shown.n)]

    def opening(self) -> list[str]:
        if not self._plan.shown.echo_texts:
            return []
        return [
            self._envelope.chunk(
                f'{{"index":{index},"text":{dumps(self._echo(index))},"logprobs":null,"finish_reason":null}}'
            )
            for index in range(len(self._offsets))
        ]

    def chunk(self, delta: Delta, usage: UsageTotals | None) -> str:
        scores = "null"
        if delta.scores:
            table = ScoreTable(self._codec, self._offsets[delta.index])
            table.extend(delta.token_ids, delta.scores)
            self._offsets[delta.index] = table.offset
            scores = dumps(table.as_object())
        return self._envelope.delta_chunk(delta, f'"text":{dumps(delta.text)}', scores, usage)

    def usage_chunk(self, usage: UsageTotals) -> str:
        return self._envelope.usage_chunk(usage)

    def whole(
        self,
        answers: Sequence[Answer],
        prompt_scores: Sequence[Sequence[TokenLogprob | None]],
        usage: UsageTotals,
    ) -> dict[str, Any]:
        n = self._plan.shown.n
        choices = [self._choice(index, answer, prompt_scores[index // n]) for index, answer in enumerate(answers)]
        return self._envelope.whole(choices, usage)

    def _choice(self, index: int, answer: Answer, prompt_scores: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        presentation = self._plan.shown
        ids = self._plan.jobs[index // presentation.n].prompt_ids
        text = self._echo(index) + "".join(answer.texts)
        choice = _choice(index, {"text": text}, self._table(index, ids, prompt_scores, answer), answer)
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
        table = ScoreTable(self._codec, 0)
        if echoes:
            table.extend(ids, prompt_scores)
        table.offset = max(table.offset, len(self._echo(index)))
        table.extend(answer.token_ids, answer.scores)
        return table.as_object()

    def _echo(self, index: int) -> str:
        texts = self._plan.shown.echo_texts
        return texts[index // self._plan.shown.n] if texts else ""
