"""`slipstream ps`: the workers that are alive now."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict

import aiohttp
from rich.console import Console
from rich.table import Table

from services.cli.banner import connectable
from services.cli.bus import deployment_bus
from shared.bus.registry import Registry
from shared.config import Settings
from shared.protocol.keys import Keys
from shared.protocol.messages import WorkerBeat

_COLUMNS = ("role", "model", "state", "running", "waiting", "KV use", "tokens/s", "per step", "served")
_PIPE_WIDTH = 200  # columns where no terminal tells a width, as in `docker compose exec -T`: room for whole ids


async def run_ps(settings: Settings, *, as_json: bool, check: str) -> int:
    """Print the table; with `check`, print nothing and answer by exit status."""
    if check == "gateway":
        return await _check_gateway(settings)
    beats = await _live(settings)
    if check:
        ready = [beat for beat in beats if beat.role == check and beat.host == socket.gethostname()]
        return 0 if any(beat.state == "ready" for beat in ready) else 1
    if as_json:
        print(json.dumps([asdict(beat) for beat in beats]))
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=_PIPE_WIDTH)
        console.print(table_of(beats) if beats else "No worker is alive.")
    return 0


async def _live(settings: Settings) -> list[WorkerBeat]:
    async with deployment_bus(settings) as client:
        return await Registry(client, Keys(settings.deployment)).live()


async def _check_gateway(settings: Settings) -> int:
    url = f"http://{connectable(settings.gateway.host)}:{settings.gateway.port}/health"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3)) as session,
            session.get(url) as response,
        ):
            return 0 if response.status == 200 else 1
    except (aiohttp.ClientError, TimeoutError):
        return 1


def table_of(beats: list[WorkerBeat]) -> Table:
    """A row a worker. Its id is what usage and logs name it by, so a narrow terminal folds it and never cuts it."""
    table = Table(box=None, pad_edge=False)
    table.add_column("worker", overflow="fold")
    for name in _COLUMNS:
        table.add_column(name)
    for beat in beats:
        use = 100 * beat.kv_tokens_used / beat.kv_tokens if beat.kv_tokens else 0.0
        state = f"{beat.state} {beat.progress:.0%}" if beat.state == "loading" else beat.state
        per_step = f"{beat.generated_tokens / beat.sequence_steps:.2f}" if beat.sequence_steps else "-"
        numbers = (str(beat.running), str(beat.waiting), f"{use:.0f} %", f"{beat.tokens_per_second:.1f}", per_step)
        table.add_row(beat.worker_id, beat.role, beat.model, state, *numbers, str(beat.requests_done))
    return table
