"""What one bench run does; the command line fills it in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shared.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """One run against one server.

    `model` empty: the first of /v1/models. `rate` 0: closed loop, `concurrency` requests are always
    in flight. `rate` > 0: requests start at the times of a Poisson process with that many a second,
    however many are still in flight. `prompt_len` and `output_len` are in tokens. `redis_url` and
    `pids` say where to measure the cost; without pids, Slipstream's processes on this machine are
    looked for. `extra` is merged into every request body.
    """

    base_url: str = "http://127.0.0.1:8000"
    model: str = ""
    api_key: str = ""
    concurrency: int = 1
    rate: float = 0.0
    requests: int = 16
    warmup: int = 1
    prompt_len: int = 64
    output_len: int = 128
    temperature: float = 0.0
    seed: int = 0
    timeout_s: float = 600.0
    redis_url: str = ""
    pids: tuple[int, ...] = ()
    label: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least_one = {
            "--concurrency": self.concurrency,
            "--requests": self.requests,
            "--prompt-len": self.prompt_len,
            "--output-len": self.output_len,
        }
        for flag, value in at_least_one.items():
            if value < 1:
                raise ConfigurationError(f"{flag} is {value}: give at least 1")
        not_negative = {"--rate": self.rate, "--warmup": self.warmup, "--temperature": self.temperature}
        for flag, number in not_negative.items():
            if number < 0:
                raise ConfigurationError(f"{flag} is {number}: give 0 or more")
        if self.timeout_s <= 0:
            raise ConfigurationError(f"--timeout is {self.timeout_s}: give a number of seconds above 0")
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigurationError(f"--base-url is {self.base_url!r}: it must begin with http:// or https://")

    def url(self, path: str) -> str:
        """`path` on the server, whether or not `base_url` ends in a slash or in /v1."""
        return self.base_url.rstrip("/").removesuffix("/v1") + path

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
