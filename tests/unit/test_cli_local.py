"""The note by which `ps` finds a running `serve` on this machine."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shared.bus.local import find_bus, noted

URL = "unix://:secret@/somewhere/bus.sock?db=0"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where notes of this user go, inside a temporary folder of the test."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"slipstream-{os.getuid()}"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write_note(folder: Path, content: str) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "default.json").write_text(content)


def test_a_running_serve_is_found_and_afterwards_not(folder: Path) -> None:
    assert find_bus("default") == ""
    with noted("default", URL):
        assert find_bus("default") == URL
        assert find_bus("another") == ""
    assert find_bus("default") == ""
    assert list(folder.iterdir()) == []


def test_the_note_has_the_password_so_only_its_owner_reads_it(folder: Path) -> None:
    before = os.umask(0)
    try:
        with noted("default", URL):
            assert mode(folder) == 0o700
            assert mode(folder / "default.json") == 0o600
    finally:
        os.umask(before)


def test_the_note_goes_when_serve_fails() -> None:
    with pytest.raises(RuntimeError, match="failed"), noted("default", URL):
        raise RuntimeError("failed")
    assert find_bus("default") == ""


def test_a_note_of_a_dead_process_is_ignored_and_replaced(folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write_note(folder, json.dumps({"redis_url": "unix://stale", "pid": child.pid}))
    assert find_bus("default") == ""
    with noted("default", URL):
        assert find_bus("default") == URL


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"pid": 1}', '{"redis_url": "x"}', '{"redis_url": "x", "pid": "y"}']
)
def test_a_note_that_cannot_be_read_is_no_note(folder: Path, content: str) -> None:
    write_note(folder, content)
    assert find_bus("default") == ""


@pytest.mark.parametrize("permissions", [0o770, 0o707, 0o777, 0o750])
def test_a_folder_others_can_enter_is_neither_read_nor_written(folder: Path, permissions: int) -> None:
    write_note(folder, json.dumps({"redis_url": "redis://attacker", "pid": os.getpid()}))
    folder.chmod(permissions)
    assert find_bus("default") == ""
    (folder / "default.json").unlink()
    with noted("default", URL):
        assert list(folder.iterdir()) == [], "the password would be open to others"


def test_a_link_in_place_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    write_note(real, json.dumps({"redis_url": "redis://attacker", "pid": os.getpid()}))
    folder.symlink_to(real)
    assert find_bus("default") == ""
    (real / "default.json").unlink()
    with noted("default", URL):
        assert list(real.iterdir()) == []


def test_a_link_in_place_of_the_note_is_replaced_and_not_followed(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(mode=0o700)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / "default.json").symlink_to(victim)
    with noted("default", URL):
        assert find_bus("default") == URL
    assert victim.read_text() == "mine"


def test_a_folder_that_cannot_be_made_does_not_stop_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing" / "too"))
    with noted("default", URL):
        assert find_bus("default") == ""


def test_a_foreign_owner_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's name carries a user id; its owner has to be that user."""
    write_note(folder, json.dumps({"redis_url": "redis://attacker", "pid": os.getpid()}))
    assert find_bus("default") == "redis://attacker"
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    folder.rename(folder.with_name(f"slipstream-{os.getuid()}"))
    assert find_bus("default") == ""
