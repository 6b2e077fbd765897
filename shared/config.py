"""Every setting of every process: read once from flags, environment and `.env`, then frozen.

A setting `engine.block_size` is the variable `SLIPSTREAM_ENGINE__BLOCK_SIZE`. Flags win over the
environment, the environment over `.env`, that over the defaults below. Services receive the narrow
part they need (`EngineSettings`, `TransferSettings`, ...), never the whole.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.errors import ConfigurationError
from shared.faultpoints import VARIABLE as FAULT_POINTS
from shared.faultpoints import refuse_with_keys

ENV_PREFIX = "SLIPSTREAM_"
ENV_NESTED = "__"
_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

PRIVATE_NETWORKS = (
    *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16"),
    *("::1/128", "fc00::/7", "fe80::/10"),
)
"""Loopback, private, shared (RFC 6598) and link-local addresses: nothing that is routed on the internet."""

Dtype = Literal["float32", "bfloat16", "float16"]
CacheDtype = Literal["float32", "bfloat16", "float16", "int8"]


class _Section(BaseModel):
    """One group of settings; frozen, and a misspelt name is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RedisSettings(_Section):
    """Where the bus is and how patient its clients are. An empty `url` means the embedded server."""

    url: str = ""
    command_timeout_s: float = Field(default=5.0, gt=0, le=60)
    heartbeat_s: float = Field(default=1.0, gt=0, le=30)
    heartbeat_ttl_s: float = Field(default=3.0, gt=0, le=120)
    orphan_grace_s: float = Field(default=10.0, gt=0, le=3600)

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        if url and not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must begin with redis://, rediss:// or unix://, or be empty for the embedded server")
        return url

    @model_validator(mode="after")
    def _two_beats_fit(self) -> RedisSettings:
        if self.heartbeat_ttl_s < 2 * self.heartbeat_s:
            raise ValueError("heartbeat_ttl_s must be at least twice heartbeat_s, or one late beat loses the worker")
        return self


class EngineSettings(_Section):
    """What one worker computes with. `kv_cache_tokens` wins over `kv_cache_memory` (bytes) when both are set."""

    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d{1,2})?)$")
    kernels: Literal["auto", "native", "torch"] = "auto"
    quantization: Literal["int8", "int4"] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_dtype: Literal["auto"] | CacheDtype = "auto"
    block_size: int = Field(default=16, ge=1, le=128)
    kv_cache_tokens: int | None = Field(default=None, ge=64)
    kv_cache_memory: int | None = Field(default=None, ge=1 << 20)
    max_num_seqs: int = Field(default=32, ge=1, le=1024)
    max_num_batched_tokens: int = Field(default=512, ge=16, le=1 << 20)
    max_model_len: int | None = Field(default=None, ge=16, le=1 << 22)
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    batch_invariant: bool = True
    threads: int | None = Field(default=None, ge=1, le=1024)
    hang_timeout_s: float = Field(default=60.0, gt=0, le=86400)

    @field_validator("block_size")
    @classmethod
    def _divides_split(cls, block_size: int) -> int:
        if 128 % block_size:
            raise ValueError("must divide 128, the attention split: use 1, 2, 4, 8, 16, 32, 64 or 128")
        return block_size

    @property
    def compute_dtype(self) -> Dtype:
        """`dtype` with auto resolved: float32 on CPU, bfloat16 on CUDA."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def cache_dtype(self) -> CacheDtype:
        """`kv_cache_dtype` with auto resolved to the compute dtype."""
        return self.compute_dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype


class SpeculationSettings(_Section):
    """Who guesses tokens ahead in decode workers, in the order they are asked; `none` for nobody.

    `draft` is a folder, `none`, or `auto` for the draft that is shipped for the model.
    """

    proposers: Annotated[tuple[str, ...], NoDecode] = ("suffix", "draft", "heads")
    draft: str = "auto"
    max_draft_tokens: int = Field(default=8, ge=1, le=128)

    @field_validator("proposers", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _split_commas(value)

    @field_validator("proposers")
    @classmethod
    def _none_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "none" in value and len(value) > 1:
            raise ValueError("none cannot be combined with other proposers")
        if len(set(value)) < len(value):
            raise ValueError("must not name a proposer twice")
        return () if value == ("none",) else value


class TransferSettings(_Section):
    """KV hand-off: transports in order of preference, where to listen and to connect, and its two deadlines."""

    transports: Annotated[tuple[str, ...], NoDecode] = ("shm", "tcp")
    host: str = "127.0.0.1"
    advertise_host: str = ""
    port: int = Field(default=0, ge=0, le=65535)
    advertise_port: int = Field(default=0, ge=0, le=65535)
    lease_s: float = Field(default=30.0, gt=0, le=3600)
    progress_timeout_s: float = Field(default=5.0, gt=0, le=600)
    max_connections: int = Field(default=128, ge=1, le=10_000)
    allowed_networks: Annotated[tuple[str, ...], NoDecode] = PRIVATE_NETWORKS

    @field_validator("transports", "allowed_networks", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _split_commas(value)

    @field_validator("transports")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one transport, for example shm,tcp")
        return value

    @field_validator("allowed_networks")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one network, for example 10.0.0.0/8; 0.0.0.0/0,::/0 allows all")
        for network in value:
            ipaddress.ip_network(network)
        return value


class GatewaySettings(_Section):
    """The HTTP edge: where it listens and every limit it puts on clients."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_body_bytes: int = Field(default=16 << 20, ge=1 << 10, le=1 << 30)
    max_bodies_bytes: int = Field(default=256 << 20, ge=1 << 10, le=1 << 40)
    max_in_flight: int = Field(default=256, ge=1, le=100_000)
    max_in_flight_per_key: int = Field(default=512, ge=1, le=100_000)
    max_queued: int = Field(default=1024, ge=1, le=1_000_000)
    max_queued_per_key: int = Field(default=256, ge=1, le=1_000_000)
    max_connections: int = Field(default=4096, ge=1, le=1_000_000)
    max_websockets: int = Field(default=100, ge=0, le=100_000)
    max_websockets_per_key: int = Field(default=50, ge=0, le=100_000)
    max_prompts: int = Field(default=64, ge=1, le=1024)
    max_messages: int = Field(default=4096, ge=1, le=65536)
    header_timeout_s: float = Field(default=10.0, gt=0, le=3600)
    body_timeout_s: float = Field(default=60.0, gt=0, le=3600)
    keepalive_timeout_s: float = Field(default=60.0, gt=0, le=3600)
    request_timeout_s: float = Field(default=600.0, gt=0, le=86400)
    stall_timeout_s: float = Field(default=30.0, gt=0, le=3600)
    resume_ttl_s: float = Field(default=120.0, gt=0, le=86400)
    resume_grace_s: float = Field(default=10.0, gt=0, le=3600)
    ping_s: float = Field(default=15.0, gt=0, le=600)
    text_threads: int = Field(default=2, ge=1, le=128)
    text_timeout_s: float = Field(default=10.0, gt=0, le=600)
    generation_defaults: bool = True


class Settings(BaseSettings):
    """All settings of one process; build it with `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_NESTED,
        env_file=".env",
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    deployment: str = Field(default="default", pattern=_NAME_PATTERN)
    model: str = "smollm2"
    served_model_name: str = Field(default="", max_length=256)
    chat_template: str = ""
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    api_keys_file: str = ""
    cluster_secret: SecretStr = SecretStr("")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"
    drain_timeout_s: float = Field(default=30.0, gt=0, le=3600)
    redis: RedisSettings = RedisSettings()
    engine: EngineSettings = EngineSettings()
    speculation: SpeculationSettings = SpeculationSettings()
    transfer: TransferSettings = TransferSettings()
    gateway: GatewaySettings = GatewaySettings()

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _split_commas(value)

    @property
    def key_values(self) -> tuple[str, ...]:
        """The API keys in clear; empty means that no key is asked for."""
        return tuple(key.get_secret_value() for key in self.api_keys)

    @property
    def asks_for_keys(self) -> bool:
        """Whether the gateway lets in only who has a key."""
        return bool(self.api_keys or self.api_keys_file)


def load_settings(**overrides: Any) -> Settings:
    """Read all settings; `overrides` (nested dicts, from flags) win over the environment.

    Raises ConfigurationError naming the variable, never echoing a secret's value.
    """
    try:
        settings = Settings(**overrides)
    except ValidationError as exc:
        problems = "; ".join(
            f"{variable_name([str(part) for part in error['loc']])}: {error['msg']}" for error in exc.errors()
        )
        raise ConfigurationError(f"bad setting: {problems}") from None
    except ValueError as exc:  # pydantic-settings' SettingsError: JSON expected for a whole section
        raise ConfigurationError(f"bad setting: {exc}") from None
    refuse_with_keys(bool(settings.api_keys or settings.api_keys_file))
    return settings


def variable_name(path: Sequence[str]) -> str:
    """The environment variable of a setting, `["engine", "block_size"]` → `SLIPSTREAM_ENGINE__BLOCK_SIZE`."""
    return ENV_PREFIX + ENV_NESTED.join(path).upper()


def setting_paths(model: type[BaseModel] = Settings, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every setting as a path of names, in the order declared; the docs and the CLI are checked against it."""
    paths: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, _Section):
            paths += setting_paths(annotation, (*prefix, name))
        else:
            paths.append((*prefix, name))
    return paths


def unknown_variables() -> list[str]:
    """Names of the SLIPSTREAM_ variables in the environment that no setting has: most likely misspelt."""
    known = {variable_name(path) for path in setting_paths()} | {
        variable_name([name]) for name in Settings.model_fields
    }
    known.add(FAULT_POINTS)
    return sorted(name for name in os.environ if name.upper().startswith(ENV_PREFIX) and name.upper() not in known)


def _split_commas(value: object) -> object:
    """`"a, b"` → `("a", "b")`; anything but a string is left to the field's own check."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value
