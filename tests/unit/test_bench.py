"""`slipstream bench` against a small server whose answers the test decides."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from aiohttp import web
from aiohttp.test_utils import TestServer
from redis.asyncio import Redis
from rich.console import Console
from typer.testing import CliRunner, Result

from services.bench.client import Sample
from services.bench.events import MAX_LINE, EventParser, StreamError
from services.bench.load import run_bench, start_times
from services.bench.observe import ProcessMemory, ProcessWatch, RedisCounter, find_processes, role_of
from services.bench.options import EXIT_ERRORS, EXIT_NOT_RUN, BenchOptions, bench
from services.bench.prompts import texts
from services.bench.report import BenchReport, percentile, render, summarise
from shared.errors import ConfigurationError

USAGE_DETAILS = {"path": "remote_prefill", "handoff_ms": 2.5, "kv_bytes": 100}


@dataclass
class FakeServer:
    """An OpenAI-like server: one token a chunk, ids for every word, and a count of what is in flight."""

    tokenize: bool = True
    usage: bool = True
    details: bool = True
    fail_from: int = 1_000_000
    events: Callable[[int], list[str]] | None = None
    redis: Redis | None = None
    expected_in_flight: int = 1
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    full: asyncio.Event = field(default_factory=asyncio.Event)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        if self.tokenize:
            app.router.add_post("/tokenize", self._tokenize)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        text = (await request.json())["prompt"]
        return web.json_response({"tokens": [len(word) for word in text.split()] * 2})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        if self.redis is not None:
            await self.redis.echo("hello")
        if len(self.bodies) > self.fail_from:
            return web.json_response({"error": {"message": "full"}}, status=503)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if self.in_flight >= self.expected_in_flight:
            self.full.set()
        await self.full.wait()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": ping\n\n")
        for event in (self.events or self._tokens)(body["max_tokens"]):
            await response.write(f"data: {event}\n\n".encode())
        self.in_flight -= 1
        return response

    def _tokens(self, count: int) -> list[str]:
        events = [json.dumps({"choices": [{"text": "a"}]}) for _ in range(count)]
        events.append(json.dumps({"choices": [{"text": "", "finish_reason": "length"}]}))
        if self.usage:
            usage: dict[str, Any] = {"prompt_tokens": 8, "completion_tokens": count}
            if self.details:
                usage["slipstream"] = USAGE_DETAILS
            events.append(json.dumps({"choices": [], "usage": usage}))
        return [*events, "[DONE]"]


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[FakeServer], Any]]:
    """Start a FakeServer and return options that point at it; all are stopped at the end."""
    servers: list[TestServer] = []

    async def start(fake: FakeServer) -> BenchOptions:
        server = TestServer(fake.app())
        await server.start_server()
        servers.append(server)
        url = str(server.make_url("/")).rstrip("/")
        return BenchOptions(base_url=url, requests=4, prompt_len=8, output_len=5, pids=(os.getpid(),), timeout_s=10)

    yield start
    for server in servers:
        await server.close()


async def test_counts_every_token_and_request(serve: Callable[[FakeServer], Any]) -> None:
    fake = FakeServer()
    report = await run_bench(await serve(fake))
    assert (report.requests, report.errors, report.model) == (4, 0, "tiny")
    assert report.output_tokens_mean == 5
    assert report.output_tokens_per_s == pytest.approx(20 / report.wall_s, rel=0.05)
    assert report.chunks_per_token == 1
    assert len(fake.bodies) == 5, "one warm-up and four measured requests"


async def test_prompts_are_ids_of_the_exact_length(serve: Callable[[FakeServer], Any]) -> None:
    fake = FakeServer()
    report = await run_bench(await serve(fake))
    assert report.prompt_exact
    assert [len(body["prompt"]) for body in fake.bodies] == [8] * 5
    assert all(isinstance(token, int) for body in fake.bodies for token in body["prompt"])


async def test_falls_back_to_words_without_tokenize(serve: Callable[[FakeServer], Any]) -> None:
    fake = FakeServer(tokenize=False)
    report = await run_bench(await serve(fake))
    assert not report.prompt_exact
    assert all(isinstance(body["prompt"], str) for body in fake.bodies)


async def test_requests_ask_for_a_fixed_amount_of_work(serve: Callable[[FakeServer], Any]) -> None:
    fake = FakeServer()
    options = replace(await serve(fake), api_key="k", extra={"top_k": 1}, temperature=0.5, seed=7)
    await run_bench(options)
    body = fake.bodies[-1]
    assert body["ignore_eos"] is True
    assert (body["max_tokens"], body["temperature"], body["top_k"]) == (5, 0.5, 1)
    assert body["stream_options"] == {"include_usage": True}
    assert sorted(body["seed"] for body in fake.bodies[1:]) == [7, 8, 9, 10]
    assert set(fake.keys) == {"Bearer k"}


async def test_closed_loop_keeps_exactly_that_many_in_flight(serve: Callable[[FakeServer], Any]) -> None:
    fake = FakeServer(expected_in_flight=3)  # answers nobody before three requests are there
    report = await run_bench(replace(await serve(fake), concurrency=3, requests=6, warmup=0))
    assert (report.errors, fake.most_in_flight) == (0, 3)


async def test_poisson_starts_requests_while_others_run(serve: Callable[[FakeServer], Any]) -> None:
    fake = FakeServer(expected_in_flight=4)
    report = await run_bench(replace(await serve(fake), rate=500.0, warmup=0))
    assert (report.mode, report.errors, fake.most_in_flight) == ("poisson", 0, 4)


async def test_failures_are_counted_and_left_out_of_the_figures(serve: Callable[[FakeServer], Any]) -> None:
    report = await run_bench(await serve(FakeServer(fail_from=3)))
    assert (report.requests, report.errors, report.ok) == (4, 2, False)
    assert "HTTP 503" in report.first_error
    assert report.output_tokens_mean == 5


async def test_a_failing_warm_up_stops_the_run(serve: Callable[[FakeServer], Any]) -> None:
    with pytest.raises(ConfigurationError, match="warm-up"):
        await run_bench(await serve(FakeServer(fail_from=0)))


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "broke off"),
        (["[DONE]"], "without a token"),
        ([json.dumps({"choices": [{"text": "a"}]})], "broke off"),
        ([json.dumps({"error": {"message": "engine died"}}), "[DONE]"], "engine died"),
        (["{not json", "[DONE]"], "not a JSON object"),
        (["[1]", "[DONE]"], "not a JSON object"),
    ],
)
async def test_a_broken_stream_is_an_error(serve: Callable[[FakeServer], Any], events: list[str], message: str) -> None:
    report = await run_bench(replace(await serve(FakeServer(events=lambda _: events)), warmup=0, requests=1))
    assert report.errors == 1
    assert message in report.first_error
    assert report.ttft_ms["p50"] is None


STREAM = b': ping\n\nid: 1-1\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata:{"b":\t"\xc3\xa9"}\n\ndata: [DONE]\n\ndata: no\n\n'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_do_not_depend_on_how_the_bytes_come(size: int) -> None:
    parser = EventParser()
    parts = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    assert [event for part in parts for event in parser.feed(part)] == [{"a": 1}, {"b": "é"}]
    assert parser.is_done
    assert parser.end() == []


def test_a_last_line_without_an_end_is_an_event() -> None:
    parser = EventParser()
    assert parser.feed(b'data: {"a": 1}') == []
    assert parser.end() == [{"a": 1}]
    assert not parser.is_done


def test_a_line_without_end_is_not_kept_for_ever() -> None:
    with pytest.raises(StreamError, match="bytes"):
        EventParser().feed(b"x" * (MAX_LINE + 1))


async def test_without_usage_a_chunk_is_a_token(serve: Callable[[FakeServer], Any]) -> None:
    report = await run_bench(await serve(FakeServer(usage=False)))
    assert (report.output_tokens_mean, report.prompt_tokens_mean) == (5, None)


async def test_hand_off_is_reported_only_by_servers_that_have_one(serve: Callable[[FakeServer], Any]) -> None:
    ours = await run_bench(await serve(FakeServer()))
    assert ours.paths == {"remote_prefill": 4}
    assert (ours.handoff_ms["p50"], ours.kv_bytes) == (2.5, 400)
    assert ours.handoff_share_of_ttft is not None
    other = await run_bench(await serve(FakeServer(details=False)))
    assert (other.paths, other.handoff_ms["p50"], other.handoff_share_of_ttft) == ({}, None, None)


async def test_no_server_is_one_sentence() -> None:
    with pytest.raises(ConfigurationError, match="no server at"):
        await run_bench(BenchOptions(base_url="http://127.0.0.1:1", timeout_s=5))


async def test_counts_redis_commands_between_the_two_looks(redis_client: Redis, redis_url: str) -> None:
    await redis_client.echo("before")
    async with RedisCounter(redis_url) as counter:
        for _ in range(7):
            await redis_client.echo("during")
        await redis_client.eval("return redis.call('PING')", 0)
        calls = await counter.delta()
    assert (calls["echo"], calls["eval"], calls["ping"]) == (7, 1, 1)
    assert "info" not in calls


async def test_redis_commands_per_token_reach_the_report(
    serve: Callable[[FakeServer], Any], redis_client: Redis, redis_url: str
) -> None:
    fake = FakeServer(redis=redis_client)
    report = await run_bench(replace(await serve(fake), redis_url=redis_url))
    assert report.redis_calls["echo"] == 4, "the warm-up request is not counted"
    assert report.redis_per_token == sum(report.redis_calls.values()) / 20


async def test_an_unreachable_redis_is_one_sentence() -> None:
    with pytest.raises(ConfigurationError, match="--redis-url"):
        async with RedisCounter("redis://127.0.0.1:1"):
            pass


def test_memory_of_given_processes() -> None:
    (memory,) = ProcessWatch(find_processes((os.getpid(),))).finish()
    assert memory.pid == os.getpid()
    assert memory.peak_rss > 1 << 20
    assert memory.pss is None or memory.pss > 1 << 20


def test_memory_of_a_process_that_ended_keeps_its_last_figure() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watch = ProcessWatch(find_processes((child.pid,)))
    watch.sample()
    child.communicate(b"\n")
    (memory,) = watch.finish()
    assert memory.peak_rss > 0
    assert memory.pss is None


def test_roles_are_found_among_running_processes(tmp_path: Path) -> None:
    program = tmp_path / "slipstream"
    program.write_text("input()")
    child = subprocess.Popen([sys.executable, str(program), "decode"], stdin=subprocess.PIPE)
    roles = {process.pid: role for process, role in find_processes()}
    child.communicate(b"\n")
    assert roles[child.pid] == "decode"
    assert os.getpid() not in roles


def test_a_missing_process_is_named() -> None:
    with pytest.raises(ConfigurationError, match="999999999"):
        find_processes((999_999_999,))


@pytest.mark.parametrize(
    ("cmdline", "role"),
    [
        (["/venv/bin/python", "/venv/bin/slipstream", "prefill", "--model", "x"], "prefill"),
        ([sys.executable, "-m", "services.cli", "decode"], "decode"),
        (["slipstream", "bench"], ""),
        (["vim", "slipstream.txt", "serve"], ""),
        ([], ""),
    ],
)
def test_roles_are_read_from_the_command_line(cmdline: list[str], role: str) -> None:
    assert role_of(cmdline) == role


def test_poisson_starts_are_seeded_and_have_the_rate() -> None:
    starts = start_times(4000, rate=10.0, seed=3)
    assert starts == start_times(4000, rate=10.0, seed=3)
    assert starts != start_times(4000, rate=10.0, seed=4)
    assert starts == sorted(starts)
    assert starts[-1] == pytest.approx(400, rel=0.05)
    assert start_times(3, rate=0, seed=3) == [0.0, 0.0, 0.0]


def test_prompts_are_seeded_distinct_and_long_enough() -> None:
    first = texts(20, 12, seed=1)
    assert first == texts(20, 12, seed=1)
    assert first != texts(20, 12, seed=2)
    assert len(set(first)) == 20
    assert all(len(text.split()) > 12 for text in first)


@pytest.mark.parametrize(("q", "expected"), [(50, 5), (90, 9), (99, 10), (100, 10), (1, 1)])
def test_percentile_is_nearest_rank(q: float, expected: float) -> None:
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], q) == expected


def test_percentile_of_nothing() -> None:
    assert percentile([], 50) is None


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"concurrency": 0}, "--concurrency"),
        ({"requests": 0}, "--requests"),
        ({"rate": -1.0}, "--rate"),
        ({"timeout_s": 0.0}, "--timeout"),
        ({"base_url": "localhost:8000"}, "--base-url"),
    ],
)
def test_bad_options_name_the_flag(change: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigurationError, match=flag):
        BenchOptions(**change)


@pytest.mark.parametrize("base", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_base_url_may_end_in_v1(base: str) -> None:
    assert BenchOptions(base_url=base).url("/v1/models") == "http://h:1/v1/models"


def sample_report() -> BenchReport:
    samples = [
        Sample(ttft=0.1, times=[1.0, 1.04, 1.06], elapsed=0.2, output_tokens=3, prompt_tokens=8, handoff_ms=5),
        Sample(ttft=0.3, times=[2.0, 2.06, 2.08], elapsed=0.4, output_tokens=3, prompt_tokens=8, handoff_ms=15),
        Sample(error="HTTP 503: full", elapsed=9.0),
    ]
    processes = [ProcessMemory(12, "decode", 300 << 20, 200 << 20), ProcessMemory(13, "redis", 10 << 20, None)]
    return summarise(BenchOptions(concurrency=2), "tiny", False, samples, 2.0, {"evalsha": 9, "publish": 3}, processes)


def test_figures_of_a_known_run() -> None:
    report = sample_report()
    assert (report.requests, report.errors, report.first_error) == (3, 1, "HTTP 503: full")
    assert report.output_tokens_per_s == 3
    assert report.ttft_ms == {"p50": 100, "p90": 300, "p99": 300}
    assert report.itl_ms == {"p50": 20, "p90": 60, "p99": 60}
    assert report.second_token_ms == {"p50": 40, "p90": 60, "p99": 60}
    assert report.e2e_ms["p99"] == 400, "a failed request is in no figure but the errors"
    assert report.handoff_share_of_ttft == 0.05
    assert report.redis_per_token == 2


def test_json_holds_everything_and_survives_dumping() -> None:
    data = json.loads(json.dumps(sample_report().as_json()))
    assert data["processes"][0] == {"pid": 12, "role": "decode", "peak_rss": 300 << 20, "pss": 200 << 20}
    assert data["machine"]["cores"] == os.cpu_count()
    assert data["redis_calls"] == {"evalsha": 9, "publish": 3}


def test_table_shows_the_figures() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    render(sample_report(), console)
    text = console.export_text()
    for expected in (
        "100.0",
        "3.0 output tokens/s",
        "1 errors",
        "2.00 commands per token",
        "evalsha 9",
        "decode",
        "300",
    ):
        assert expected in text
    assert "5.0% of the time to first token" in text
    assert "not exact" in text


def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(bench)
    return app


async def invoke(*arguments: str) -> Result:
    """Run the command in a thread: it makes an event loop of its own, while the fake server needs this one."""
    return await asyncio.to_thread(CliRunner().invoke, command(), list(arguments))


async def test_command_prints_json_and_exits_by_outcome(serve: Callable[[FakeServer], Any]) -> None:
    flags = ["--requests", "2", "--prompt-len", "4", "--output-len", "3", "--label", "x", "--json"]
    good = await invoke("--base-url", (await serve(FakeServer())).base_url, *flags)
    assert good.exit_code == 0
    assert {key: json.loads(good.stdout)[key] for key in ("label", "requests", "output_tokens_mean")} == {
        "label": "x",
        "requests": 2,
        "output_tokens_mean": 3,
    }
    bad = await invoke("--base-url", (await serve(FakeServer(fail_from=2))).base_url, *flags)
    assert (bad.exit_code, json.loads(bad.stdout)["errors"]) == (EXIT_ERRORS, 1)


async def test_command_prints_a_table(serve: Callable[[FakeServer], Any]) -> None:
    result = await invoke("--base-url", (await serve(FakeServer())).base_url, "--requests", "1")
    assert result.exit_code == 0
    assert "time to first token" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--extra", "{"], "--extra is not JSON"),
        (["--extra", "[]"], "must be a JSON object"),
        (["--concurrency", "0"], "--concurrency"),
        (["--base-url", "http://127.0.0.1:1"], "no server at"),
    ],
)
async def test_command_says_in_a_sentence_why_it_did_not_run(flags: list[str], message: str) -> None:
    result = await invoke(*flags)
    assert result.exit_code == EXIT_NOT_RUN
    assert message in result.stderr
    assert result.stdout == ""
