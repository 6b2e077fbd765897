"""`slipstream distill`: options in, one line of progress, the folder of the draft out."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from shared.config import EngineSettings
from shared.distill.options import DistillOptions
from shared.distill.run import Progress as Step
from shared.distill.run import distill
from shared.lifecycle import EXIT_OK
from shared.model.source import resolve

_EVERY_S = 10.0
"""Seconds between two lines where there is no terminal to draw on."""


class DistillProgress:
    """A bar on a terminal, a line now and then elsewhere. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._task: TaskID | None = None
        self._phase = ""
        self._told = 0.0
        self._began = (0.0, 0)
        self._bar = Progress(
            TextColumn("{task.fields[phase]:<13}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> DistillProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: Step) -> None:
        """Show where the run stands."""
        if step.phase != self._phase:
            self._phase, self._told, self._began = step.phase, 0.0, (time.monotonic(), step.done)
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task("", total=step.total, phase=step.phase)
        if self._console.is_terminal:
            assert self._task is not None
            self._bar.update(self._task, completed=step.done, description=describe(step))
        elif time.monotonic() - self._told >= _EVERY_S:
            self._told = time.monotonic()
            self._console.print(f"{step.phase}: {step.done}/{step.total} {describe(step)} {self._remaining(step)}")

    def _remaining(self, step: Step) -> str:
        since, first = self._began
        if step.done <= first or step.done >= step.total:
            return ""
        left = (time.monotonic() - since) / (step.done - first) * (step.total - step.done)
        return f"ETA {int(left) // 60}:{int(left) % 60:02d}"


def describe(step: Step) -> str:
    """Loss and held-out acceptance, where the phase has them."""
    parts = [] if step.loss is None else [f"loss {step.loss:.3f}"]
    if step.quality is not None:
        parts += [f"acceptance {step.quality.acceptance:.3f}", f"greedy {step.quality.greedy:.3f}"]
    return " ".join(parts)


def run_distill(target: str, settings: EngineSettings, options: DistillOptions) -> int:
    """Blocking, minutes to hours; the exit status. The same command goes on after an interruption."""
    console = Console(stderr=True)
    source = resolve(target)
    if settings.device != "cpu":
        _repeatable_on_a_gpu()
    try:
        with DistillProgress(console) as progress:
            recipe = distill(source, settings, options, progress.update)
    except KeyboardInterrupt:
        console.print(f"Interrupted. The same command goes on from what is kept in {options.work}.")
        return 130
    console.print(f"The draft is in {options.out}.")
    held_out = recipe["held_out"]
    assert isinstance(held_out, Mapping)
    for phase, quality in held_out.items():
        console.print(f"after {phase}: acceptance {quality['acceptance']:.3f}, greedy {quality['greedy']:.3f}")
    return EXIT_OK


def _repeatable_on_a_gpu() -> None:
    """Sums on a GPU are taken in any order unless this is said; on a CPU they are repeatable as they are."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
