"""Keep control tokens apart by who wrote them: the chat template, or a client's message.

Characters of client text are *hidden* behind stand-ins before the template runs and restored after
the template's own control tokens have been located. The stand-ins are lone surrogates: valid text
never holds one, so they cannot collide with anything a client or a template writes, and one that
were left over by mistake could not be encoded. Each stand-in is one character for one character, so
trimming, splitting and length inside the template go on as before.
See docs/adr/0001-chat-text-is-never-special.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from shared.errors import InvalidRequest

MAX_DEPTH = 64
TAIL = "\udfff"  # stands after a final message that is to be continued
_STAND_INS = range(0xD800, 0xDFFF)


def check_text(text: str, param: str) -> None:
    """Raise InvalidRequest for text that is not valid Unicode (a lone surrogate, which JSON can carry)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"The {param} holds half a surrogate pair, which is no character; send whole characters.", param=param
        ) from None


def map_strings(value: object, change: Callable[[str], str], depth: int = 0) -> object:
    """Copy JSON-like data with every string in it, keys included, changed.

    Raises InvalidRequest beyond MAX_DEPTH levels, since templates and serialisers recurse.
    """
    if isinstance(value, str):
        return change(value)
    if depth >= MAX_DEPTH:
        raise InvalidRequest(f"The messages or tools are nested more than {MAX_DEPTH} levels deep.", param="messages")
    if isinstance(value, Mapping):
        return {map_strings(k, change): map_strings(v, change, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change, depth + 1) for item in value]
    return value


class Shadow:
    """Hides and restores the characters by which the given control tokens could be forged."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        tokens = sorted({token for token in control_tokens if token}, key=lambda token: (-len(token), token))
        borders = sorted({char for token in tokens for char in (token[0], token[-1])})
        stand_in = {char: chr(code) for char, code in zip(borders, _STAND_INS, strict=False)}
        self._stand_in = stand_in
        self._to_stand_ins = str.maketrans(stand_in)
        self._to_borders = str.maketrans({code: char for char, code in stand_in.items()})
        starts = "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in tokens)
        self._starts = re.compile(starts or "(?!)")
        self._tokens = re.compile("(" + ("|".join(map(re.escape, tokens)) or "(?!)") + ")")

    def hide_tokens(self, text: str) -> str:
        """Hide the first character of each whole control token; text without one comes back unchanged."""
        return self._starts.sub(lambda match: self._stand_in[match[0]], text)

    def hide_borders(self, text: str) -> str:
        """Hide every character that any control token begins or ends with, so that none can be assembled."""
        return text.translate(self._to_stand_ins)

    def restore(self, text: str) -> str:
        """Undo both kinds of hiding."""
        return text.translate(self._to_borders)

    def split(self, text: str) -> list[str]:
        """Cut at the control tokens in sight: even items are text, odd items are tokens (leftmost, longest)."""
        return self._tokens.split(text)
