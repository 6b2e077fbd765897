"""Log-probabilities as clients get them: OpenAI's two shapes, and vLLM's for the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from shared.protocol.messages import TokenLogprob
from shared.tokenizer.codec import TextCodec

MIN_LOGPROB = -9999.0
"""What minus infinity becomes, since JSON has none; the value OpenAI's API shows too."""


def finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB) if math.isfinite(logprob) else MIN_LOGPROB


def chat_scores(codec: TextCodec, ids: Sequence[int], scores: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """A chat completion's `logprobs.content`."""
    return [
        {
            **_score(codec, token, score.logprob),
            "top_logprobs": [_score(codec, other, logprob) for other, logprob in score.top],
        }
        for token, score in zip(ids, scores, strict=False)
    ]


def _score(codec: TextCodec, token: int, logprob: float) -> dict[str, Any]:
    raw = list(codec.token_bytes(token))
    return {"token": codec.token_text(token), "logprob": finite(logprob), "bytes": raw}


class ScoreTable:
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
