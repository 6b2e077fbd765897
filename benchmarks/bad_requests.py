"""Every bad request against real processes, and how long a small normal request takes meanwhile.

    python -m benchmarks.bad_requests --out docs/data/bad-requests.json
    python -m benchmarks.bad_requests --model smollm2 --out docs/data/bad-requests-smollm2.json

A canary is measured alone and beside one bad request, in turns: each bad request is sent a moment before its canary,
and the next pair waits until both are answered. `ratio` is the median beside divided by the median alone of the same
turns. The exit status is 1 if a row was answered otherwise than its table says or a process ended; ratios are
reported, not judged.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bad_bodies import HEAVY, Flood, chunked
from benchmarks.raw import write_raw
from tests.badrequests.cases import MAX_PROMPTS, Case, as_bytes, check_error
from tests.badrequests.conftest import MAX_BODY_BYTES
from tests.badrequests.tables import ACCEPTED, KEYS, REFUSED
from tests.badrequests.test_transport import KEY
from tests.cluster import Cluster
from tests.gateway_rig import COMPLETIONS, CONTEXT, MODEL
from tests.tiny_model import write_tiny_model

CANARY = {"prompt": [1, 2, 3], "max_tokens": 8, "ignore_eos": True, "temperature": 0}
TIMEOUT_S = 120
SETTINGS = {
    "SLIPSTREAM_SERVED_MODEL_NAME": MODEL,
    "SLIPSTREAM_ENGINE__MAX_MODEL_LEN": str(CONTEXT),
    "SLIPSTREAM_GATEWAY__MAX_PROMPTS": str(MAX_PROMPTS),
    "SLIPSTREAM_GATEWAY__REQUEST_TIMEOUT_S": "60",
}


@dataclass(slots=True)
class Row:
    """One kind of bad request: how it was answered, and the canary beside it."""

    row: int
    name: str
    status: int
    wrong: str = ""
    answer_ms: float = 0.0
    alone_ms: list[float] = field(default_factory=list)
    beside_ms: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return round(median(self.beside_ms) / median(self.alone_ms), 2)


class Client:
    """Blocking requests with the API key, one connection each, so that no request waits for another's."""

    def __init__(self, url: str) -> None:
        self._address = url.removeprefix("http://")

    def canary(self) -> float:
        """Milliseconds of one small normal request. Raises RuntimeError when it is not answered."""
        started = time.perf_counter()
        status, _, body = self.send(Case(0, "canary", CANARY, 200, path=COMPLETIONS))
        if status != 200:
            raise RuntimeError(f"the canary was refused: {status} {body[:300]!r}")
        return round((time.perf_counter() - started) * 1000, 2)

    def send(self, case: Case) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_S)
        body: Any = as_bytes(case.body)
        is_chunked = case.headers.get("Transfer-Encoding") == "chunked"
        key = {} if case in KEYS else {"Authorization": f"Bearer {KEY}"}
        headers = {"Content-Type": "application/json", **key, **case.headers}
        try:
            try:
                encoded = {name: value.encode() for name, value in headers.items()}
                data = chunked(body) if is_chunked else body
                connection.request(case.method, case.path, data, encoded, encode_chunked=is_chunked)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before all of it was sent; the answer is there all the same
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()


def judge(case: Case, answer: tuple[int, Any, bytes]) -> str:
    """What is wrong with an answer, empty when nothing is."""
    status, headers, body = answer
    if case.status == 200:
        return "" if status == 200 else f"status {status}: {body[:200]!r}"
    try:
        check_error(status, headers, json.loads(body), case)
    except (AssertionError, ValueError, KeyError) as exc:
        return f"{type(exc).__name__}: {str(exc)[:300]}"
    return ""


def measure(client: Client, case: Case, turns: int) -> Row:
    """Canaries alone and beside one bad request each."""
    row = Row(case.row, case.name, case.status)
    times: list[float] = []

    def act() -> None:
        started = time.perf_counter()
        try:
            row.wrong = row.wrong or judge(case, client.send(case))
        except OSError as exc:
            row.wrong = row.wrong or f"{type(exc).__name__}: {exc}"
        times.append((time.perf_counter() - started) * 1000)

    for _ in range(turns):
        row.alone_ms.append(client.canary())
        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        row.beside_ms.append(client.canary())
        thread.join(TIMEOUT_S)
    row.answer_ms = round(median(times), 2)
    return row


def measure_flood(client: Client, flood: Flood, url: str, turns: int) -> Row:
    """Canaries alone, then beside connections that send a byte at a time."""
    row = Row(flood.row, flood.name, 0, alone_ms=[client.canary() for _ in range(turns)])
    with flood.running(url.removeprefix("http://"), KEY):
        row.beside_ms = [client.canary() for _ in range(turns)]
    return row


def run(cluster: Cluster, turns: int, only: str) -> dict[str, Any]:
    client = Client(cluster.url)
    pids = [process.pid for process in cluster.processes]
    for _ in range(20):
        client.canary()
    rows: list[Row] = []
    for case in [*HEAVY, *table_cases()]:
        if only and not re.search(only, case.name):
            continue
        if isinstance(case, Flood):
            rows.append(measure_flood(client, case, cluster.url, 4 * turns))
        else:
            rows.append(measure(client, case, 4 * turns if case in HEAVY else turns))
    ended = [process.role for process in cluster.processes if process.popen.poll() is not None]
    assert pids == [process.pid for process in cluster.processes]
    return summary(rows, ended)


def table_cases() -> list[Case]:
    """The tables' cases; those that depend on the small body limit of the tests are among HEAVY in their real size."""
    cases = [*REFUSED, *KEYS, *map(accepted, ACCEPTED)]
    return [case for case in cases if not (case.status == 413 and len(as_bytes(case.body)) > MAX_BODY_BYTES)]


def accepted(case: Case) -> Case:
    """With a short answer, so that only the request is unusual and not the work it makes."""
    body = {"max_tokens": 2, **case.body} if isinstance(case.body, dict) else case.body
    return replace(case, status=200, body=body)


def summary(rows: list[Row], ended: list[str]) -> dict[str, Any]:
    worst = sorted(rows, key=lambda row: -row.ratio)
    return {
        "alone_ms": spread([ms for row in rows for ms in row.alone_ms]),
        "beside_ms": spread([ms for row in rows for ms in row.beside_ms]),
        "rows": len(rows),
        "wrong": [asdict(row) for row in rows if row.wrong],
        "processes_ended": ended,
        "ratio": {"p50": median(row.ratio for row in rows), "max": worst[0].ratio},
        "above_3": [row.name for row in worst if row.ratio > 3],
        "detail": [{**asdict(row), "ratio": row.ratio} for row in worst],
    }


def spread(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    quantiles = {f"p{q}": round(ordered[int((len(ordered) - 1) * q / 100)], 2) for q in (50, 90, 99, 100)}
    return {"n": len(ordered), **quantiles}


def main() -> None:
    parser = argparse.ArgumentParser(description="Bad requests beside a canary, on real processes.")
    parser.add_argument("--out", type=Path, required=True, help="where the raw figures go, as JSON")
    parser.add_argument("--model", default="", help="a model as `slipstream serve` takes it; default: a tiny one")
    parser.add_argument(
        "--turns", type=int, default=5, help="canaries alone and beside each row; four times as many for the heavy ones"
    )
    parser.add_argument("--only", default="", help="rows whose name matches this pattern")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(write_tiny_model(Path(folder) / "model"))
        with Cluster(Path(folder) / "logs", model, api_key=KEY, settings=dict(SETTINGS)) as cluster:
            result = run(cluster, options.turns, options.only)
    write_raw(options.out, [result], model=options.model or "tiny")
    shown = {name: result[name] for name in ("alone_ms", "beside_ms", "rows", "ratio", "above_3", "processes_ended")}
    print(json.dumps({**shown, "wrong": [(row["name"], row["wrong"]) for row in result["wrong"]]}, indent=1))
    sys.exit(1 if result["wrong"] or result["processes_ended"] else 0)


if __name__ == "__main__":
    main()
