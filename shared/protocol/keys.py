"""Names of every Redis key and channel of one deployment.

All keys of a shard carry one hash tag, so that a script may touch any of them on a cluster too.
Names that come from outside are checked here: a brace or a blank in one would move the key to
another slot or let one deployment reach into another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GROUP = "workers"
"""The one consumer group of every work stream; `scripts/common.lua` has the same word."""

ROLES = ("prefill", "decode")

_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_MODEL = re.compile(r"[^\s{}\x00-\x1f\x7f]{1,256}")


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names under `{slipstream:<deployment>:<shard>}:`."""

    deployment: str
    shard: int = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.deployment):
            raise ValueError(f"deployment {self.deployment!r} must be 1-128 letters, digits or any of '._:-'")
        if self.shard < 0:
            raise ValueError(f"shard must not be negative, it is {self.shard}")

    @property
    def prefix(self) -> str:
        return f"{{slipstream:{self.deployment}:{self.shard}}}:"

    def work(self, role: str, model: str) -> str:
        """Work stream of a role ("prefill" | "decode") and model."""
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, it is {role!r}")
        if not _MODEL.fullmatch(model):
            raise ValueError(f"model name {model!r} must be 1-256 characters without blanks and braces")
        return f"{self.prefix}work:{role}:{model}"

    def express_work(self, role: str, model: str) -> str:
        """Stream that every worker of the role reads before the model's."""
        return self.work(role, f"{model}#express")

    def probe_work(self, role: str, model: str) -> str:
        """Stream that only workers in self-test read, so that users' requests never land on them."""
        return self.work(role, f"{model}#probe")

    def private_work(self, role: str, model: str, worker_id: str) -> str:
        """Stream that one worker alone reads; expires with its heartbeat (`WorkQueue.refresh_private`)."""
        return self.work(role, f"{model}@{_checked(worker_id)}")

    def is_private(self, stream: str, model: str) -> bool:
        """Whether this work stream of a model is one worker's own."""
        return any(stream.startswith(self.work(role, f"{model}@")) for role in ROLES)

    def request(self, request_id: str) -> str:
        return f"{self.prefix}req:{_checked(request_id)}"

    def log(self, request_id: str) -> str:
        """The journal of a request."""
        return f"{self.prefix}log:{_checked(request_id)}"

    def response(self, response_id: str) -> str:
        """What another gateway needs to continue the text of an answer."""
        return f"{self.prefix}resp:{_checked(response_id)}"

    def idempotency(self, digest: str) -> str:
        """The answer that an idempotency key of a client stands for; `digest` names key and client."""
        return f"{self.prefix}idem:{_checked(digest)}"

    def tokens(self, gateway_id: str) -> str:
        """Pub/sub channel of one gateway."""
        return f"{self.prefix}tokens:{_checked(gateway_id)}"

    def gateway(self, gateway_id: str) -> str:
        return f"{self.prefix}gw:{_checked(gateway_id)}"

    def worker(self, worker_id: str) -> str:
        return f"{self.prefix}worker:{_checked(worker_id)}"

    def drain(self, process_id: str) -> str:
        """There while the worker or gateway of that id is told to drain."""
        return f"{self.prefix}drain:{_checked(process_id)}"

    @property
    def workers(self) -> str:
        """Set of worker ids that ever sent a beat and were not yet forgotten."""
        return f"{self.prefix}workers"

    @property
    def gateways(self) -> str:
        """Set of gateway ids that ever sent a beat and were not yet forgotten."""
        return f"{self.prefix}gateways"

    @property
    def dead(self) -> str:
        """Bounded stream of poison requests."""
        return f"{self.prefix}work:dead"


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"id {name[:160]!r} must be 1-128 letters, digits or any of '._:-'")
    return name
