"""How the tokens of an answer are shown to its client: all that the formats need of a request besides its jobs.

Any gateway can show an answer the same way from this record, so it is stored in Redis with the answer
(`shared/bus/stored.py`); it comes back from there half trusted, and every field is checked again.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import msgpack

from services.gateway.fields import MAX_STOP_LENGTH, MAX_STOPS
from services.gateway.params import scores_only
from services.gateway.schemas import ChatBody, CompletionBody, GenerationBody
from shared.bus.stored import MAX_REQUESTS, unpack_record
from shared.errors import ProtocolError
from shared.protocol.sampling import MAX_CHOICES

VERSION = 1

CHAT = "chat"
COMPLETION = "completion"


@dataclass(frozen=True, slots=True)
class Presentation:
    """`n` choices a prompt; `logprobs` and `prompt_logprobs` say whether they are shown at all.

    `stops` are the stop strings, `scores_only` that the client wants none of the tokens, `echo_texts` one prompt text
    per job, for `echo` only.
    """

    kind: str
    n: int = 1
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    return_token_ids: bool = False
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    scores_only: bool = False
    echo_texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, body: ChatBody | CompletionBody, echo_texts: tuple[str, ...] = ()) -> Presentation:
        return cls(
            kind=CHAT if isinstance(body, ChatBody) else COMPLETION,
            n=body.n,
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            logprobs=body.logprobs_wanted is not None,
            prompt_logprobs=body.prompt_logprobs is not None,
            return_token_ids=body.return_token_ids,
            stops=body.stop,
            include_stop=body.include_stop_str_in_output,
            skip_special=body.skip_special_tokens,
            scores_only=scores_only(body),
            echo_texts=echo_texts,
        )

    def streamed_for(self, body: GenerationBody) -> Presentation:
        """The same for another client of the answer, with the stream options that it asks for."""
        return replace(self, include_usage=body.include_usage, continuous_usage=body.continuous_usage)

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb(["V", VERSION, *astuple(self)])
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Presentation:
        """The inverse of `pack`. Raises ProtocolError for anything else."""
        names = [field.name for field in fields(cls)]
        values = dict(zip(names, unpack_record(data, "V", VERSION, len(names)), strict=True))
        for name in ("stops", "echo_texts"):
            values[name] = _texts(values[name])
        shown = cls(**values)
        shown._check()
        return shown

    def _check(self) -> None:
        flags = (self.include_usage, self.continuous_usage, self.logprobs, self.prompt_logprobs, self.return_token_ids)
        if set(map(type, (*flags, self.include_stop, self.skip_special, self.scores_only))) != {bool}:
            raise ProtocolError("a presentation has a flag that is none")
        if self.kind not in (CHAT, COMPLETION) or type(self.n) is not int or not 1 <= self.n <= MAX_CHOICES:
            raise ProtocolError("a presentation is of an unknown kind, or of too many choices")
        if len(self.stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in self.stops):
            raise ProtocolError("a presentation has too many stop strings, or too long ones")
        if len(self.echo_texts) > MAX_REQUESTS:
            raise ProtocolError("a presentation has too many prompts")


def _texts(value: Any) -> tuple[str, ...]:
    if type(value) is not list or not all(type(text) is str for text in value):
        raise ProtocolError("a presentation has a list that is none of texts")
    return tuple(value)
