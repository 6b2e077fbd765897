"""Ports that stay free while nobody listens: below the range from which the kernel takes ports for outgoing links."""

from __future__ import annotations

import random
import socket

_LOW, _HIGH = 12_000, 32_000
_random = random.SystemRandom()


def free_port() -> int:
    """A port on loopback that nothing listens on now."""
    while True:
        port = _random.randrange(_LOW, _HIGH)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
