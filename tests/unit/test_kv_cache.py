"""The pool of blocks and the file that may hold it."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import ConfigurationError
from shared.kv import cache as cache_module
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.kv.pool_file import create_pool_file, is_pool_path, remove_stale_pool_files

LAYOUT = KVLayout(num_layers=2, num_kv_heads=3, head_dim=4, block_size=8)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shape_type_and_zeros(shared: bool, dtype: str) -> None:
    layout = KVLayout(2, 3, 4, 8, dtype)
    cache = KVCache(layout, 5, shared=shared)
    assert cache.data.shape == (2, 5, 2, 3, 8, 4)
    assert cache.data.dtype == getattr(torch, dtype)
    assert cache.data.is_contiguous()
    assert cache.data.numel() * cache.data.element_size() == 5 * layout.bytes_per_block
    assert not cache.data.any()
    cache.close()


def test_layer_is_a_view() -> None:
    cache = KVCache(LAYOUT, 3)
    cache.layer(1)[2].fill_(4)
    assert (cache.data[1, 2] == 4).all()
    assert cache.data.count_nonzero() == cache.data[1, 2].numel()


def test_zero_clears_only_the_named_blocks() -> None:
    cache = KVCache(LAYOUT, 5)
    cache.data.fill_(float("nan"))
    cache.zero([1, 3])
    cache.zero([])
    assert (cache.data[:, [1, 3]] == 0).all()
    assert cache.data[:, [0, 2, 4]].isnan().all()


def test_copy_block_copies_every_layer() -> None:
    cache = KVCache(LAYOUT, 4)
    cache.data.copy_(torch.randn(cache.data.shape))
    before = cache.data.clone()
    cache.copy_block(1, 3)
    assert torch.equal(cache.data[:, 3], before[:, 1])
    assert torch.equal(cache.data[:, :3], before[:, :3])


@pytest.mark.parametrize("num_blocks", [-1, 0, 1])
def test_a_pool_without_a_usable_block_is_refused(num_blocks: int) -> None:
    with pytest.raises(ConfigurationError, match="at least 2"):
        KVCache(LAYOUT, num_blocks)


def test_a_private_cache_has_no_path() -> None:
    cache = KVCache(LAYOUT, 2)
    assert cache.shared_path is None
    cache.close()


def test_a_peer_sees_the_tensor_in_the_file() -> None:
    cache = KVCache(LAYOUT, 3, shared=True)
    assert cache.shared_path is not None
    cache.data.copy_(torch.randn(cache.data.shape))
    seen = np.fromfile(cache.shared_path, dtype=np.float32)
    assert seen.tolist() == cache.data.flatten().tolist()
    assert stat.S_IMODE(os.stat(cache.shared_path).st_mode) == 0o600
    assert is_pool_path(Path(cache.shared_path))
    cache.close()


def test_close_unlinks_and_views_live_on() -> None:
    cache = KVCache(LAYOUT, 3, shared=True)
    path, view = cache.shared_path, cache.layer(0)
    assert path is not None
    cache.close()
    cache.close()
    assert not os.path.exists(path)
    assert cache.shared_path is None
    view.fill_(3)
    assert (cache.data[0] == 3).all()


def test_two_caches_have_two_files() -> None:
    first, second = KVCache(LAYOUT, 2, shared=True), KVCache(LAYOUT, 2, shared=True)
    assert first.shared_path != second.shared_path
    first.data.fill_(1)
    assert not second.data.any()
    first.close()
    second.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOENT, errno.EACCES])
def test_no_room_in_shared_memory_means_a_private_cache(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(num_bytes: int) -> object:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(cache_module, "create_pool_file", fail)
    cache = KVCache(LAYOUT, 3, shared=True)
    assert cache.shared_path is None
    assert cache.data.shape[1] == 3


def test_a_gpu_cache_is_never_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    created: list[int] = []
    monkeypatch.setattr(cache_module, "create_pool_file", created.append)
    cache = KVCache(LAYOUT, 3, device="meta", shared=True)
    assert cache.shared_path is None
    assert not created


def test_a_file_that_does_not_fit_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        create_pool_file(1 << 20, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_pool_files_in_shared_memory_may_be_opened() -> None:
    assert is_pool_path(Path("/dev/shm/slipstream-kv-1-ab"))
    for path in ("/etc/passwd", "/dev/shm/other", "/tmp/slipstream-kv-1", "/dev/shm/slipstream-kv-1/../../etc/passwd"):
        assert not is_pool_path(Path(path))


def test_files_of_dead_owners_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    alive = create_pool_file(4096, tmp_path)
    (tmp_path / "slipstream-kv-99-dead").write_bytes(b"x")
    (tmp_path / "unrelated").write_bytes(b"x")
    assert remove_stale_pool_files(tmp_path) == 1
    assert {path.name for path in tmp_path.iterdir()} == {alive.path.name, "unrelated"}
    alive.close()
    assert {path.name for path in tmp_path.iterdir()} == {"unrelated"}


def test_links_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"x")
    (tmp_path / "slipstream-kv-1-link").symlink_to(victim)
    assert remove_stale_pool_files(tmp_path) == 0
    assert victim.read_bytes() == b"x"


def test_a_killed_owner_leaves_a_file_that_the_next_start_removes(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from shared.kv.pool_file import create_pool_file\n"
        "file = create_pool_file(4096, pathlib.Path(sys.argv[1])); print(file.path, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        assert remove_stale_pool_files(tmp_path) == 0
        assert left.exists()
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
    new = create_pool_file(4096, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [new.path.name]
    new.close()


def test_a_forked_child_does_not_take_its_parents_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = create_pool_file(4096, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: -1)
        file.close()
    assert file.path.exists()
    file.path.unlink()


def test_the_last_reference_unlinks(tmp_path: Path) -> None:
    file = create_pool_file(4096, tmp_path)
    path = file.path
    assert path.stat().st_size == file.num_bytes == 4096
    del file
    assert not path.exists()
