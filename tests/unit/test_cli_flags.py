"""Flags are settings: each names one, and reaches it in this process and in child processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.cli import flags
from services.cli.flags import Flag, environment, nested
from services.cli.main import app
from shared.config import load_settings, setting_paths, variable_name

ALL = list(dict.fromkeys([*flags.ALL, *flags.WORKER]))
COMMANDS = ("serve", "gateway", "prefill", "decode", "chat", "ps", "dlq", "drain", "doctor", "distill", "bench")
SAMPLES: dict[tuple[str, ...], Any] = {
    ("redis", "url"): "redis://somewhere:1/0",
    ("log_level",): "error",
    ("engine", "device"): "cuda",
    ("engine", "kernels"): "torch",
    ("engine", "quantization"): "int8",
    ("engine", "dtype"): "bfloat16",
    ("engine", "kv_cache_dtype"): "float16",
    ("engine", "block_size"): 32,
    ("engine", "kv_cache_memory"): 1 << 21,
    ("transfer", "transports"): "tcp",
    ("api_keys",): "one,two",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables of the machine, no `.env`."""
    for path in setting_paths():
        monkeypatch.delenv(variable_name(path), raising=False)
    monkeypatch.chdir(tmp_path)


def sample(flag: Flag) -> Any:
    """A value other than the default."""
    by_kind: dict[type, Any] = {int: 77, bool: False, str: "something"}
    return SAMPLES.get(flag.path, by_kind[flag.kind])


def at(settings: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        settings = getattr(settings, name)
    return settings


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stderr


@pytest.mark.parametrize("flag", ALL, ids=lambda flag: flag.name)
def test_every_flag_sets_a_setting_here_and_in_child_processes(flag: Flag, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flag.path in setting_paths()
    default = at(load_settings(), flag.path)
    overrides = nested({flag.path: sample(flag)})
    here = at(load_settings(**overrides), flag.path)
    assert here != default
    for name, value in environment(overrides).items():
        assert name == variable_name(flag.path)
        monkeypatch.setenv(name, value)
    assert at(load_settings(), flag.path) == here


def test_no_two_flags_share_a_name_or_a_setting() -> None:
    assert len({flag.name for flag in ALL}) == len({flag.path for flag in ALL}) == len(ALL)
    assert len({flag.parameter for flag in ALL}) == len(ALL)


def test_nested_and_environment_are_two_views_of_the_same_choice() -> None:
    tree = nested({("engine", "threads"): 2, ("engine", "dtype"): "auto", ("model",): "m", ("gateway", "port"): 0})
    assert tree == {"engine": {"threads": 2, "dtype": "auto"}, "model": "m", "gateway": {"port": 0}}
    assert environment(tree) == {
        "SLIPSTREAM_ENGINE__THREADS": "2",
        "SLIPSTREAM_ENGINE__DTYPE": "auto",
        "SLIPSTREAM_MODEL": "m",
        "SLIPSTREAM_GATEWAY__PORT": "0",
    }
    assert nested({}) == environment({}) == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_names_its_flags(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout
    own = {
        "serve": flags.ALL,
        "prefill": flags.WORKER,
        "decode": flags.WORKER,
        "ps": flags.COMMON,
        "distill": flags.COMPUTE,
    }
    for flag in own.get(command, ()):
        assert flag.name in result.stdout


def test_no_command_is_forgotten_here() -> None:
    names = {info.name or getattr(info.callback, "__name__", "") for info in app.registered_commands}
    assert names == set(COMMANDS)


@pytest.mark.parametrize("role", ["gateway", "prefill", "decode"])
def test_one_role_without_redis_is_a_usage_error_in_one_sentence(role: str) -> None:
    status, told = run(role)
    assert status == 2
    assert told == (
        "slipstream: one role alone needs a Redis to meet the others: set --redis-url or SLIPSTREAM_REDIS__URL\n"
    )


@pytest.mark.parametrize(
    ("arguments", "variable"),
    [
        (("prefill", "--block-size", "24"), "SLIPSTREAM_ENGINE__BLOCK_SIZE"),
        (("decode", "--dtype", "int3"), "SLIPSTREAM_ENGINE__DTYPE"),
        (("gateway", "--port", "70000"), "SLIPSTREAM_GATEWAY__PORT"),
        (("serve", "--redis-url", "http://x"), "SLIPSTREAM_REDIS__URL"),
        (("ps", "--deployment", "a b"), "SLIPSTREAM_DEPLOYMENT"),
        (("doctor", "--log-level", "loud"), "SLIPSTREAM_LOG_LEVEL"),
    ],
)
def test_a_bad_setting_is_a_usage_error_naming_the_variable(arguments: tuple[str, ...], variable: str) -> None:
    status, told = run(*arguments)
    assert status == 2
    assert told.startswith("slipstream: bad setting: ")
    assert variable in told
    assert len(told.splitlines()) == 1


def test_a_bad_variable_is_told_like_a_bad_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_ENGINE__MAX_NUM_SEQS", "many")
    status, told = run("decode")
    assert status == 2
    assert "SLIPSTREAM_ENGINE__MAX_NUM_SEQS" in told


def test_a_misspelt_variable_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a section is refused; one that could be another program's is only warned about."""
    monkeypatch.setenv("SLIPSTREAM_MODLE", "tiny")
    assert "SLIPSTREAM_MODLE is not a setting" in run("decode")[1]
    monkeypatch.setenv("SLIPSTREAM_ENGINE__THREDS", "2")
    status, told = run("decode")
    assert status == 2
    assert "SLIPSTREAM_ENGINE__THREDS" in told


def test_an_unknown_flag_is_a_usage_error() -> None:
    status, told = run("prefill", "--no-such-flag")
    assert status == 2
    assert "no-such-flag" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("dlq", "empty"), "dlq knows list and clear"),
        (("drain",), "exactly one of them"),
        (("drain", "p1", "--all"), "exactly one of them"),
        (("drain", "--role", "router"), "prefill, decode, gateway"),
    ],
)
def test_a_wrong_choice_is_a_usage_error(arguments: tuple[str, ...], told: str) -> None:
    status, said = run(*arguments)
    assert status == 2
    assert told in said


@pytest.mark.parametrize("arguments", [("ps",), ("dlq",), ("drain", "--all")])
def test_without_a_cluster_it_says_where_to_look(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, told = run(*arguments)
    assert status == 1
    assert told.startswith("slipstream: no `slipstream serve` of yours runs here as deployment 'default'")
    assert "SLIPSTREAM_REDIS__URL" in told
