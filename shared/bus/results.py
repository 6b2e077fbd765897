"""What the scripts of `RequestStore` take and answer.

A worker that gets `Stale`, `Refused`, `Ended` or `Cancelled` drops the sequence and frees its
blocks: somebody else owns the request now, or nobody needs to any more. Nothing else is asked of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.protocol.messages import Job, JournalEntry, Tokens, Usage


@dataclass(frozen=True, slots=True)
class Lease:
    """Proof of ownership: `owner` is `<worker>:<nonce of this begin>`, `entry` the work entry."""

    request_id: str
    epoch: int
    owner: str
    stream: str
    entry: str

    @property
    def nonce(self) -> str:
        return self.owner.rpartition(":")[2]


@dataclass(frozen=True, slots=True)
class Submitted:
    """The request is queued as this work entry ("" when the snapshot was complete and it ended at once)."""

    entry: str


@dataclass(frozen=True, slots=True)
class Conflict:
    """The request id is taken, by a request of `gateway` in `state`."""

    state: str
    gateway: str


@dataclass(frozen=True, slots=True)
class Begun:
    """This worker owns the request's prefill. `remaining_ms` None: no deadline. `deaths` ≥ 1: a suspect."""

    lease: Lease
    job: Job
    entries: tuple[JournalEntry, ...]
    remaining_ms: int | None
    deaths: int

    @property
    def epoch(self) -> int:
        return self.lease.epoch


@dataclass(frozen=True, slots=True)
class Stale:
    """The entry stands for nothing here: already handled, or owned by another. Forget it."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The request reached its terminal entry (cancel, deadline, or everything was there)."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A hand-off to pull. No ownership yet: that is `commit`. `nonce` names the prefill's begin."""

    request_id: str
    stream: str
    entry: str
    job: Job
    epoch: int
    nonce: str
    address: bytes
    entries: tuple[JournalEntry, ...]
    remaining_ms: int | None
    deaths: int


@dataclass(frozen=True, slots=True)
class Touched:
    """`owner` False: release everything. `offer_live` False: offer again. `cancel`: it just ended.

    `gateway` holds the request now; it is another than the one that submitted it after an adoption.
    """

    owner: bool
    cancel: bool = False
    offer_live: bool = False
    remaining_ms: int | None = None
    gateway: str = ""


@dataclass(frozen=True, slots=True)
class Append:
    """One choice's new tokens under a lease; `usage`, when given, replaces what is stored."""

    lease: Lease
    tokens: Tokens
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Appended:
    """The tokens are journaled. `done`: this was the last choice, the request has ended."""

    done: bool = False


@dataclass(frozen=True, slots=True)
class Behind:
    """Redis holds `n` tokens of hash `h`: send again from there if that is your own prefix, else drop."""

    n: int
    h: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """Not the owner, or the request is gone or done."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The request was ended by cancel or deadline; with `choice_only` just this choice (stop string)."""

    choice_only: bool = False


@dataclass(frozen=True, slots=True)
class Committed:
    """The decode worker owns the request now."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Polled:
    """State of a request and the journal entries asked for.

    `gateway` holds the request now; `held_elsewhere`: another gateway than the caller is alive and holds it, or, after
    an adoption, held it until then.
    """

    state: str
    epoch: int
    gateway: str
    entries: tuple[JournalEntry, ...]
    held_elsewhere: bool = False


AppendResult = Appended | Behind | Refused | Cancelled
CommitResult = Committed | Behind | Refused | Ended

SWEPT_STALE = "stale"
SWEPT_OFFERED = "offered"
SWEPT_REQUEUED = "requeued"
SWEPT_ENDED = "ended"
SWEPT_DEAD = "dead"

CANCEL_GONE = "gone"
CANCEL_DONE = "done"
CANCEL_ENDED = "ended"
CANCEL_PENDING = "pending"
CANCEL_NOT_YOURS = "not_yours"
