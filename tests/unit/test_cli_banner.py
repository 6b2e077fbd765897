"""The box of a ready cluster: what it says, and a curl line that can be pasted as it is."""

from __future__ import annotations

import io
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from services.cli.banner import curl_line, show_ready
from shared.config import load_settings, setting_paths, variable_name
from shared.protocol.messages import WorkerBeat

PREFILL = WorkerBeat(
    "prefill-1", "prefill", "ready", "tiny", "numerics", "layout", kv_tokens=4096, max_request_tokens=1024
)
DECODE = replace(PREFILL, worker_id="decode-1", role="decode", kv_tokens=8192)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in setting_paths():
        monkeypatch.delenv(variable_name(path), raising=False)
    monkeypatch.chdir(tmp_path)


def shown(*beats: WorkerBeat, width: int = 120, **overrides: Any) -> str:
    out = io.StringIO()
    show_ready(Console(file=out, width=width, highlight=False), load_settings(**overrides), list(beats))
    return out.getvalue()


def row(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.strip("│ ").startswith(f"{name} ")]
    return line.strip("│ ").removeprefix(name).strip()


def test_the_box_says_what_runs_and_what_it_can_take() -> None:
    text = shown(
        PREFILL, DECODE, gateway={"port": 8123, "max_in_flight": 9, "max_queued": 10, "max_body_bytes": 1 << 20}
    )
    assert row(text, "URL") == "http://127.0.0.1:8123/v1"
    assert row(text, "Model") == "tiny on cpu, float32"
    assert row(text, "Workers").startswith("1 prefill, 1 decode")
    assert row(text, "Context") == "1024 tokens"
    assert row(text, "KV room").startswith("8192 tokens on decode: 8 requests of full context")
    assert row(text, "Limits").startswith("9 requests in flight, 10 queued, 1 MiB a body, 32 sequences and 512 tokens")
    assert "Slipstream is ready" in text


def test_room_adds_up_and_context_is_the_shortest() -> None:
    text = shown(PREFILL, DECODE, replace(DECODE, worker_id="decode-2", kv_tokens=1000, max_request_tokens=512))
    assert row(text, "Workers").startswith("1 prefill, 2 decode")
    assert row(text, "Context") == "512 tokens"
    assert row(text, "KV room").startswith("9192 tokens on decode: 17 requests")


def test_a_worker_that_is_still_loading_is_not_counted() -> None:
    """One that died and is started again beside the ready ones has told no sizes yet."""
    loading = WorkerBeat("decode-2", "decode", "loading", "tiny", "", "")
    assert shown(PREFILL, DECODE, loading) == shown(PREFILL, DECODE)


@pytest.mark.parametrize("beats", [(), (PREFILL,), (DECODE,)])
def test_there_is_no_box_before_both_roles_are_there(beats: tuple[WorkerBeat, ...]) -> None:
    assert shown(*beats) == ""


def test_the_promise_of_equal_tokens_follows_the_heartbeats() -> None:
    proven = [replace(beat, equal_tokens=True) for beat in (PREFILL, DECODE)]
    assert row(shown(*proven), "Same tokens").startswith("yes")
    assert row(shown(proven[0], DECODE), "Same tokens").startswith("not promised")
    assert row(shown(proven[0], replace(proven[1], numerics="else")), "Same tokens").startswith("only between")


def test_the_key_is_told_as_a_state_and_never_shown() -> None:
    assert row(shown(PREFILL, DECODE), "API key").startswith("none set: anyone who reaches this address")
    text = shown(PREFILL, DECODE, api_keys="a-very-secret-key")
    assert row(text, "API key") == "needed"
    assert "a-very-secret-key" not in text
    assert row(shown(PREFILL, DECODE, api_keys_file="/run/secrets/keys"), "API key") == "needed"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_wildcard_address_is_shown_as_one_that_can_be_reached(host: str) -> None:
    assert row(shown(PREFILL, DECODE, gateway={"host": host}), "URL") == "http://127.0.0.1:8000/v1"


def test_the_curl_line_is_not_wrapped_on_a_narrow_terminal() -> None:
    line = curl_line("http://127.0.0.1:8000", "tiny", has_key=False)
    assert line in shown(PREFILL, DECODE, width=50).splitlines()


@pytest.mark.parametrize("model", ["tiny", "it's [bold]odd[/bold]", 'say "hi"', "a$HOME`b`\\c"])
@pytest.mark.parametrize("has_key", [False, True])
def test_the_curl_line_reads_back_in_a_shell(model: str, has_key: bool) -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000", model, has_key))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert (body["model"], body["stream"]) == (model, True)
    assert body["messages"][0]["role"] == "user"
    headers = [words[index + 1] for index, word in enumerate(words) if word == "-H"]
    key = ["Authorization: Bearer $SLIPSTREAM_API_KEY"] if has_key else []
    assert headers == [*key, "Content-Type: application/json"]


def test_an_odd_model_name_is_shown_as_it_is() -> None:
    beats = [replace(beat, model="my[/]model [red]") for beat in (PREFILL, DECODE)]
    assert row(shown(*beats), "Model").startswith("my[/]model [red] on cpu")
