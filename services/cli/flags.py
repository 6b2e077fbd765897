"""Command-line flags, named as vLLM's where it has them; each is also a setting and an environment variable."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from shared.config import variable_name


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag and the setting it sets; None on the command line leaves the setting alone."""

    name: str
    path: tuple[str, ...]
    kind: type
    help: str

    @property
    def parameter(self) -> str:
        return self.name.lstrip("-").replace("-", "_")


COMMON = (
    Flag("--redis-url", ("redis", "url"), str, "Redis ≥ 7 or Valkey ≥ 8; the embedded server when empty."),
    Flag("--deployment", ("deployment",), str, "Name that keeps deployments on one Redis apart."),
    Flag("--log-level", ("log_level",), str, "debug, info, warning or error."),
)
MODEL = (
    Flag("--model", ("model",), str, "A Hugging Face folder, a GGUF file, or smollm2."),
    Flag("--served-model-name", ("served_model_name",), str, "Name of the model in the API."),
)
GATEWAY = (
    Flag("--host", ("gateway", "host"), str, "Address the HTTP server listens on."),
    Flag("--port", ("gateway", "port"), int, "Port of the HTTP server."),
    Flag("--api-key", ("api_keys",), str, "Key clients must send; several, separated by commas."),
    Flag("--chat-template", ("chat_template",), str, "A Jinja file to use instead of the model's template."),
    Flag("--max-in-flight", ("gateway", "max_in_flight"), int, "Requests served at once."),
    Flag("--max-queued", ("gateway", "max_queued"), int, "Requests that may wait for a place."),
)
MAX_MODEL_LEN = Flag("--max-model-len", ("engine", "max_model_len"), int, "Longest prompt plus output, in tokens.")
DEVICE = Flag("--device", ("engine", "device"), str, "cpu or cuda.")
KERNELS = Flag("--kernels", ("engine", "kernels"), str, "auto, native or torch.")
THREADS = Flag("--threads", ("engine", "threads"), int, "Compute threads of a worker.")
ENGINE = (
    DEVICE,
    KERNELS,
    Flag("--quantization", ("engine", "quantization"), str, "int8 or int4: quantise float weights while loading."),
    Flag("--dtype", ("engine", "dtype"), str, "auto, float32, bfloat16 or float16."),
    Flag("--kv-cache-dtype", ("engine", "kv_cache_dtype"), str, "auto, float32, bfloat16, float16 or int8."),
    MAX_MODEL_LEN,
    Flag("--max-num-seqs", ("engine", "max_num_seqs"), int, "Sequences a worker runs at once."),
    Flag("--max-num-batched-tokens", ("engine", "max_num_batched_tokens"), int, "Tokens a step may compute."),
    Flag("--block-size", ("engine", "block_size"), int, "Tokens in a KV block; divides 128."),
    Flag("--kv-cache-tokens", ("engine", "kv_cache_tokens"), int, "KV room of a worker, in tokens."),
    Flag("--kv-cache-memory", ("engine", "kv_cache_memory"), int, "KV room of a worker, in bytes."),
    Flag("--enable-prefix-caching", ("engine", "enable_prefix_caching"), bool, "Reuse the KV of shared prefixes."),
    Flag("--enable-chunked-prefill", ("engine", "enable_chunked_prefill"), bool, "Split long prompts over steps."),
    Flag("--batch-invariant", ("engine", "batch_invariant"), bool, "Same tokens in any batch and chunking."),
    THREADS,
)
SPECULATION = (
    Flag(
        "--speculation", ("speculation", "proposers"), str, "Who guesses tokens ahead: suffix, draft, heads, or none."
    ),
    Flag(
        "--draft", ("speculation", "draft"), str, "Folder of a draft as `slipstream distill` writes it, auto, or none."
    ),
    Flag("--max-draft-tokens", ("speculation", "max_draft_tokens"), int, "Guesses for a sequence and step at most."),
)
TRANSFER = (
    Flag("--transports", ("transfer", "transports"), str, "KV transports by preference: shm,tcp."),
    Flag("--kv-host", ("transfer", "host"), str, "Address the KV exporter listens on."),
    Flag("--kv-port", ("transfer", "port"), int, "Port of the KV exporter; 0 takes a free one."),
)
COMPUTE = (COMMON[2], DEVICE, KERNELS, THREADS)
WORKER = (*COMMON, *MODEL, *ENGINE, *SPECULATION, *TRANSFER)
ALL = (*COMMON, *MODEL[1:], *GATEWAY, *ENGINE, *SPECULATION, *TRANSFER)


def with_flags(*flags: Flag) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options; the command gets the set ones as `overrides`, nested like the settings."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "overrides"]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            chosen = {flag.path: values.pop(flag.parameter) for flag in flags}
            command(**values, overrides=nested({path: value for path, value in chosen.items() if value is not None}))

        parameters = [*own, *(_parameter(flag) for flag in flags)]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del wrapper.__wrapped__  # typer would read the undecorated signature through it
        return wrapper

    return decorate


def nested(chosen: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """{("engine", "threads"): 2} becomes {"engine": {"threads": 2}}."""
    tree: dict[str, Any] = {}
    for path, value in chosen.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = value
    return tree


def environment(overrides: dict[str, Any], prefix: tuple[str, ...] = ()) -> dict[str, str]:
    """The same overrides as environment variables, for child processes."""
    variables: dict[str, str] = {}
    for name, value in overrides.items():
        if isinstance(value, dict):
            variables |= environment(value, (*prefix, name))
        else:
            variables[variable_name([*prefix, name])] = str(value)
    return variables


def _parameter(flag: Flag) -> inspect.Parameter:
    name = f"{flag.name}/--no-{flag.name.removeprefix('--')}" if flag.kind is bool else flag.name
    option = typer.Option(None, name, help=f"{flag.help} [{variable_name(flag.path)}]", show_default=False)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(flag.parameter, kind, default=option, annotation=flag.kind | None)
