"""The file of API keys: one a line, with its share of the service.

    # who        what they may have
    sk-team-a    name=team-a weight=2
    sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08  name=ci max_in_flight=8

A key stands there as it is or as the SHA-256 of it in hexadecimal digits. Messages about the file name the line,
never what is in it.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass

from shared.errors import ConfigurationError

MAX_BYTES = 1 << 20
MAX_KEYS = 10_000
MAX_WEIGHT = 1000.0

_HASHED = "sha256:"
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key: its SHA-256, and what it may have. `max_in_flight` None: as all keys."""

    digest: bytes
    name: str = ""
    weight: float = 1.0
    max_in_flight: int | None = None


class KeyFile:
    """Reads the file and knows whether it has changed since."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None

    def changed(self) -> bool:
        """Whether the file is another one than was read last; True too when it is gone or could not be read."""
        return self._state() != self._seen

    def read(self) -> tuple[ApiKey, ...]:
        """The keys. Raises ConfigurationError, once for each state of the file."""
        state = self._state()
        self._seen = state
        try:
            with open(self._path, "rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except OSError as exc:
            raise self._error(f"cannot be read ({exc.strerror or type(exc).__name__}); check the path") from None
        if len(raw) > MAX_BYTES:
            raise self._error(f"is larger than {MAX_BYTES} bytes; remove keys that are no longer used")
        try:
            return self._parse(raw.decode("utf-8"))
        except UnicodeError:
            raise self._error("is not UTF-8 text; write it as plain text") from None

    def _parse(self, text: str) -> tuple[ApiKey, ...]:
        keys: dict[bytes, ApiKey] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                key = parse_line(line)
            except ValueError as exc:
                raise self._error(f"line {number}: {exc}") from None
            if key is None:
                continue
            if key.digest in keys:
                raise self._error(f"line {number}: the key stands there twice; remove one of the two")
            keys[key.digest] = key
        if not keys:
            raise self._error("holds no key; add one, or leave the setting empty to ask nobody")
        if len(keys) > MAX_KEYS:
            raise self._error(f"holds more than {MAX_KEYS} keys; remove some")
        return tuple(keys.values())

    def _state(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _error(self, what: str) -> ConfigurationError:
        return ConfigurationError(f"SLIPSTREAM_API_KEYS_FILE {self._path!r} {what}")


def parse_line(line: str) -> ApiKey | None:
    """The key of one line, None for a blank line or a comment. Raises ValueError that says what to write instead."""
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    options: dict[str, str] = {}
    for word in words[1:]:
        if word.startswith("#"):
            break
        name, equals, value = word.partition("=")
        if not equals or name not in ("name", "weight", "max_in_flight") or name in options:
            raise ValueError("after the key there may be name=..., weight=... and max_in_flight=..., each once")
        options[name] = value
    return ApiKey(
        digest=_digest(words[0]),
        name=_name(options.get("name")),
        weight=_weight(options.get("weight")),
        max_in_flight=_max_in_flight(options.get("max_in_flight")),
    )


def _digest(word: str) -> bytes:
    if not word.startswith(_HASHED):
        return hashlib.sha256(word.encode()).digest()
    digits = word.removeprefix(_HASHED)
    if not _DIGEST.fullmatch(digits):
        raise ValueError("after sha256: there must be 64 hexadecimal digits, the SHA-256 of the key")
    return bytes.fromhex(digits)


def _name(value: str | None) -> str:
    if value is not None and not _NAME.fullmatch(value):
        raise ValueError("name must be 1 to 64 letters, digits, dots, dashes or underscores")
    return value or ""


def _weight(value: str | None) -> float:
    if value is None:
        return 1.0
    if not re.fullmatch(r"\d{1,4}(\.\d{1,3})?", value) or not 0 < float(value) <= MAX_WEIGHT:
        raise ValueError(f"weight must be a number above 0 and at most {MAX_WEIGHT:g}")
    return float(value)


def _max_in_flight(value: str | None) -> int | None:
    if value is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,5}", value):
        raise ValueError("max_in_flight must be a whole number from 1 to 999999")
    return int(value)
