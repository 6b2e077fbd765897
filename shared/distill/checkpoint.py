"""What an interrupted training needs to go on: weights, Adam's averages, the step, and what was measured so far."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shared.distill.training import Trainer
from shared.errors import ConfigurationError

_AVERAGES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Notes:
    """`run` tells this run from others; `measured` are held-out measures by phase; `seconds` were spent so far."""

    run: Mapping[str, object]
    measured: dict[str, dict[str, float]]
    seconds: float


def save_checkpoint(path: Path, trainer: Trainer[Any], notes: Notes) -> None:
    """Replace the checkpoint; a crash in the middle leaves the old one."""
    tensors = {}
    for name, parameter in trained_parameters(trainer.student):
        tensors[name] = parameter.detach().cpu()
        state = trainer.optimizer.state.get(parameter, {})
        tensors |= {f"{average}/{name}": state[average].cpu() for average in _AVERAGES if average in state}
    written = {"run": dict(notes.run), "measured": notes.measured, "seconds": notes.seconds, "step": trainer.step}
    partial = path.with_suffix(".part")
    save_file(tensors, partial, metadata={"notes": json.dumps(written)})
    os.replace(partial, path)


def load_checkpoint(path: Path, trainer: Trainer[Any], run: Mapping[str, object]) -> Notes | None:
    """Bring the trainer to where it was; None when there is no checkpoint.

    Raises ConfigurationError when it belongs to a run with other options.
    """
    if not path.is_file():
        return None
    device = next(trainer.student.parameters()).device
    with safe_open(path, "pt", device="cpu") as file:
        written = json.loads(file.metadata()["notes"])
        refuse_other_run(written["run"], run, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _restore(trainer.student, tensors)
    trainer.step = int(written["step"])
    for name, parameter in trained_parameters(trainer.student):
        if f"{_AVERAGES[0]}/{name}" in tensors:
            averages = {average: tensors[f"{average}/{name}"].to(device) for average in _AVERAGES}
            step = torch.tensor(float(trainer.step), device=device)
            trainer.optimizer.state[parameter] = {"step": step, **averages}
    return Notes(run, written["measured"], float(written["seconds"]))


def refuse_other_run(found: Mapping[str, object], wanted: Mapping[str, object], path: Path) -> None:
    """Raise ConfigurationError when an interrupted run had other options."""
    unlike = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if unlike:
        raise ConfigurationError(
            f"{path} belongs to a run with another {' and '.join(unlike)}: "
            "repeat the options of that run, or give another --work-dir"
        )


def _restore(student: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    student.load_state_dict({name: tensors[name] for name, _ in trained_parameters(student)}, strict=False)


def trained_parameters(student: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """By name, without those that are the target's."""
    return [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
