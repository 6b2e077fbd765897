"""Print `.env` from `.env.example`: every value `generate` becomes a random secret of its own.

Runs before anything is installed, so it uses the standard library alone.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

PLACEHOLDER = "generate"


def render(example: str) -> str:
    """`example` with each `NAME=generate` line filled in; other lines stay as they are."""
    lines = []
    for line in example.splitlines():
        name, _, value = line.partition("=")
        is_secret = not line.startswith("#") and value == PLACEHOLDER
        lines.append(f"{name}={secrets.token_hex(24)}" if is_secret else line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render(Path(sys.argv[1]).read_text(encoding="utf-8")))
