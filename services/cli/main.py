"""Commands of `slipstream`; each only reads its flags and calls the module that does the work."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from services.bench.options import bench
from services.cli import flags
from services.cli.flags import with_flags
from shared.config import Settings, load_settings, unknown_variables
from shared.errors import ConfigurationError, SlipstreamError
from shared.lifecycle import EXIT_USAGE, run_service
from shared.model.draft_kind import DraftKind
from shared.observability.logging import configure_logging

app = typer.Typer(
    name="slipstream",
    help="Serves large language models with prefill and decode split into services.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(bench)

Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a GGUF file, or smollm2.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
@with_flags(*flags.ALL)
def serve(
    model: Model = "smollm2",
    prefill: Annotated[int, typer.Option(min=1, max=64, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=1, max=64, help="Decode workers.")] = 1,
    *,
    overrides: dict[str, Any],
) -> None:
    """Start everything on this machine: the bus, prefill, decode and the gateway, as separate processes."""
    from services.cli.serve import Cluster

    overrides["model"] = model
    settings = _settings(overrides, configure=False)
    raise typer.Exit(run_service(Cluster(settings, overrides, prefill, decode).run))


@app.command()
@with_flags(*flags.COMMON, *flags.MODEL, *flags.GATEWAY, flags.MAX_MODEL_LEN)
def gateway(*, overrides: dict[str, Any]) -> None:
    """Run one gateway against a Redis URL."""
    from services.gateway.app import run_gateway

    _run(overrides, run_gateway)


@app.command()
@with_flags(*flags.WORKER)
def prefill(*, overrides: dict[str, Any]) -> None:
    """Run one prefill worker against a Redis URL."""
    _let_waiting_threads_sleep()
    from services.prefill.main import run_prefill

    _run(overrides, run_prefill)


@app.command()
@with_flags(*flags.WORKER)
def decode(*, overrides: dict[str, Any]) -> None:
    """Run one decode worker against a Redis URL."""
    _let_waiting_threads_sleep()
    from services.decode.main import run_decode

    _run(overrides, run_decode)


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask once; without it, a conversation begins.")] = None,
    url: Annotated[str, typer.Option(help="The gateway.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model name; the first one served when empty.")] = "",
    api_key: Annotated[str, typer.Option(envvar="SLIPSTREAM_API_KEY", help="Key of the gateway.")] = "",
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0)] = None,
) -> None:
    """Talk to a running gateway; /bye ends."""
    from services.cli.chat import Chat

    raise typer.Exit(asyncio.run(Chat(url, model, api_key, temperature).run(prompt)))


@app.command()
@with_flags(*flags.COMMON)
def ps(
    json_output: Json = False,
    check: Annotated[str, typer.Option(help="Exit 0 only if this host's gateway, prefill or decode is ready.")] = "",
    *,
    overrides: dict[str, Any],
) -> None:
    """Show live workers: role, state, running, waiting, KV use, tokens/s."""
    from services.cli.ps import run_ps

    settings = _settings(overrides, configure=False)
    raise typer.Exit(_tell(lambda: asyncio.run(run_ps(settings, as_json=json_output, check=check))))


@app.command()
@with_flags(*flags.COMMON)
def dlq(
    action: Annotated[str, typer.Argument(help="list or clear.")] = "list",
    json_output: Json = False,
    *,
    overrides: dict[str, Any],
) -> None:
    """List requests that were given up because their workers kept dying, or forget them."""
    from services.cli.dlq import ACTIONS, run_dlq

    if action not in ACTIONS:
        _fail(f"dlq knows {' and '.join(ACTIONS)}, not {action!r}")
    settings = _settings(overrides, configure=False)
    raise typer.Exit(_tell(lambda: asyncio.run(run_dlq(settings, action, as_json=json_output))))


@app.command()
@with_flags(*flags.COMMON)
def drain(
    ids: Annotated[list[str] | None, typer.Argument(help="Workers and gateways to drain.")] = None,
    role: Annotated[str, typer.Option(help="All of prefill, decode or gateway.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Every worker and gateway.")] = False,
    rolling: Annotated[bool, typer.Option("--rolling", help="One at a time; wait for each one's successor.")] = False,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds one may take to leave, or to be replaced.")] = 120.0,
    *,
    overrides: dict[str, Any],
) -> None:
    """Have workers or gateways finish what they do and leave; returns when they have."""
    from services.cli.drain import Selection, run_drain

    settings = _settings(overrides, configure=False)
    selection = Selection(tuple(ids or ()), role, everything)
    try:
        selection.check()
    except ConfigurationError as error:
        _fail(str(error))
    raise typer.Exit(_tell(lambda: asyncio.run(run_drain(settings, selection, rolling=rolling, timeout_s=timeout))))


@app.command()
@with_flags(*flags.COMPUTE)
def distill(
    target: Annotated[
        str, typer.Argument(help="The model to draft for: a folder, a GGUF file, or smollm2.")
    ] = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder for the draft.")] = Path("draft"),
    work_dir: Annotated[Path | None, typer.Option(help="Texts and checkpoints; OUT.work when not given.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line; the packaged ones when not given.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens the target writes.")] = 300_000,
    kind: Annotated[
        DraftKind, typer.Option(help="Heads on the target's hidden rows, or a small model of layers.")
    ] = DraftKind.HEADS,
    layers: Annotated[int, typer.Option(help="Layers of the draft, 1 to 4.")] = 2,
    exit_layer: Annotated[int, typer.Option(help="Layers of the target that a draft of layers begins with.")] = 0,
    head_size: Annotated[int, typer.Option(help="Ids the draft learns.")] = 8192,
    keep_ids: Annotated[int | None, typer.Option(help="Ids of these that it keeps; all when not given.")] = None,
    epochs: Annotated[float, typer.Option(help="How often the texts are read.")] = 4.0,
    on_policy: Annotated[int, typer.Option(help="Steps on drafts of its own, for layers.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Same seed, same draft.")] = 0,
    *,
    overrides: dict[str, Any],
) -> None:
    """Train a draft model for speculative decoding on texts the target writes; an interrupted run goes on."""
    _let_waiting_threads_sleep()
    from services.cli.distill import run_distill
    from shared.distill.options import DistillOptions

    settings = _settings(overrides)
    work = out.with_name(f"{out.name}.work") if work_dir is None else work_dir
    try:
        options = DistillOptions(
            *(out, work, prompts, kind, tokens, layers, exit_layer, head_size, keep_ids, epochs, on_policy),
            *(learning_rate, seed),
        )
    except ConfigurationError as error:
        _fail(str(error))
    raise typer.Exit(_tell(lambda: run_distill(target, settings.engine, options)))


@app.command()
@with_flags(*flags.COMMON)
def doctor(json_output: Json = False, *, overrides: dict[str, Any]) -> None:
    """Report what this machine has and what is missing, for an issue or for yourself."""
    from services.cli.doctor import run_doctor

    settings = _settings(overrides, configure=False)
    raise typer.Exit(_tell(lambda: asyncio.run(run_doctor(settings, as_json=json_output))))


def _let_waiting_threads_sleep() -> None:
    """Has to come before torch is loaded: OpenMP's threads spin while they wait, and workers share cores."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _run(overrides: dict[str, Any], service: Callable[[Settings, asyncio.Event], Coroutine[None, None, None]]) -> None:
    settings = _settings(overrides)
    if not settings.redis.url:
        _fail("one role alone needs a Redis to meet the others: set --redis-url or SLIPSTREAM_REDIS__URL")
    raise typer.Exit(run_service(lambda stop: service(settings, stop)))


def _settings(overrides: dict[str, Any], *, configure: bool = True) -> Settings:
    try:
        settings = load_settings(**overrides)
    except ConfigurationError as error:
        _fail(str(error))
    for name in unknown_variables():
        print(
            f"slipstream: warning: {name} is not a setting; see docs/operations.md for those there are", file=sys.stderr
        )
    if configure:
        configure_logging(settings.log_level, settings.log_format)
    return settings


def _tell(command: Callable[[], int]) -> int:
    try:
        return command()
    except SlipstreamError as error:
        print(f"slipstream: {error}", file=sys.stderr)
        return 1


def _fail(message: str) -> Any:
    print(f"slipstream: {message}", file=sys.stderr)
    raise typer.Exit(EXIT_USAGE)


def main() -> None:
    """Entry point of the console script."""
    app()
