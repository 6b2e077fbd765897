"""API keys: kept as SHA-256 digests, compared in constant time, all of them every time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from shared.errors import InvalidApiKey

ANONYMOUS = ""

_KEY_ID_LENGTH = 12


class KeyRing:
    """The keys that open the gateway; an empty ring lets everybody in as `ANONYMOUS`."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def is_open(self) -> bool:
        return not self._digests

    def check(self, authorization: str | None) -> str:
        """Id of the key in an Authorization header, safe for logs and as tenant. Raises InvalidApiKey."""
        if self.is_open:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise InvalidApiKey("An API key is needed: send the header 'Authorization: Bearer <key>'.")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        if not found:
            raise InvalidApiKey("The API key is not known here.")
        return hashlib.sha256(b"key-id:" + digest).hexdigest()[:_KEY_ID_LENGTH]


def tenant_of(key_id: str, cache_salt: str | None) -> str:
    """Salt of the prefix cache: whoever shares it may share cached prompts; "" without key and salt."""
    if not key_id and not cache_salt:
        return ""
    return hashlib.sha256(f"{key_id}\x00{cache_salt or ''}".encode()).hexdigest()[:32]
