"""Mutual proof of the cluster secret, before anything else on a link is read.

    exporter → importer   greeting (16 bytes) + nonce_e (32)
    importer → exporter   nonce_i (32) + HMAC(secret, "importer" + nonce_e + nonce_i)
    exporter → importer   HMAC(secret, "exporter" + nonce_e + nonce_i), or zeros for "no"

Both sides read fixed lengths only, so a stranger can make a worker hold at most 64 bytes. The role
in each proof stops reflection; fresh nonces stop replay. Each direction then has its own digest key,
derived from secret and nonces, so that no message is valid on another link or in the other direction.
The link is authenticated, not encrypted: prompts' KV is readable on the wire.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from dataclasses import dataclass

from shared.errors import ConfigurationError, TransferError
from shared.transfer.base import REASON_AUTH

GREETING = b"slipstream-kv 1\n"
NONCE_BYTES = 32
MAC_BYTES = 32
MIN_SECRET_BYTES = 16
_NO = bytes(MAC_BYTES)


@dataclass(frozen=True, slots=True)
class LinkKeys:
    """Digest keys of one connection, named from the point of view of who holds them."""

    outgoing: bytes
    incoming: bytes


def check_secret(secret: bytes) -> None:
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigurationError(
            f"SLIPSTREAM_CLUSTER_SECRET must have at least {MIN_SECRET_BYTES} bytes; "
            "give every worker the same long random value"
        )


async def authenticate_exporter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes) -> LinkKeys:
    """The listening side. Raises TransferError("auth"), after saying no, when the proof is wrong."""
    nonce_e = secrets.token_bytes(NONCE_BYTES)
    writer.write(GREETING + nonce_e)
    answer = await reader.readexactly(NONCE_BYTES + MAC_BYTES)
    nonce_i, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _mac(secret, b"importer", nonce_e, nonce_i)):
        writer.write(_NO)
        raise TransferError(REASON_AUTH, "a peer does not know this cluster's secret")
    writer.write(_mac(secret, b"exporter", nonce_e, nonce_i))
    to_importer, to_exporter = _direction_keys(secret, nonce_e, nonce_i)
    return LinkKeys(outgoing=to_importer, incoming=to_exporter)


async def authenticate_importer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes) -> LinkKeys:
    """The connecting side. Raises TransferError("auth") when either side's proof is refused."""
    hello = await reader.readexactly(len(GREETING) + NONCE_BYTES)
    if not hello.startswith(GREETING):
        raise TransferError(REASON_AUTH, "the address does not belong to a KV exporter of this version")
    nonce_e, nonce_i = hello[len(GREETING) :], secrets.token_bytes(NONCE_BYTES)
    writer.write(nonce_i + _mac(secret, b"importer", nonce_e, nonce_i))
    proof = await reader.readexactly(MAC_BYTES)
    if not hmac.compare_digest(proof, _mac(secret, b"exporter", nonce_e, nonce_i)):
        raise TransferError(
            REASON_AUTH, "the peer has another cluster secret; set SLIPSTREAM_CLUSTER_SECRET alike on all workers"
        )
    to_importer, to_exporter = _direction_keys(secret, nonce_e, nonce_i)
    return LinkKeys(outgoing=to_exporter, incoming=to_importer)


def _direction_keys(secret: bytes, nonce_e: bytes, nonce_i: bytes) -> tuple[bytes, bytes]:
    return _mac(secret, b"to-importer", nonce_e, nonce_i), _mac(secret, b"to-exporter", nonce_e, nonce_i)


def _mac(secret: bytes, role: bytes, nonce_e: bytes, nonce_i: bytes) -> bytes:
    # Hashed first: HMAC pads short keys with zeros, and a secret must not equal itself plus a zero byte.
    key = hashlib.sha256(secret).digest()
    return hmac.digest(key, b"slipstream-kv " + role + b"\0" + nonce_e + nonce_i, "sha256")
