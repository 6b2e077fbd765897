"""Where the clusters of this user on this machine are: `serve` writes it down, `ps` and `bench` look it up.

The embedded bus has a random address and password, so the note is readable by its owner only.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def noted(deployment: str, redis_url: str) -> Iterator[None]:
    """Keep the note while the cluster runs. Where it cannot be written, `ps` just needs the URL."""
    path = _path(deployment)
    with contextlib.suppress(OSError):
        _write(path, {"redis_url": redis_url, "pid": os.getpid()})
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def find_bus(deployment: str) -> str:
    """URL of the bus of a running `serve` of this user, "" when there is none."""
    path = _path(deployment)
    try:
        if not _is_private(path.parent):
            return ""
        note = json.loads(path.read_text())
        os.kill(int(note["pid"]), 0)
        return str(note["redis_url"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _path(deployment: str) -> Path:
    return Path(tempfile.gettempdir()) / f"slipstream-{os.getuid()}" / f"{deployment}.json"


def _is_private(folder: Path) -> bool:
    """Whether the folder is ours alone: in a shared temporary folder anybody can make a name first."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _write(path: Path, note: dict[str, str | int]) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(path.parent):
        return
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as out:
        json.dump(note, out)
