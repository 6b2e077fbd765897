"""Settings: where they come from, what is refused, and that errors name the variable."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from shared.config import (
    EngineSettings,
    Settings,
    load_settings,
    setting_paths,
    unknown_variables,
    variable_name,
)
from shared.errors import ConfigurationError


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables of the machine, and a working folder without `.env`."""
    for path in [*setting_paths(), *((name,) for name in Settings.model_fields)]:
        monkeypatch.delenv(variable_name(path), raising=False)
    monkeypatch.chdir(tmp_path)


def test_defaults_stand_alone() -> None:
    settings = load_settings()
    assert (settings.deployment, settings.model, settings.redis.url) == ("default", "smollm2", "")
    assert (settings.engine.max_num_seqs, settings.engine.max_num_batched_tokens) == (32, 512)
    assert settings.transfer.transports == ("shm", "tcp")
    assert settings.key_values == ()


def test_flags_win_over_the_environment_and_that_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "SLIPSTREAM_MODEL=file\nSLIPSTREAM_ENGINE__BLOCK_SIZE=32\nSLIPSTREAM_ENGINE__MAX_NUM_SEQS=3\n"
    )
    monkeypatch.setenv("SLIPSTREAM_MODEL", "env")
    monkeypatch.setenv("SLIPSTREAM_ENGINE__MAX_NUM_SEQS", "4")
    settings = load_settings(engine={"max_num_seqs": 5})
    assert (settings.model, settings.engine.block_size, settings.engine.max_num_seqs) == ("env", 32, 5)


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_API_KEYS", "one, two,,")
    monkeypatch.setenv("SLIPSTREAM_TRANSFER__TRANSPORTS", "tcp")
    settings = load_settings()
    assert settings.key_values == ("one", "two")
    assert settings.transfer.transports == ("tcp",)


@pytest.mark.parametrize(
    ("overrides", "variable"),
    [
        ({"deployment": "a b"}, "SLIPSTREAM_DEPLOYMENT"),
        ({"redis": {"url": "http://x"}}, "SLIPSTREAM_REDIS__URL"),
        ({"redis": {"heartbeat_s": 2, "heartbeat_ttl_s": 3}}, "SLIPSTREAM_REDIS"),
        ({"engine": {"block_size": 24}}, "SLIPSTREAM_ENGINE__BLOCK_SIZE"),
        ({"engine": {"max_num_seqs": 0}}, "SLIPSTREAM_ENGINE__MAX_NUM_SEQS"),
        ({"engine": {"device": "tpu"}}, "SLIPSTREAM_ENGINE__DEVICE"),
        ({"engine": {"dtype": "int3"}}, "SLIPSTREAM_ENGINE__DTYPE"),
        ({"engine": {"max_num_sequences": 4}}, "SLIPSTREAM_ENGINE__MAX_NUM_SEQUENCES"),
        ({"gateway": {"port": 70000}}, "SLIPSTREAM_GATEWAY__PORT"),
        ({"gateway": {"ping_s": float("inf")}}, "SLIPSTREAM_GATEWAY__PING_S"),
        ({"transfer": {"transports": ""}}, "SLIPSTREAM_TRANSFER__TRANSPORTS"),
        ({"transfer": {"allowed_networks": ""}}, "SLIPSTREAM_TRANSFER__ALLOWED_NETWORKS"),
        ({"transfer": {"allowed_networks": "10.0.0.0/8,here"}}, "SLIPSTREAM_TRANSFER__ALLOWED_NETWORKS"),
        ({"transfer": {"allowed_networks": "10.0.0.1/8"}}, "SLIPSTREAM_TRANSFER__ALLOWED_NETWORKS"),
        ({"transfer": {"max_connections": 0}}, "SLIPSTREAM_TRANSFER__MAX_CONNECTIONS"),
        ({"log_level": "loud"}, "SLIPSTREAM_LOG_LEVEL"),
    ],
)
def test_a_bad_value_names_its_variable(overrides: dict[str, Any], variable: str) -> None:
    with pytest.raises(ConfigurationError, match=variable):
        load_settings(**overrides)


def test_a_section_that_is_no_json_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_ENGINE", "fast")
    with pytest.raises(ConfigurationError, match="engine"):
        load_settings()


def test_secrets_do_not_show() -> None:
    settings = load_settings(api_keys="sk-secret", cluster_secret="hunter2")
    assert "sk-secret" not in repr(settings)
    assert "hunter2" not in repr(settings)
    with pytest.raises(ConfigurationError) as caught:
        load_settings(cluster_secret=["hunter2"])
    assert "hunter2" not in str(caught.value)


def test_settings_are_frozen() -> None:
    settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.model = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        settings.engine.block_size = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "compute", "cache"),
    [
        ({}, "float32", "float32"),
        ({"device": "cuda"}, "bfloat16", "bfloat16"),
        ({"device": "cuda:1", "dtype": "float16"}, "float16", "float16"),
        ({"kv_cache_dtype": "bfloat16"}, "float32", "bfloat16"),
    ],
)
def test_auto_dtypes_follow_the_device(fields: dict[str, Any], compute: str, cache: str) -> None:
    engine = EngineSettings(**fields)
    assert (engine.compute_dtype, engine.cache_dtype) == (compute, cache)


def test_misspelt_variables_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_ENGINE__BLOCKSIZE", "16")
    monkeypatch.setenv("SLIPSTREAM_ENGINE__BLOCK_SIZE", "16")
    assert "SLIPSTREAM_ENGINE__BLOCKSIZE" in unknown_variables()
    assert "SLIPSTREAM_ENGINE__BLOCK_SIZE" not in unknown_variables()


def test_every_setting_has_a_path() -> None:
    paths = setting_paths()
    assert ("engine", "block_size") in paths
    assert ("api_keys",) in paths
    assert len(paths) == len(set(paths))
    assert ("engine",) not in paths


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "172.31.0.1", "192.168.1.1", "100.64.0.1", "::1", "fd00::1"]
)
def test_private_addresses_are_allowed_for_kv_by_default(address: str) -> None:
    assert any(ip_address(address) in ip_network(network) for network in load_settings().transfer.allowed_networks)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "172.32.0.1", "192.169.0.1", "0.0.0.0", "224.0.0.1", "2001:db8::1", "::"]
)
def test_public_addresses_are_not(address: str) -> None:
    assert not any(ip_address(address) in ip_network(network) for network in load_settings().transfer.allowed_networks)
