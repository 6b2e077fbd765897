"""API keys: kept as SHA-256 digests, compared in constant time, all of them every time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

import structlog

from services.gateway.keyfile import ApiKey, KeyFile
from shared.errors import ConfigurationError, InvalidApiKey

ANONYMOUS = ""

_KEY_ID_LENGTH = 12

_log = structlog.get_logger()


class KeyRing:
    """The keys that open the gateway, from the settings and from a file; without either everybody is `ANONYMOUS`."""

    def __init__(self, keys: Sequence[str], file: KeyFile | None = None) -> None:
        """Raises ConfigurationError when the file cannot be used."""
        self._fixed = tuple(ApiKey(hashlib.sha256(key.encode()).digest()) for key in keys)
        self._file = file
        self._keys: tuple[ApiKey, ...] = ()
        self._by_id: dict[str, ApiKey] = {}
        self._take(file.read() if file is not None else ())

    @property
    def is_open(self) -> bool:
        """Whether nobody is asked for a key; a file that is set closes the gateway, whatever it holds."""
        return not self._keys and self._file is None

    def __len__(self) -> int:
        return len(self._keys)

    def check(self, authorization: str | None) -> str:
        """Id of the key in an Authorization header, safe for logs and as tenant. Raises InvalidApiKey."""
        if self.is_open:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise InvalidApiKey("An API key is needed: send the header 'Authorization: Bearer <key>'.")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._keys:
            found |= hmac.compare_digest(known.digest, digest)
        if not found:
            raise InvalidApiKey("The API key is not known here.")
        return key_id_of(digest)

    def key(self, key_id: str) -> ApiKey | None:
        """What is known of a key by its id; None for nobody and for keys that are gone."""
        return self._by_id.get(key_id)

    def reload(self) -> None:
        """Read the file again if it changed; a file that cannot be used leaves the keys as they are."""
        if self._file is None or not self._file.changed():
            return
        try:
            self._take(self._file.read())
        except ConfigurationError as exc:
            _log.error("api_keys_kept", reason=str(exc))

    def _take(self, from_file: tuple[ApiKey, ...]) -> None:
        by_digest = {key.digest: key for key in (*self._fixed, *from_file)}
        self._keys = tuple(by_digest.values())
        self._by_id = {key_id_of(key.digest): key for key in self._keys}
        if self._file is not None:
            _log.info("api_keys_read", keys={key_id: key.name for key_id, key in self._by_id.items()})


def key_id_of(digest: bytes) -> str:
    """A name for a key that says nothing about it."""
    return hashlib.sha256(b"key-id:" + digest).hexdigest()[:_KEY_ID_LENGTH]


def tenant_of(key_id: str, cache_salt: str | None) -> str:
    """Salt of the prefix cache: whoever shares it may share cached prompts; "" without key and salt."""
    if not key_id and not cache_salt:
        return ""
    return hashlib.sha256(f"{key_id}\x00{cache_salt or ''}".encode()).hexdigest()[:32]
