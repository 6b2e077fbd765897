"""The distill command: its flags, its line of progress, its exit status."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from services.cli import distill as command
from services.cli.distill import DistillProgress, describe
from services.cli.main import app
from shared.distill.run import LEARNING, WRITING, Progress
from shared.distill.training import Quality
from tests.tiny_model import write_tiny_model


def arguments(folder: Path) -> list[str]:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"say {number}" for number in range(64)))
    model = write_tiny_model(folder / "tiny")
    return ["distill", str(model), "--out", str(folder / "draft"), "--prompts", str(prompts)]


def test_the_command_writes_the_draft_and_says_where(tmp_path: Path) -> None:
    options = ["--tokens", "600", "--epochs", "0.5", "--on-policy", "0", "--head-size", "300", "--layers", "1"]
    result = CliRunner().invoke(app, [*arguments(tmp_path), *options, "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert "The draft is in" in result.output
    assert "after forward KL: acceptance" in result.output
    assert json.loads((tmp_path / "draft/config.json").read_text())["num_hidden_layers"] == 1
    assert (tmp_path / "draft.work/training.safetensors").is_file()


def test_bad_flags_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*arguments(tmp_path), "--layers", "7"])
    assert result.exit_code == 2
    assert "--layers is 7" in result.output
    assert not (tmp_path / "draft.work").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "distill", interrupted)
    result = CliRunner().invoke(app, arguments(tmp_path))
    assert result.exit_code == 130
    assert "The same command goes on" in result.output


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_phase_loss_and_acceptance(terminal: bool) -> None:
    stream = io.StringIO()
    with DistillProgress(Console(file=stream, force_terminal=terminal, width=160)) as progress:
        progress.update(Progress(WRITING, 5, 100))
        progress.update(Progress(LEARNING, 3, 10, 1.25, Quality(0.4, 0.5, 2.0, [0.4])))
    assert WRITING in stream.getvalue()
    assert f"{LEARNING}" in stream.getvalue()
    assert "3/10" in stream.getvalue()
    assert "loss 1.250 acceptance 0.400 greedy 0.500" in stream.getvalue()


def test_phases_without_a_loss_show_none() -> None:
    assert describe(Progress(WRITING, 1, 2)) == ""
