"""What one bench run does, and the flags that say it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import typer

from shared.bus.local import find_bus
from shared.errors import ConfigurationError

EXIT_ERRORS = 1
"""Some request failed; the figures are printed all the same."""
EXIT_NOT_RUN = 2
"""Nothing was measured: a flag, the server or Redis is wrong."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """One run against one server.

    `model` empty: the first of /v1/models. `rate` 0: closed loop, `concurrency` requests are always
    in flight. `rate` > 0: requests start at the times of a Poisson process with that many a second,
    however many are still in flight. `prompt_len` and `output_len` are in tokens. `redis_url` and
    `pids` say where to measure the cost; without pids, Slipstream's processes on this machine are
    looked for. `extra` is merged into every request body.
    """

    base_url: str = "http://127.0.0.1:8000"
    model: str = ""
    api_key: str = ""
    concurrency: int = 1
    rate: float = 0.0
    requests: int = 16
    warmup: int = 1
    prompt_len: int = 64
    output_len: int = 128
    temperature: float = 0.0
    seed: int = 0
    timeout_s: float = 600.0
    redis_url: str = ""
    pids: tuple[int, ...] = ()
    label: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least_one = {
            "--concurrency": self.concurrency,
            "--requests": self.requests,
            "--prompt-len": self.prompt_len,
            "--output-len": self.output_len,
        }
        for flag, value in at_least_one.items():
            if value < 1:
                raise ConfigurationError(f"{flag} is {value}: give at least 1")
        not_negative = {"--rate": self.rate, "--warmup": self.warmup, "--temperature": self.temperature}
        for flag, number in not_negative.items():
            if number < 0:
                raise ConfigurationError(f"{flag} is {number}: give 0 or more")
        if self.timeout_s <= 0:
            raise ConfigurationError(f"--timeout is {self.timeout_s}: give a number of seconds above 0")
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigurationError(f"--base-url is {self.base_url!r}: it must begin with http:// or https://")

    def url(self, path: str) -> str:
        """`path` on the server, whether or not `base_url` ends in a slash or in /v1."""
        return self.base_url.rstrip("/").removesuffix("/v1") + path

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def bench(
    base_url: Annotated[str, typer.Option(help="Any OpenAI-compatible server.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model name; the first one served when empty.")] = "",
    api_key: Annotated[str, typer.Option(envvar="SLIPSTREAM_API_KEY", help="Key of the server.")] = "",
    concurrency: Annotated[int, typer.Option(help="Requests in flight in a closed loop.")] = 1,
    rate: Annotated[float, typer.Option(help="Requests a second by a Poisson process; 0 for a closed loop.")] = 0.0,
    requests: Annotated[int, typer.Option(help="Requests to measure.")] = 16,
    warmup: Annotated[int, typer.Option(help="Requests before the measurement.")] = 1,
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 64,
    output_len: Annotated[int, typer.Option(help="Tokens to generate for each.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same prompts and start times.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds one request may take.")] = 600.0,
    redis_url: Annotated[str, typer.Option(help="Count this bus's commands; empty: a local serve's.")] = "",
    pid: Annotated[list[int] | None, typer.Option(help="Measure these processes; else all of Slipstream's.")] = None,
    label: Annotated[str, typer.Option(help="A name to find the run by.")] = "",
    extra: Annotated[str, typer.Option(help="A JSON object merged into every request.")] = "{}",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Load a running server and report latency, throughput, hand-off, Redis commands and memory."""
    redis_url = redis_url or os.environ.get("SLIPSTREAM_REDIS__URL", "") or find_bus("default")
    try:
        options = BenchOptions(
            base_url=base_url,
            model=model,
            api_key=api_key,
            concurrency=concurrency,
            rate=rate,
            requests=requests,
            warmup=warmup,
            prompt_len=prompt_len,
            output_len=output_len,
            temperature=temperature,
            seed=seed,
            timeout_s=timeout,
            redis_url=redis_url,
            pids=tuple(pid or ()),
            label=label,
            extra=_json_object(extra),
        )
        raise typer.Exit(_run_and_print(options, json_output))
    except ConfigurationError as exc:
        print(f"slipstream: {exc}", file=sys.stderr)
        raise typer.Exit(EXIT_NOT_RUN) from None


def _run_and_print(options: BenchOptions, as_json: bool) -> int:
    # Imported here because every role's process reads the flags of every command.
    import uvloop
    from rich.console import Console

    from services.bench.load import run_bench
    from services.bench.report import render

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(run_bench(options))
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        render(report, Console())
    return 0 if report.ok else EXIT_ERRORS


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise ConfigurationError(f"--extra is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ConfigurationError("--extra must be a JSON object, for example '{\"top_k\": 1}'")
    return value
