"""What a request leaves behind in memory once it has ended: nothing, in the gateway and in the workers."""

from __future__ import annotations

import asyncio
import gc
import secrets
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.decode.worker import Counters
from shared.protocol.messages import Usage
from shared.transfer import exporter
from tests.stack import Stack, stack
from tests.tiny_model import NAME, VOCAB, write_tiny_model

ROUND = 40
AT_ONCE = 4
FEWER_BLOCKS_THAN_REQUESTS = 16 * 30
CONTAINERS = (dict, OrderedDict, Counter, set, list, deque)
OURS = ("shared.", "services.")
REMEMBERED_HAND_OFFS = 16


class Holdings:
    """How many objects of our own classes there are, and how much every container holds that exists now."""

    def __init__(self) -> None:
        gc.collect()
        objects = gc.get_objects()
        self.counts = Counter(name for one in objects if (name := _name(one)).startswith(OURS))
        self.containers = {id(one): (one, len(one)) for one in _containers(objects)}

    def grown(self, at_least: int) -> list[str]:
        """What has become more by so many since."""
        now = Holdings()
        kept = [f"{name}: {count}" for name, count in (now.counts - self.counts).items() if count >= at_least]
        for one, length in self.containers.values():
            if len(one) - length >= at_least:
                kept.append(f"{type(one).__name__} of {length} has {len(one)} now: {str(list(one)[-2:])[:200]}")
        return kept


def _name(one: object) -> str:
    return f"{type(one).__module__}.{type(one).__qualname__}"


def _containers(objects: list[Any]) -> Iterator[Any]:
    """Those the collector knows, and those of ours it does not, for they hold only strings and numbers."""
    ours = [one for one in objects if _name(one).startswith(OURS)]
    modules = [vars(module) for name, module in list(sys.modules.items()) if name.startswith(OURS)]
    for one in (*objects, *gc.get_referents(*ours, *modules)):
        if type(one) in CONTAINERS and not _is_timers(one):
            yield one


def _is_timers(one: Any) -> bool:
    """An event loop's own list: it lets cancelled timers go a hundred at a time."""
    return type(one) is list and bool(one) and isinstance(one[0], asyncio.TimerHandle)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / NAME)


async def ask(service: Stack, number: int) -> None:
    """A request like no other: its prompt, its id and its key are new each time."""
    body: dict[str, Any] = {"prompt": [3 + secrets.randbelow(VOCAB - 8) for _ in range(24)], "max_tokens": 3}
    body |= ({}, {"stream": True}, {"n": 2, "logprobs": 2}, {"stop": ["w300"], "stream": True})[number % 4]
    headers = {"Idempotency-Key": secrets.token_hex(8)} if number % 3 == 0 else {}
    status, text = await service.post("/v1/completions", body, headers=headers)
    assert status == 200, text


async def leave(service: Stack) -> None:
    """A client that goes after the first bytes of a long answer."""
    body = {"prompt": [5, 6, 7], "max_tokens": 200, "stream": True, "ignore_eos": True}
    async with service.session.post(f"{service.url}/v1/completions", json=body) as response:
        await response.content.readany()
        response.close()


async def a_round(service: Stack) -> None:
    for first in range(0, ROUND, AT_ONCE):
        await asyncio.gather(*(ask(service, first + at) for at in range(AT_ONCE)))
    await asyncio.gather(*(leave(service) for _ in range(AT_ONCE)))
    await service.bench.nothing_leaks()
    async with asyncio.timeout(20):
        while len(service.gateway.streams):  # type: ignore[arg-type]
            await asyncio.sleep(0.01)


async def warm(service: Stack) -> None:
    """What is filled once: every token's text, the prefix cache, pools of connections."""
    for token in range(VOCAB):
        service.gateway.text.codec.token_bytes(token)
    await a_round(service)


async def test_a_request_leaves_nothing_behind_and_what_does_is_noticed(
    redis_url: str, deployment: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_MAX_REMEMBERED", REMEMBERED_HAND_OFFS)
    engine, speculation = {"kv_cache_tokens": FEWER_BLOCKS_THAN_REQUESTS}, {"proposers": "none"}  # its store stays
    async with stack(redis_url, deployment, model, engine=engine, speculation=speculation) as service:
        await warm(service)
        before = Holdings()
        await a_round(service)
        assert before.grown(ROUND) == []

        monkeypatch.setattr(exporter, "_MAX_REMEMBERED", 100 * ROUND)
        before = Holdings()
        await a_round(service)
        assert any(line.startswith("OrderedDict of") for line in before.grown(ROUND // 2)), "a leak goes unnoticed"


def test_objects_and_entries_that_stay_are_noticed() -> None:
    counters = Counters()
    known: set[str] = set()
    kept: list[Usage] = []
    before = Holdings()
    assert before.grown(ROUND) == []
    for number in range(ROUND):
        counters.recomputed[f"reason {number}"] = number
        known.add(f"request {number}")
        kept.append(Usage(prefill_worker=f"worker {number}"))
    assert sorted(line.split(" of ")[0] for line in before.grown(ROUND)) == [
        *("dict", "list", "set", f"shared.protocol.messages.Usage: {ROUND}")
    ]
