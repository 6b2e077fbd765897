"""The box that says what is running and how to use it."""

from __future__ import annotations

import json
import shlex

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from shared.config import Settings
from shared.protocol.messages import WorkerBeat


def show_ready(console: Console, settings: Settings, beats: list[WorkerBeat]) -> None:
    """Print the box and, below it and unwrapped so that it can be copied, a curl line that works."""
    ready = [beat for beat in beats if beat.state == "ready"]  # a worker that loads has told no sizes yet
    decode = [beat for beat in ready if beat.role == "decode"]
    prefill = [beat for beat in ready if beat.role == "prefill"]
    if not decode or not prefill:
        return
    url = f"http://{connectable(settings.gateway.host)}:{settings.gateway.port}"
    context = min(beat.max_request_tokens for beat in ready)
    room = sum(beat.kv_tokens for beat in decode)
    grid = Table.grid(padding=(0, 2))
    for name, value in (
        ("URL", f"{url}/v1"),
        ("Model", f"{decode[0].model} on {settings.engine.device}, {settings.engine.compute_dtype}"),
        ("Workers", f"{len(prefill)} prefill, {len(decode)} decode, each a process of its own"),
        ("Context", f"{context} tokens"),
        ("KV room", f"{room} tokens on decode: {room // context} requests of full context, more when shorter"),
        ("Limits", _limits(settings)),
        ("Same tokens", _promise(ready)),
        ("API key", "needed" if settings.asks_for_keys else "none set: anyone who reaches this address can use it"),
    ):
        grid.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(Panel(grid, title="Slipstream is ready", title_align="left", expand=False))
    console.print("Try it:", soft_wrap=True)
    console.print(curl_line(url, decode[0].model, settings.asks_for_keys), soft_wrap=True, markup=False)
    console.print("Ctrl-C drains and stops everything.")


def curl_line(url: str, model: str, has_key: bool) -> str:
    """One line that streams an answer; the key comes from the environment, not from the screen."""
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    key = ' -H "Authorization: Bearer $SLIPSTREAM_API_KEY"' if has_key else ""
    data = shlex.quote(json.dumps(body))
    return f"curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {data}"


def connectable(host: str) -> str:
    """The address to reach a server by that listens on `host`."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def _limits(settings: Settings) -> str:
    gateway, engine = settings.gateway, settings.engine
    return (
        f"{gateway.max_in_flight} requests in flight, {gateway.max_queued} queued, "
        f"{gateway.max_body_bytes >> 20} MiB a body, "
        f"{engine.max_num_seqs} sequences and {engine.max_num_batched_tokens} tokens a step"
    )


def _promise(beats: list[WorkerBeat]) -> str:
    if len({beat.numerics for beat in beats}) > 1:
        return "only between workers of equal arithmetic; these differ"
    if all(beat.equal_tokens for beat in beats):
        return "yes: the start-up check passed on this model and machine"
    return "not promised: the start-up check did not pass, or --no-batch-invariant"
