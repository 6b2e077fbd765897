"""The users that docker-compose.yml gives Redis: all that the services do is allowed, and little else."""

from __future__ import annotations

import ast
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from shared.bus.connection import check, connect
from shared.bus.deadletters import clear_dead_letters, dead_letters
from shared.bus.draining import DrainOrders
from shared.bus.registry import Registry
from shared.errors import ConfigurationError
from shared.protocol.keys import Keys
from tests.compose import FILE, RedisService, services
from tests.stack import stack, text_of_stream
from tests.tiny_model import write_tiny_model

ROOT = FILE.parent
DEPLOYMENT = "acl"
PASSWORDS = {
    "REDIS_GATEWAY_PASSWORD": "of-the-gateway",
    "REDIS_WORKER_PASSWORD": "of-the-workers",
    "REDIS_OPERATOR_PASSWORD": "of-the-operator",
}
ROLES = ("gateway", "prefill", "decode", "operator")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisService]:
    service = RedisService(tmp_path_factory.mktemp("acl"), {**PASSWORDS, "SLIPSTREAM_DEPLOYMENT": DEPLOYMENT})
    with service.running():
        yield service


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


async def say(client: Redis, *command: str) -> Any:
    return await client.execute_command(*command)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def nothing_denied(server: RedisService) -> AsyncIterator[None]:
    """Fails with what a user was refused within the block."""
    async with connect(server.root_url) as root:
        await say(root, "ACL", "LOG", "RESET")
        yield
        denied = [
            dict(zip(entry[::2], entry[1::2], strict=True)) if isinstance(entry, list) else entry
            for entry in await say(root, "ACL", "LOG")
        ]
        assert not [(entry[b"username"], entry[b"reason"], entry[b"object"]) for entry in denied]


async def test_the_whole_service_runs_under_these_users(server: RedisService, model: Path) -> None:
    """Self-tests, hand-offs, streams, stop strings, cancels and sweeps: not one command was refused."""
    async with (
        nothing_denied(server),
        stack(server.url("prefill"), DEPLOYMENT, model, gateway_redis_url=server.url("gateway"), decode=2) as made,
    ):
        body = {"model": "tiny", "prompt": "once upon a time", "max_tokens": 12, "seed": 3}
        status, plain = await made.post("/v1/completions", body)
        assert status == 200, plain
        status, events = await made.post("/v1/completions", {**body, "stream": True, "n": 2})
        assert status == 200
        assert events.rstrip().endswith("data: [DONE]")
        first = text_of_stream(events)[:3]
        assert (await made.post("/v1/completions", {**body, "stop": [first or "x"]}))[0] == 200
        await made.bench.decode[0].hand_back()
        job = await made.bench.submit([5, 6, 7], max_tokens=400, min_tokens=400)
        assert await made.bench.store.cancel(job.request_id, "client_left", force=True)
        await made.bench.ended(job)
        await made.bench.nothing_leaks()
        async with connect(server.url("operator")) as operator:
            await check(operator)
            assert len(await Registry(operator, Keys(DEPLOYMENT)).live()) == 3
            orders = DrainOrders(operator, Keys(DEPLOYMENT))
            await orders.give("nobody")
            assert await orders.heard("nobody")
            await orders.forget("nobody")
            assert await dead_letters(operator, Keys(DEPLOYMENT)) == []
            assert await clear_dead_letters(operator, Keys(DEPLOYMENT)) == 0


REFUSED: list[tuple[str, ...]] = [
    *(("FLUSHALL",), ("FLUSHDB",), ("CONFIG", "GET", "*"), ("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")),
    *(("KEYS", "*"), ("RESTORE", "{slipstream:acl:0}:x", "0", "x"), ("MODULE", "LIST")),
    *(("EVAL", "return 1", "0"), ("FUNCTION", "LOAD", "#!lua name=x"), ("SCRIPT", "FLUSH"), ("SCRIPT", "KILL")),
    *(("SHUTDOWN",), ("MONITOR",), ("SAVE",), ("BGREWRITEAOF",), ("REPLICAOF", "NO", "ONE"), ("SLOWLOG", "GET")),
    *(("ACL", "SETUSER", "worker", "allcommands"), ("ACL", "LIST"), ("CLIENT", "KILL", "TYPE", "normal")),
    *(("CLIENT", "PAUSE", "1000"), ("MIGRATE", "host", "1", "x", "0", "1"), ("SORT", "{slipstream:acl:0}:x")),
    *(("GET", "other"), ("SET", "other", "1"), ("DEL", "{slipstream:another:0}:workers")),
    *(("XADD", "{slipstream:another:0}:work:prefill:m", "*", "a", "b"), ("PUBLISH", "other", "x")),
    *(("SUBSCRIBE", "{slipstream:another:0}:tokens:gw"), ("PSUBSCRIBE", "*"), ("SUBSCRIBE", "__keyspace@0__:*")),
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("command", REFUSED, ids=" ".join)
async def test_nothing_else_is_allowed(server: RedisService, role: str, command: tuple[str, ...]) -> None:
    async with connect(server.url(role)) as client:
        with pytest.raises(NoPermissionError):
            await say(client, *command)


@pytest.mark.parametrize(
    ("role", "command"),
    [
        ("gateway", ("XREADGROUP", "GROUP", "workers", "me", "STREAMS", "{slipstream:acl:0}:work:prefill:m", ">")),
        ("gateway", ("XGROUP", "CREATE", "{slipstream:acl:0}:work:prefill:m", "mine", "0", "MKSTREAM")),
        ("prefill", ("SUBSCRIBE", "{slipstream:acl:0}:tokens:gw-1")),
        ("operator", ("XREADGROUP", "GROUP", "workers", "me", "STREAMS", "{slipstream:acl:0}:work:prefill:m", ">")),
    ],
)
async def test_roles_differ(server: RedisService, role: str, command: tuple[str, ...]) -> None:
    async with connect(server.url(role)) as client:
        with pytest.raises(NoPermissionError):
            await say(client, *command)


@pytest.mark.parametrize("role", ["gateway", "prefill"])
@pytest.mark.parametrize("call", ["'GET', 'other'", "'FLUSHALL'", "'KEYS', '*'", "'PUBLISH', 'other', 'x'"])
async def test_a_script_has_the_rights_of_its_caller(server: RedisService, role: str, call: str) -> None:
    async with connect(server.url(role)) as client:
        sha = await client.script_load(f"return redis.call({call})")
        with pytest.raises(RedisError, match=r"(?i)permission|ACL"):
            await client.evalsha(sha, 0)


@pytest.mark.parametrize(("user", "password"), [("", ""), ("default", ""), ("gateway", "of-the-workers"), ("x", "y")])
async def test_nobody_else_gets_in(server: RedisService, user: str, password: str) -> None:
    url = server.url_of(user, password).replace("unix://:@", "unix://")
    async with connect(url) as client:
        with pytest.raises((AuthenticationError, RedisError)):
            await client.ping()
        with pytest.raises(ConfigurationError, match="SLIPSTREAM_REDIS__URL"):
            await check(client)


async def test_a_user_that_may_not_ask_for_the_version_is_a_configuration_error(server: RedisService) -> None:
    async with connect(server.root_url) as root:
        await say(root, "ACL", "SETUSER", "poor", "on", ">poor", "-@all", "+ping")
    async with connect(server.url_of("poor", "poor")) as client:
        with pytest.raises(ConfigurationError, match="may not run INFO"):
            await check(client)


# The lists of commands against the code, so that neither falls behind.


def granted(*variables: str) -> set[str]:
    environment = services()["redis"]["environment"]
    words = " ".join(environment[name] for name in variables).split()
    return {word.removeprefix("+") for word in words if word.startswith("+") and not word.startswith("+@")}


def called_by_scripts() -> set[str]:
    text = "".join(path.read_text() for path in (ROOT / "shared/bus/scripts").glob("*.lua"))
    calls = re.findall(r"redis\.p?call\('([A-Z]+)'(?:, '([A-Z]+)')?", text)
    return {_name(first, second) for first, second in calls}


def _name(first: str, second: str) -> str:
    return f"{first}|{second}".lower() if first in ("XGROUP", "XINFO", "SCRIPT") else first.lower()


_METHODS = {
    "delete": "del",
    "xpending_range": "xpending",
    "xinfo_consumers": "xinfo|consumers",
    "xgroup_create": "xgroup|create",
    "script_load": "script|load",
}
_RECEIVER = re.compile(r"(?:^|[._])(client|commands|reader|pipe|pubsub)$")


def called_by_services() -> set[str]:
    """Commands of the Redis clients' methods that the services and the bus call, and those they pack themselves."""
    found = set()
    for folder in ("shared/bus", "shared/worker", "services"):
        for path in (ROOT / folder).rglob("*.py"):
            if "bench" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                method = node.func.attr
                if _RECEIVER.search(ast.unparse(node.func.value)) and _is_command(method):
                    found.add(_METHODS.get(method, method))
                if method == "pack_command":
                    found.add(ast.literal_eval(cast(ast.Tuple, node.args[0]).elts[0]).lower())
    return found


def _is_command(method: str) -> bool:
    own = {"pipeline", "pubsub", "execute", "aclose", "read", "get_message", "parse_response"}
    return (hasattr(Redis, method) or method in ("subscribe", "unsubscribe")) and method not in own


def test_every_command_in_the_code_is_granted() -> None:
    every = granted("DATA_COMMANDS", "GATEWAY_COMMANDS", "WORKER_COMMANDS", "OPERATOR_COMMANDS")
    assert called_by_scripts() - granted("DATA_COMMANDS") == set()
    assert called_by_services() - every == set()


def test_every_granted_command_is_in_the_code() -> None:
    """What a connection says by itself is not in our code; anything else that is granted must be used."""
    by_itself = {"unsubscribe"}
    every = granted("DATA_COMMANDS", "GATEWAY_COMMANDS", "WORKER_COMMANDS", "OPERATOR_COMMANDS")
    assert every - by_itself - called_by_scripts() - called_by_services() == set()


def test_the_lists_are_found_at_all() -> None:
    assert {"xadd", "hset", "publish", "xgroup|delconsumer"} <= called_by_scripts()
    assert {"xreadgroup", "evalsha", "smembers", "subscribe", "info"} <= called_by_services()
