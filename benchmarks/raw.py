"""Raw files of measurements: figures with all that is needed to doubt them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECRETS = ("--api-key",)
CPUS = len(os.sched_getaffinity(0))
"""Counted before anything is measured: the kernels keep the thread that calls them to one core."""


def write_raw(out: Path | None, results: Sequence[dict[str, Any]], **summary: Any) -> None:
    """The raw file: how it was run, where, on which commit, and everything that came out."""
    if out is None:
        return
    payload = {
        "command": " ".join(["python", "-m", *_module(), *_without_secrets(sys.argv[1:])]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"system": platform.platform(), "python": platform.python_version(), "cpus": CPUS},
        **summary,
        "runs": list(results),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(payload, indent=1) + "\n")


def commit() -> str:
    """Of the working tree, raw files aside; it says so where the tree has changes."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    status = ["git", "status", "--porcelain", "--", ".", ":!docs/data"]
    changed = subprocess.run(status, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _module() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name] if spec else []


def _without_secrets(arguments: Sequence[str]) -> list[str]:
    """A raw file is published: the values of secret flags are not in it."""
    shown, is_secret = [], False
    for argument in arguments:
        flag, sign, _ = argument.partition("=")
        shown.append("[withheld]" if is_secret else f"{flag}=[withheld]" if flag in SECRETS and sign else argument)
        is_secret = flag in SECRETS and not sign
    return shown
