"""Fields of a worker's heartbeat, of this release and of the ones before it."""

from __future__ import annotations

from typing import Any

from shared.protocol.fields import Fields
from shared.protocol.messages import PROTOCOL_VERSION, WorkerBeat

_MAX_ADDRESSES = 16
_MAX_DRAFT_TOKENS = 128
_NUM_FIELDS = 28
_OLD_SIZES = (19, 20, 24)
"""Beats of older workers: without `max_num_seqs` and the counts of the sweep, and without these counts."""

_UNSAID: tuple[Any, ...] = (*[0] * 7, [], [])
"""What workers of old versions do not say, from the 20th field on."""


def pack_beat(b: WorkerBeat) -> list[Any]:
    """The array of a beat, tag and version first."""
    names = (b.worker_id, b.role, b.state, b.model, b.numerics, b.layout, b.version, b.host)
    counts = (
        b.running,
        b.waiting,
        b.kv_tokens,
        b.kv_tokens_used,
        b.max_request_tokens,
        b.requests_done,
        b.pid,
        int(b.equal_tokens),
    )
    rates = (float(b.progress), float(b.tokens_per_second))
    swept = (b.dead_workers_swept, b.requests_swept, b.own_entries_swept, b.orphans_cancelled)
    guesses = (b.generated_tokens, b.sequence_steps, b.drafted, b.accepted)
    return ["W", PROTOCOL_VERSION, *names, *counts, *rates, b.addresses, b.max_num_seqs, *swept, *guesses]


def unpack_beat(items: list[Any]) -> WorkerBeat:
    """The beat of an array without tag and version; raises ProtocolError."""
    unsaid = _UNSAID[len(items) - _NUM_FIELDS :] if len(items) in _OLD_SIZES else ()
    f = Fields([*items, *unsaid], "WorkerBeat", _NUM_FIELDS)
    worker_id, role, state, model = f.text(), f.word("prefill", "decode"), f.text(), f.text()
    numerics, layout, version, host = f.text(), f.text(), f.text(), f.text()
    running, waiting, kv_tokens, used, longest, done, pid, equal = (f.integer() for _ in range(8))
    progress, rate = f.number(), f.number()
    pairs = [Fields(item, "an address", 2) for item in f.array(_MAX_ADDRESSES)]
    max_num_seqs, dead_workers, requests, own_entries, orphans, generated, steps = (f.integer() for _ in range(7))
    drafted, accepted = f.counts(_MAX_DRAFT_TOKENS), f.counts(_MAX_DRAFT_TOKENS)
    return WorkerBeat(
        worker_id=worker_id,
        role=role,
        state=state,
        model=model,
        numerics=numerics,
        layout=layout,
        addresses=tuple((pair.text(), pair.text()) for pair in pairs),
        progress=progress,
        running=running,
        waiting=waiting,
        kv_tokens=kv_tokens,
        kv_tokens_used=used,
        max_request_tokens=longest,
        tokens_per_second=rate,
        requests_done=done,
        pid=pid,
        version=version,
        host=host,
        equal_tokens=bool(equal),
        max_num_seqs=max_num_seqs,
        dead_workers_swept=dead_workers,
        requests_swept=requests,
        own_entries_swept=own_entries,
        orphans_cancelled=orphans,
        generated_tokens=generated,
        sequence_steps=steps,
        drafted=drafted,
        accepted=accepted,
    )
