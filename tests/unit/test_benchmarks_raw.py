"""Raw files of measurements say how they were made, and publish no secret."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.raw import write_raw


@pytest.mark.parametrize("flag", [["--api-key", "sk-secret"], ["--api-key=sk-secret"]])
def test_a_raw_file_names_command_commit_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: list[str]
) -> None:
    out = tmp_path / "new" / "figures.json"
    monkeypatch.setattr(sys, "argv", ["x.py", "--turns", "3", *flag, "--out", str(out)])
    write_raw(out, [{"ratio": 1.5}], model="tiny")
    text = out.read_text()
    raw = json.loads(text)
    assert raw["command"].startswith("python -m ")
    assert raw["command"].endswith(f"--out {out}")
    assert "--turns 3 --api-key" in raw["command"]
    assert "secret" not in text
    assert raw["machine"].keys() == {"system", "python", "cpus"}
    assert {"commit", "date"} <= raw.keys()
    assert (raw["model"], raw["runs"]) == ("tiny", [{"ratio": 1.5}])


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_raw(None, [])
    assert list(tmp_path.iterdir()) == []
