"""Where a prefill worker's blocks can be had, as the bytes that travel in an offer.

The bytes come back from Redis, which is only half trusted: they are bounded and checked here, the
importer's allow-list guards where it connects, and each transport checks its own part again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgpack

from shared.errors import TransferError
from shared.transfer.base import REASON_MALFORMED, RouteInfo

MAX_ADDRESS_BYTES = 4096
_VERSION = 1
_MAX_ROUTES = 16


@dataclass(frozen=True, slots=True)
class Address:
    """The control listener, and what each transport's `describe` gave."""

    host: str
    port: int
    routes: Mapping[str, RouteInfo]


def encode_address(address: Address) -> bytes:
    routes = {name: dict(info) for name, info in address.routes.items()}
    packed = msgpack.packb([_VERSION, address.host, address.port, routes])
    if not isinstance(packed, bytes) or len(packed) > MAX_ADDRESS_BYTES:
        raise TransferError(REASON_MALFORMED, f"a transfer address must fit into {MAX_ADDRESS_BYTES} bytes")
    return packed


def decode_address(data: bytes) -> Address:
    """Raises TransferError("malformed") for anything that `encode_address` does not write."""
    if len(data) > MAX_ADDRESS_BYTES:
        raise _malformed()
    try:
        value = msgpack.unpackb(
            data, raw=False, strict_map_key=True, max_array_len=8, max_map_len=_MAX_ROUTES, max_ext_len=0, max_bin_len=0
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
        raise _malformed() from None
    match value:
        case [int(version), str(host), int(port), dict(routes)] if version == _VERSION and host and 0 < port < 65536:
            return Address(host, port, {_name(name): _info(info) for name, info in routes.items()})
        case _:
            raise _malformed()


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise _malformed()
    return value


def _info(value: object) -> dict[str, str | int]:
    if not isinstance(value, dict):
        raise _malformed()
    info: dict[str, str | int] = {}
    for name, field in value.items():
        if not isinstance(field, (str, int)):
            raise _malformed()
        info[_name(name)] = field
    return info


def _malformed() -> TransferError:
    return TransferError(REASON_MALFORMED, "a transfer address does not follow the protocol")
