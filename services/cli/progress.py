"""What the user sees while models load: a bar on a terminal, a line every tenth elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from shared.protocol.messages import WorkerBeat

_PHASES = {
    "loading": "loading the model",
    "probing": "testing the whole path",
    "ready": "ready",
    "draining": "draining",
}


class LoadingProgress:
    """One bar per worker, from its heartbeats. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: dict[str, TaskID] = {}
        self._told: dict[str, tuple[str, int]] = {}
        self._progress = Progress(
            TextColumn("{task.fields[worker]:<9}"),
            BarColumn(bar_width=32),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> LoadingProgress:
        self._progress.start()
        self._console.print("Starting the bus, prefill, decode and gateway ...")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, beats: list[WorkerBeat]) -> None:
        """Show the newest heartbeats."""
        for beat in beats:
            self._draw(beat) if self._console.is_terminal else self._tell(beat)

    def _draw(self, beat: WorkerBeat) -> None:
        if beat.worker_id not in self._bars:
            self._bars[beat.worker_id] = self._progress.add_task("", total=1.0, worker=beat.role)
        description = _PHASES.get(beat.state, beat.state)
        self._progress.update(self._bars[beat.worker_id], completed=_share(beat), description=description)

    def _tell(self, beat: WorkerBeat) -> None:
        step = (beat.state, int(beat.progress * 10))
        if self._told.get(beat.worker_id) != step:
            self._told[beat.worker_id] = step
            percent = f" {step[1] * 10} %" if beat.state == "loading" else ""
            self._console.print(f"{beat.role}: {_PHASES.get(beat.state, beat.state)}{percent}")


def _share(beat: WorkerBeat) -> float:
    return {"loading": 0.9 * beat.progress, "probing": 0.95}.get(beat.state, 1.0)
