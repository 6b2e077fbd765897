"""The state of a request in Redis, changed by nothing but the scripts called here.

Every method may be repeated when its reply was lost: it then does nothing more and answers the
same or `Stale`/`Refused`, after which the sweep brings the request back. The compares are listed
in docs/protocol.md, and next to each script in `scripts/`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgpack
from redis.asyncio import Redis

from shared.bus.lane import Arg, Lane
from shared.bus.results import (
    CANCEL_GONE,
    Append,
    Appended,
    AppendResult,
    Begun,
    Behind,
    Cancelled,
    CommitResult,
    Committed,
    Conflict,
    Ended,
    Lease,
    Offer,
    Polled,
    Refused,
    Stale,
    Submitted,
    Touched,
)
from shared.bus.script import Script
from shared.errors import ProtocolError
from shared.protocol.codec import decode, decode_event, encode, encode_usage
from shared.protocol.journal import chain
from shared.protocol.keys import Keys
from shared.protocol.messages import (
    FINISH_STOP,
    OUTCOME_CANCELLED,
    Job,
    JournalEntry,
    Tokens,
    Usage,
)

LIVE_TTL_MS = 300_000
DONE_TTL_MS = 60_000
MAX_DEATHS = 2
MAX_KILLS = 8
MAX_BOUNCES = 5
PRIVATE_TTL_MS = 30_000
"""How long a stream that one worker alone reads outlives it."""
APPENDS_A_CALL = 64

SCRIPTS = (
    *("submit", "begin", "offer", "take", "touch", "append", "commit"),
    *("sweep", "requeue", "cancel", "repair", "poll", "adopt", "fail"),
)


class RequestStore:
    """Calls the scripts; safe to share between tasks. Raises redis errors when Redis cannot be reached.

    `lane`: a connection of its own for appends.
    """

    def __init__(
        self,
        client: Redis,
        keys: Keys,
        *,
        lane: Lane | None = None,
        live_ttl_ms: int = LIVE_TTL_MS,
        done_ttl_ms: int = DONE_TTL_MS,
        max_deaths: int = MAX_DEATHS,
        max_kills: int = MAX_KILLS,
    ) -> None:
        self.keys = keys
        self.scripts = {name: Script(name) for name in SCRIPTS}
        self._client = client
        self._lane = lane
        self._live_ttl_ms = live_ttl_ms
        self._done_ttl_ms = done_ttl_ms
        self._max_deaths = max_deaths
        self._max_kills = max_kills

    async def submit(
        self,
        job: Job,
        snapshot: Sequence[Sequence[int]] | None = None,
        emax: int = 0,
        finished: Mapping[int, str] | None = None,
    ) -> Submitted | Conflict:
        """Create the request and its one work entry, unless the id exists.

        `snapshot`, `finished`: what the client already has of each choice, when Redis forgot the
        request; `emax`: the highest epoch the gateway has seen.
        """
        tokens = snapshot or [()] * job.params.n
        channel = self.keys.tokens(job.gateway)
        fixed: list[Arg] = [
            *(encode(job), job.gateway, channel, job.prefill_stream, job.decode_stream, job.params.n),
            *(job.budget_ms, self._live_ttl_ms, self._done_ttl_ms, secrets.token_hex(8), len(job.prompt_ids)),
        ]
        reply = await self._run("submit", job.request_id, [*fixed, *_contents(tokens, finished or {}, emax)])
        if reply[0] == b"submitted":
            return Submitted(reply[1].decode())
        return Conflict(reply[1].decode(), reply[2].decode())

    async def begin(
        self, stream: str, entry_id: str, request_id: str, worker_id: str, nonce: str | None = None
    ) -> Begun | Stale | Ended:
        """Become owner of the prefill of a queued request; raises its epoch.

        A nonce belongs to one begin: leave it out unless you repeat a call whose reply was lost.
        """
        owner = f"{worker_id}:{nonce or secrets.token_hex(8)}"
        reply = await self._run("begin", request_id, [stream, entry_id, owner])
        if reply[0] != b"begun":
            return Ended() if reply[0] == b"ended" else Stale()
        _, epoch, remaining, deaths, job, log = reply
        lease = Lease(request_id, epoch, owner, stream, entry_id)
        return Begun(lease, decode(Job, job), _entries(log), _remaining(remaining), deaths)

    async def offer(self, lease: Lease, address: bytes, private_stream: str = "") -> str | Refused:
        """Put the hand-off on the decode stream; `address` tells the puller where. Answers the entry's id.

        `private_stream`: the decode stream, when one worker alone reads it. The worker may be gone, and an offer that
        makes the stream anew must not make it for ever.
        """
        reply = await self._run("offer", lease.request_id, [lease.epoch, lease.owner, lease.nonce, address])
        if private_stream:
            await self._client.pexpire(private_stream, PRIVATE_TTL_MS, nx=True)
        return reply[1].decode() if reply[0] == b"offered" else Refused()

    async def take(self, stream: str, entry_id: str, request_id: str) -> Offer | Stale:
        """Read the hand-off behind an offer; changes nothing."""
        reply = await self._run("take", request_id, [stream, entry_id])
        if reply[0] != b"offer":
            return Stale()
        _, epoch, owner, remaining, deaths, address, job, log = reply
        nonce = owner.decode().rpartition(":")[2]
        return Offer(
            request_id,
            stream,
            entry_id,
            decode(Job, job),
            epoch,
            nonce,
            address,
            _entries(log),
            _remaining(remaining),
            deaths,
        )

    async def touch(self, lease: Lease, *, computed: bool = False) -> Touched:
        """Keep the request alive and ask whether it is still this worker's, and whose events it makes.

        `computed`: prefill is through the whole prompt; a death from here on is not the prompt's doing.
        """
        reply = await self._run("touch", lease.request_id, [lease.epoch, lease.owner, int(computed)])
        owner, cancel, offer_live, remaining, gateway = reply
        return Touched(owner == 1, cancel == 1, offer_live == 1, _remaining(remaining), gateway.decode())

    async def append(self, appends: Sequence[Append]) -> list[AppendResult]:
        """Journal and publish new tokens of many requests in one round trip; results in the same order.

        All choices of one request may be in one call. The publications of a call reach each
        gateway as one message.
        """
        calls = [
            _append_call(self.keys, appends[i : i + APPENDS_A_CALL]) for i in range(0, len(appends), APPENDS_A_CALL)
        ]
        if not calls:
            return []
        script = self.scripts["append"]
        if self._lane is not None and len(calls) == 1:
            replies = [await script.by_lane(self._lane, self._client, *calls[0])]
        else:
            replies = await script.pipeline(self._client, calls)
        return [_append_result(item) for reply in replies for item in reply]

    async def commit(
        self, offer: Offer, owner: str, emitted: Sequence[Tokens], usage: Usage | None = None
    ) -> CommitResult:
        """Become owner of the decode of `offer`; `owner` is `<worker>:<new nonce>`.

        `emitted` are the tokens the hand-off record brought; those prefill did not append yet are
        journaled here. May be empty when the worker will compute the prompt itself.
        """
        args: list[Arg] = [offer.stream, offer.entry, offer.epoch, offer.nonce, owner, _usage(usage), len(emitted)]
        for tokens in emitted:
            args.extend(_token_args(tokens))
        reply = await self._run("commit", offer.request_id, args)
        if reply[0] == b"committed":
            return Committed(Lease(offer.request_id, offer.epoch, owner, offer.stream, offer.entry))
        if reply[0] == b"behind":
            return Behind(reply[2], reply[3].decode(), reply[1])
        return Ended() if reply[0] == b"ended" else Refused()

    async def sweep(self, stream: str, entry_id: str, request_id: str, counted: bool) -> str:
        """Bring back what an entry stands for, after its holder died (`counted`) or let go; SWEPT_*."""
        return await self._sweep(stream, entry_id, request_id, "died" if counted else "let_go")

    async def strike(self, stream: str, entry_id: str, request_id: str) -> str:
        """Give back a request that this worker could not handle, though it lives; counts as a death. SWEPT_*."""
        return await self._sweep(stream, entry_id, request_id, "failed")

    async def _sweep(self, stream: str, entry_id: str, request_id: str, why: str) -> str:
        args: list[Arg] = [stream, entry_id, why, self._max_deaths, self._max_kills, MAX_BOUNCES]
        reply = await self._run("sweep", request_id, args, self.keys.dead)
        return str(reply.decode())

    async def requeue(self, lease: Lease) -> bool:
        """Give the request back to the queue (drain, preemption away); False: it was not ours."""
        return bool(await self._run("requeue", lease.request_id, [lease.epoch, lease.owner]) == b"requeued")

    async def fail(self, lease: Lease, code: str, message: str) -> bool:
        """End the request with an error its owner found; False: it was not ours."""
        reply = await self._run("fail", lease.request_id, [lease.epoch, lease.owner, code[:64], message[:512]])
        return bool(reply == b"ended")

    async def cancel(
        self,
        request_id: str,
        reason: str,
        *,
        force: bool = False,
        upto: int | Mapping[int, tuple[int, str]] | None = None,
        gateway: str = "",
        outcome: str = OUTCOME_CANCELLED,
    ) -> str:
        """End a request (`force`: now, else when its owner next writes), or single choices of it; CANCEL_*.

        `upto` as a mapping {choice: (length, chain hash at that length)} ends only these choices,
        cut to their length (a stop string the gateway found); as a number it is told to the
        readers in the terminal entry. `gateway`: do it only if that gateway still holds the request.
        """
        stops = upto if isinstance(upto, Mapping) else {}
        cut = upto if isinstance(upto, int) else -1
        args: list[Arg] = [outcome, reason[:64], "", int(force), cut, gateway, len(stops)]
        for choice, (length, h) in stops.items():
            args.extend([choice, length, h, encode(Tokens(choice, length, h, h, (), finish=FINISH_STOP))])
        return str((await self._run("cancel", request_id, args)).decode())

    async def repair(
        self,
        request_id: str,
        gateway: str,
        tokens: Sequence[Sequence[int]],
        emax: int,
        finished: Mapping[int, str] | None = None,
    ) -> bool:
        """Make the request continue from what the client has, where the journal says otherwise."""
        args = [gateway, *_contents(tokens, finished or {}, emax)]
        return bool(await self._run("repair", request_id, args) == b"repaired")

    async def poll(self, request_id: str, gateway: str, after: str = "") -> Polled | None:
        """Keep a request alive and read its journal past the id `after` ("": all); None: it is gone."""
        reply = await self._run("poll", request_id, [gateway, after])
        return _polled(reply)

    async def adopt(self, request_id: str, gateway: str, held_by: str = "") -> tuple[Job, Polled] | None:
        """Make `gateway` the one the request's events go to, if `held_by` holds it now ("": whoever); None: it is gone.

        The job's budget is what is left of it.
        """
        reply = await self._run("adopt", request_id, [gateway, self.keys.tokens(gateway), held_by])
        polled = _polled(reply)
        if polled is None:
            return None
        job, left = decode(Job, reply[6]), _remaining(reply[7])
        return (job if left is None else replace(job, budget_ms=max(1, left))), polled

    async def _run(self, name: str, request_id: str, args: Sequence[Arg], *more_keys: str) -> Any:
        keys = (self.keys.request(request_id), self.keys.log(request_id), *more_keys)
        return await self.scripts[name](self._client, keys, args)


def _contents(tokens: Sequence[Sequence[int]], finished: Mapping[int, str], emax: int) -> list[Arg]:
    """Arguments of common.lua's `rewrite`: emax, the token lists as msgpack, then four a choice."""
    args: list[Arg] = [emax, msgpack.packb([list(ids) for ids in tokens])]
    for choice, ids in enumerate(tokens):
        h, finish = chain("", ids), finished.get(choice, "")
        blob = encode(Tokens(choice, len(ids), h, h, (), finish=finish)) if finish else b""
        args.extend([len(ids), h, finish, blob])
    return args


def _append_call(keys: Keys, appends: Sequence[Append]) -> tuple[list[str], list[Arg]]:
    names: list[str] = []
    args: list[Arg] = []
    for append in appends:
        lease = append.lease
        names += (keys.request(lease.request_id), keys.log(lease.request_id))
        args += (lease.epoch, lease.owner, _usage(append.usage), *_token_args(append.tokens))
    return names, args


def _token_args(tokens: Tokens) -> tuple[Arg, ...]:
    return (
        *(tokens.choice, tokens.base, tokens.h_base, tokens.h, len(tokens.tokens)),
        *(tokens.finish or "", encode(tokens)),
    )


def _usage(usage: Usage | None) -> bytes:
    return b"" if usage is None else encode_usage(usage)


_APPEND_RESULTS: dict[int, AppendResult] = {
    0: Appended(),
    1: Appended(done=True),
    3: Refused(),
    4: Cancelled(),
    5: Cancelled(choice_only=True),
}


def _append_result(item: Any) -> AppendResult:
    if isinstance(item, int):
        return _APPEND_RESULTS[item]
    return Behind(item[1], item[2].decode(), item[0])


def _entries(log: Sequence[Any]) -> tuple[JournalEntry, ...]:
    """Journal entries from XRANGE's raw shape `[id, [b"k", kind, b"b", blob]]`."""
    return tuple(_entry(item) for item in log)


def _entry(item: Any) -> JournalEntry:
    try:
        epoch, _, ev = item[0].decode().partition("-")
        _, kind, _, blob = item[1]
        return JournalEntry(int(epoch), int(ev), decode_event(kind, blob))
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise ProtocolError(f"a journal entry has not the shape expected: {type(error).__name__}") from None


def _remaining(value: int) -> int | None:
    return None if value < 0 else value


def _polled(reply: Any) -> Polled | None:
    if reply[0] == CANCEL_GONE.encode():
        return None
    return Polled(reply[1].decode(), reply[2], reply[3].decode(), _entries(reply[4]), reply[5] == 1)


__all__ = ["Append", "Lease", "RequestStore"]
