"""The messages that cross a process border through Redis, frozen and versioned.

The codec (`shared.protocol.codec`) turns each into msgpack and back, with a bound on every
length. A journal of a request is a sequence of `Marker`, `Tokens` and one `End`;
`shared.protocol.journal` folds it into the state of each choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.protocol.sampling import SamplingParams

PROTOCOL_VERSION = 1

FINISH_STOP = "stop"
FINISH_LENGTH = "length"

OUTCOME_FINISHED = "finished"
OUTCOME_CANCELLED = "cancelled"
OUTCOME_ERROR = "error"

PATH_REMOTE = "remote_prefill"
PATH_RECOMPUTE = "recompute"
PATH_PREFILL_ONLY = "prefill_only"


@dataclass(frozen=True, slots=True)
class Job:
    """A request as the gateway submits it; immutable for its whole life.

    `tenant` salts the prefix cache. `budget_ms` is the total time the request may take from
    submission, measured by Redis TIME, 0 for no limit. `prefill_stream` and `decode_stream`
    are the work streams it travels on: normally the model's, for a worker's self-test its own.
    """

    request_id: str
    model: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    gateway: str
    prefill_stream: str
    decode_stream: str
    adapter: str = ""
    tenant: str = ""
    priority: int = 0
    budget_ms: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token, and the best alternatives as (token id, log-prob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of one choice: it had `base` tokens with chain hash `h_base`, now it ends in `h`.

    `logprobs` is empty or one entry per token. `finish` ends the choice ("stop" | "length").
    `prompt_logprobs` comes with the first tokens of choice 0 when asked for; its first entry is
    None because nothing predicts the first prompt token.
    """

    choice: int
    base: int
    h_base: str
    h: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Marker:
    """Start of an epoch: each choice is cut to `at[c]` tokens, then extended by `tokens[c]`."""

    at: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """How a request was served; journaled with the terminal entry, shown in usage details."""

    path: str = PATH_REMOTE
    reason: str = ""
    transport: str = ""
    kv_bytes: int = 0
    prefill_cached_tokens: int = 0
    decode_cached_tokens: int = 0
    handoff_ms: float = 0.0
    preemptions: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""


@dataclass(frozen=True, slots=True)
class End:
    """The one terminal event. `upto` (cancel by stop string) tells readers where to cut, -1: nowhere."""

    outcome: str
    code: str = ""
    message: str = ""
    upto: int = -1
    usage: Usage = field(default_factory=Usage)


Event = Marker | Tokens | End


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One journal entry with its id `<epoch>-<ev>`, which is also the SSE event id."""

    epoch: int
    ev: int
    event: Event

    @property
    def id(self) -> str:
        return f"{self.epoch}-{self.ev}"


@dataclass(frozen=True, slots=True)
class WorkerBeat:
    """A worker's heartbeat: who it is, what it can do, how loaded it is.

    `state` is "loading" | "probing" | "ready" | "stalled" | "draining". `kv_tokens` is the whole KV room in
    tokens, `max_request_tokens` the longest request (prompt + output) it can ever hold, `max_num_seqs` how many
    sequences it runs at once (0: it does not say). `equal_tokens`: the start-up probe found that a row's result does
    not depend on its neighbours, so equal requests give equal tokens.
    `addresses` maps a transport's name to where a peer reaches this worker by it. Four fields count, since this
    worker's start, what it cleaned up: workers found dead with work left, requests brought back, own entries given
    back that it had lost sight of, cancels sent because a request's gateway was gone. The last four count tokens
    generated and the steps of single sequences that gave them, and guesses computed and accepted by their place in a
    draft, from its first token on.
    """

    worker_id: str
    role: str
    state: str
    model: str
    numerics: str
    layout: str
    addresses: tuple[tuple[str, str], ...] = ()
    progress: float = 0.0
    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    kv_tokens_used: int = 0
    max_request_tokens: int = 0
    tokens_per_second: float = 0.0
    requests_done: int = 0
    pid: int = 0
    version: str = ""
    host: str = ""
    equal_tokens: bool = False
    max_num_seqs: int = 0
    dead_workers_swept: int = 0
    requests_swept: int = 0
    own_entries_swept: int = 0
    orphans_cancelled: int = 0
    generated_tokens: int = 0
    sequence_steps: int = 0
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
