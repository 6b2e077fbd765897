"""The bytes each token id stands for, read off the tokenizer's decoder.

Three families cover the supported models: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM),
SentencePiece-BPE with byte fallback (Llama 2, Mistral) and Metaspace. A decoder outside them is
refused by name, because a per-token reading of it would be a guess.

Where a run of byte-fallback tokens is not valid UTF-8, the `tokenizers` library turns the whole
run into U+FFFD, also the characters in it that were whole; here only what is invalid is replaced,
since a stream cannot take back a character it has shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from shared.errors import ModelFormatError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """The reversible map of GPT-2's byte-level BPE: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + index): b for index, b in enumerate(others)}


_BYTES_OF = byte_alphabet()
_CHAR_OF = {byte: char for char, byte in _BYTES_OF.items()}


@dataclass(frozen=True, slots=True)
class PieceRules:
    """How a token's text becomes bytes.

    `replacements` are applied in order; `drop_in_first` is removed from the first token of a text
    (Metaspace); `strip_left` leading spaces of the whole text are removed.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    drop_in_first: str = ""
    strip_left: int = 0


def read_rules(decoder: Mapping[str, object] | None) -> PieceRules:
    """Read the decoder section of a tokenizer.json. Raises ModelFormatError when it is of another family."""
    if decoder is None:
        raise ModelFormatError("The tokenizer has no decoder, so its tokens cannot be turned into text.")
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    rules = PieceRules()
    for step in steps if isinstance(steps, list) else []:
        rules = _add_step(rules, step)
    return rules


def _add_step(rules: PieceRules, step: Mapping[str, object]) -> PieceRules:
    kind = step.get("type")
    if kind == "ByteLevel":
        return replace(rules, byte_level=True)
    if kind == "ByteFallback":
        return replace(rules, byte_fallback=True)
    if kind == "Fuse":
        return rules
    if kind == "Replace":
        pattern = step.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, Mapping) else None
        if isinstance(literal, str):
            return replace(rules, replacements=(*rules.replacements, (literal, str(step.get("content", "")))))
    if kind == "Strip" and step.get("content") == " " and step.get("stop") == 0:
        return replace(rules, strip_left=int(str(step.get("start", 0))))
    if kind == "Metaspace":
        mark = str(step.get("replacement", "▁"))
        first = mark if step.get("prepend_scheme", "always") != "never" else ""
        return replace(rules, replacements=(*rules.replacements, (mark, " ")), drop_in_first=first)
    raise ModelFormatError(
        f"The tokenizer's decoder step {kind!r} is not supported; "
        "supported are ByteLevel, ByteFallback, Fuse, Metaspace, Replace of a literal and Strip of leading spaces."
    )


class Pieces:
    """Bytes per token id, computed on first use. An id the tokenizer does not know is no text at all."""

    def __init__(self, tokenizer: Tokenizer, rules: PieceRules) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        self._cache: dict[int, bytes] = {}

    @property
    def strip_left(self) -> int:
        return self._rules.strip_left

    def is_known(self, token: int) -> bool:
        return self._text(token) is not None

    def of(self, token: int) -> bytes:
        """The bytes of a token inside a text."""
        piece = self._cache.get(token)
        if piece is None:
            piece = self._cache[token] = self._bytes(self._text(token) or "")
        return piece

    def of_first(self, token: int) -> bytes:
        """The bytes of a token that opens a text."""
        if not self._rules.drop_in_first:
            return self.of(token)
        return self._bytes((self._text(token) or "").replace(self._rules.drop_in_first, ""))

    def in_alphabet(self, text: str) -> str:
        """Text as the vocabulary spells it: one character a byte in a byte-level vocabulary, else unchanged."""
        return "".join(_CHAR_OF[byte] for byte in text.encode()) if self._rules.byte_level else text

    def _text(self, token: int) -> str | None:
        known = 0 <= token < 2**32
        text: str | None = self._tokenizer.id_to_token(token) if known else None
        return text

    def _bytes(self, text: str) -> bytes:
        for old, new in self._rules.replacements:
            text = text.replace(old, new)
        if self._rules.byte_fallback and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes.fromhex(match[1])
        if self._rules.byte_level and all(char in _BYTES_OF for char in text):
            return bytes(_BYTES_OF[char] for char in text)
        return text.encode()
