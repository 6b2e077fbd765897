"""`slipstream dlq`: requests that were given up because their workers kept dying."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from services.cli.bus import deployment_bus
from shared.bus.deadletters import DeadLetter, clear_dead_letters, dead_letters
from shared.config import Settings
from shared.protocol.keys import Keys

ACTIONS = ("list", "clear")
_COLUMNS = ("model", "died in", "deaths", "prompt", "tokens", "epoch", "gateway", "reason")
_PIPE_WIDTH = 200


async def run_dlq(settings: Settings, action: str, *, as_json: bool) -> int:
    """Print the notes, or forget them all."""
    keys = Keys(settings.deployment)
    async with deployment_bus(settings) as client:
        if action == "clear":
            count = await clear_dead_letters(client, keys)
            print(json.dumps({"cleared": count}) if as_json else f"Forgot {count} quarantined requests.")
            return 0
        letters = await dead_letters(client, keys)
    if as_json:
        print(json.dumps([asdict(letter) for letter in letters]))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    console.print(table_of(letters) if letters else "No request is in quarantine.")
    return 0


def table_of(letters: list[DeadLetter]) -> Table:
    """A row a request, oldest first; the time is Redis' own."""
    table = Table(box=None, pad_edge=False)
    table.add_column("time")
    table.add_column("request", overflow="fold")
    for name in _COLUMNS:
        table.add_column(name)
    for letter in letters:
        when = datetime.fromtimestamp(letter.time / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        numbers = (str(letter.prompt), str(letter.tokens), str(letter.epoch))
        deaths = f"{letter.deaths} of {letter.kills}"
        table.add_row(when, letter.id, letter.model, letter.role, deaths, *numbers, letter.gateway, letter.reason)
    return table
