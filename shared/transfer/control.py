"""Bodies of the messages that are not frames: msgpack arrays with every field checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgpack

from shared.errors import TransferError
from shared.transfer.base import REASON_MALFORMED, ExportKey, Identity

_MAX_TEXT = 512
_MAX_NUMBER = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Hello:
    """What the importer wants and what it is. It needs a message at least every `timeout_ms`."""

    transport: str
    layout: str
    identity: Identity
    key: ExportKey
    num_tokens: int
    skip_blocks: int
    timeout_ms: int

    def encode(self) -> bytes:
        who, key = self.identity, self.key
        return pack(
            (
                self.transport,
                self.layout,
                who.model,
                who.numerics,
                key.request_id,
                key.epoch,
                key.nonce,
                self.num_tokens,
                self.skip_blocks,
                self.timeout_ms,
            )
        )

    @staticmethod
    def decode(data: bytes | bytearray) -> Hello:
        fields = Fields(data, 10)
        transport, layout, model, numerics = (fields.text() for _ in range(4))
        key = ExportKey(fields.text(), fields.number(), fields.text())
        return Hello(
            transport, layout, Identity(model, numerics), key, fields.number(), fields.number(), fields.number()
        )


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the exporter is: the importer checks it too, and trusts no one else's comparison."""

    layout: str
    identity: Identity

    def encode(self) -> bytes:
        return pack((self.layout, self.identity.model, self.identity.numerics))

    @staticmethod
    def decode(data: bytes | bytearray) -> Welcome:
        fields = Fields(data, 3)
        return Welcome(fields.text(), Identity(fields.text(), fields.text()))


@dataclass(frozen=True, slots=True)
class Notice:
    """REFUSE and ABORT: the exporter's reason. BYE: the importer's, and whether the export may go (`keep` false)."""

    reason: str
    message: str = ""
    keep: bool = True

    def encode(self) -> bytes:
        return pack((self.reason[:_MAX_TEXT], self.message[:_MAX_TEXT], int(self.keep)))

    @staticmethod
    def decode(data: bytes | bytearray) -> Notice:
        fields = Fields(data, 3)
        return Notice(fields.text(), fields.text(), bool(fields.number()))


def pack(fields: Sequence[str | int]) -> bytes:
    packed = msgpack.packb(list(fields))
    if not isinstance(packed, bytes):
        raise TypeError("msgpack returned no bytes")
    return packed


class Fields:
    """Takes the fields of a msgpack array one by one. Raises TransferError("malformed") for any surprise."""

    def __init__(self, data: bytes | bytearray, count: int) -> None:
        try:
            value = msgpack.unpackb(
                data, raw=False, strict_map_key=True, max_array_len=16, max_map_len=0, max_ext_len=0, max_bin_len=0
            )
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
            raise TransferError(REASON_MALFORMED, f"a control message is not valid msgpack: {error}") from None
        if not isinstance(value, list) or len(value) != count:
            raise TransferError(REASON_MALFORMED, f"a control message does not have {count} fields")
        self._values = iter(value)

    def text(self) -> str:
        value = next(self._values)
        if not isinstance(value, str) or len(value) > _MAX_TEXT:
            raise TransferError(REASON_MALFORMED, "a control message has no short text where one is due")
        return value

    def number(self) -> int:
        value = next(self._values)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_NUMBER:
            raise TransferError(REASON_MALFORMED, "a control message has no natural number where one is due")
        return value
