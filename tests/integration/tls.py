"""TLS before a server that has none: certificates for a test, and a proxy that speaks TLS with whoever connects."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.tasks import end_tasks

_CHUNK = 64 * 1024


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate that signs itself, so that it is its own authority."""

    certificate: Path
    key: Path

    @classmethod
    def make(cls, folder: Path, address: str) -> Certificate:
        """For the server at this IP address."""
        if shutil.which("openssl") is None:
            pytest.skip("the command openssl, which makes the certificate, is not installed")
        made = cls(folder / "certificate.pem", folder / "key.pem")
        command = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        command += ["-days", "2", "-subj", "/CN=test", "-addext", f"subjectAltName=IP:{address}"]
        command += ["-out", str(made.certificate), "-keyout", str(made.key)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        return made

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


class TlsProxy:
    """Forwards what comes over TLS to a plain port of this machine, and counts the connections it forwarded."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_forwarded = 0

    @asynccontextmanager
    async def listening(self, certificate: Certificate) -> AsyncIterator[int]:
        """Yields the port."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=certificate.context())
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            await end_tasks(list(self._tasks))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Called only after the handshake."""
        self.num_forwarded += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
            await asyncio.gather(_forward(reader, back), _forward(there, writer))
        finally:
            self._tasks.discard(task)
            writer.transport.abort()


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes until either end is closed."""
    try:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                writer.write(data)
                await writer.drain()
    finally:
        writer.close()
