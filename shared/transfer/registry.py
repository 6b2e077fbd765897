"""The transports that exist, by name. A new one is one line here and one file."""

from __future__ import annotations

from importlib import import_module

from shared.errors import ConfigurationError
from shared.transfer.base import Transport

TRANSPORTS = {
    "shm": "shared.transfer.shm:SharedMemoryTransport",
    "tcp": "shared.transfer.tcp:TcpTransport",
}


def load_transport(name: str) -> Transport:
    """Raises ConfigurationError, with the known names, for an unknown one."""
    if name not in TRANSPORTS:
        raise ConfigurationError(f"unknown KV transport {name!r}; known are {', '.join(sorted(TRANSPORTS))}")
    module, _, attribute = TRANSPORTS[name].partition(":")
    transport: Transport = getattr(import_module(module), attribute)()
    return transport
