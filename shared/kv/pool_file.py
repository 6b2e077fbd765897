"""A file in shared memory that holds one worker's KV pool, so that a peer on this host can read it.

The owner keeps an exclusive `flock` on the file for as long as it lives. The kernel drops that
lock however the process dies, so "nobody holds the lock" is the one test of staleness that also
works between containers, where process ids mean nothing.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import weakref
from pathlib import Path

import structlog

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "slipstream-kv-"
_log = structlog.get_logger()


class PoolFile:
    """A locked, fully backed, private file of `num_bytes`; `close` unlinks it and is idempotent.

    Maps of the file outlive `close`: the memory goes when the last map does.
    """

    def __init__(self, path: Path, fd: int, num_bytes: int) -> None:
        self.path = path
        self.num_bytes = num_bytes
        self._finalizer = weakref.finalize(self, _discard, path, fd, os.getpid())

    def close(self) -> None:
        self._finalizer()


def create_pool_file(num_bytes: int, folder: Path = SHARED_MEMORY) -> PoolFile:
    """Make a pool file in `folder` after removing the ones whose owners died.

    Every page is allocated here: a map of a file that does not fit would kill the process with
    SIGBUS at some later write. Raises OSError when the folder is missing or too small.
    """
    remove_stale_pool_files(folder)
    path, fd = _create_locked(folder)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError:
        _discard(path, fd, os.getpid())
        raise
    return PoolFile(path, fd, num_bytes)


def is_pool_path(path: Path, folder: Path = SHARED_MEMORY) -> bool:
    """Whether `path`, which a peer named, is where pool files live: nothing else may be opened for it."""
    return path.parent == folder and path.name.startswith(_PREFIX)


def remove_stale_pool_files(folder: Path = SHARED_MEMORY) -> int:
    """Unlink the pool files of dead owners; returns how many."""
    removed = 0
    for path in folder.glob(f"{_PREFIX}*"):
        try:
            removed += _unlink_if_unowned(path)
        except OSError:
            continue  # another user's file, or another worker was faster
    if removed:
        _log.info("kv_pool_files_removed", count=removed, folder=str(folder))
    return removed


def _unlink_if_unowned(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _create_locked(folder: Path) -> tuple[Path, int]:
    while True:
        path = folder / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # a peer's cleaning came between our open and our lock


def _discard(path: Path, fd: int, owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return  # a forked child must not take its parent's pool away
    path.unlink(missing_ok=True)
    os.close(fd)
