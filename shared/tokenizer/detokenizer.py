"""Turn token ids into text as they arrive.

Every supported decoder reduces to bytes per token, so the text of a stream is the UTF-8 decoding
of the joined bytes: an incremental decoder gives it in constant time per token, holds back a
character whose bytes are not all there, and shows U+FFFD for bytes that can never become one.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from shared.tokenizer.stop_strings import StopStrings

if TYPE_CHECKING:
    from shared.tokenizer.codec import TextCodec

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one choice. All pieces joined, `flush` included, equal `TextCodec.decode` of all ids."""

    def __init__(self, codec: TextCodec, *, skip_special: bool = True, continuation: bool = False) -> None:
        """`continuation` keeps the leading space that SentencePiece decoders drop at the start of a text."""
        self._codec = codec
        self._skip_special = skip_special
        self._utf8 = _UTF8(errors="replace")
        self._at_start = not continuation
        self._strip = 0 if continuation else codec.pieces.strip_left

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids (any number); return the text that is certain now."""
        joined = b"".join([self._bytes(token) for token in ids])
        return self._trim(self._utf8.decode(joined))

    def flush(self) -> str:
        """No more ids: a character left incomplete becomes U+FFFD. The detokenizer may not be used again."""
        return self._trim(self._utf8.decode(b"", final=True))

    def _bytes(self, token: int) -> bytes:
        codec = self._codec
        if self._skip_special and codec.is_special(token):
            return b""
        if not self._at_start:
            return codec.pieces.of(token)
        piece = codec.pieces.of_first(token)
        self._at_start = not codec.pieces.is_known(token)
        return piece

    def _trim(self, text: str) -> str:
        """Drop up to `strip_left` leading spaces of the whole text, however it is cut."""
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


class TextDelta(NamedTuple):
    """New text, the number of tokens of the choice it accounts for, and the stop string that ended it."""

    text: str
    num_tokens: int
    stopped: str | None = None


class ChoiceText:
    """Detokenizer and stop strings of one choice, token by token, so that a stop's token count is exact."""

    def __init__(self, detokenizer: Detokenizer, stops: StopStrings) -> None:
        self._detokenizer = detokenizer
        self._stops = stops

    def push(self, ids: Iterable[int]) -> TextDelta:
        """Take new ids; ids after the one that completes a stop string are ignored."""
        parts = []
        for token in ids:
            emit, stopped = self._stops.push(self._detokenizer.push((token,)))
            parts.append(emit)
            if stopped is not None:
                break
        return self._delta(parts)

    def flush(self) -> TextDelta:
        """The choice ended: give out everything held back, unless that completes a stop string."""
        if self._stops.stopped is not None:
            return self._delta([])
        emit, _ = self._stops.push(self._detokenizer.flush(), num_tokens=0)
        return self._delta([emit, self._stops.flush()])

    def _delta(self, parts: list[str]) -> TextDelta:
        return TextDelta("".join(parts), self._stops.num_tokens, self._stops.stopped)
