"""Text to token ids and back, off the event loop and never on unbounded input."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from services.gateway.choices import TextRules
from services.gateway.fields import Message, Prompt
from services.gateway.params import context_exceeded
from services.gateway.presentation import Presentation
from services.gateway.schemas import ChatBody, TokenizeBody, check_size
from shared.errors import InvalidRequest
from shared.tokenizer.codec import TextCodec
from shared.tokenizer.detokenizer import ChoiceText, Detokenizer
from shared.tokenizer.stop_strings import StopStrings

MAX_BYTES_PER_TOKEN = 32
"""No prompt that fits has more bytes than this a token on average; more is refused before tokenising."""

INLINE_PARSE_BYTES = 64 * 1024
"""A body up to this size is parsed on the event loop; a thread would cost more than it saves."""
MIN_MAX_VALUES = 1 << 17
"""Every gateway takes bodies of this many values (token ids, mostly), one of a long context takes more."""

P = ParamSpec("P")
R = TypeVar("R")


class TextService:
    """Owns the threads that tokenise and render templates; `max_tokens` and `vocab_size` are the model's."""

    def __init__(self, codec: TextCodec, vocab_size: int, max_tokens: int, threads: int, timeout_s: float) -> None:
        self.codec = codec
        self.max_tokens = max_tokens
        self.vocab_size = min(codec.vocab_size, vocab_size)
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="text")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` in a text thread. Raises InvalidRequest when it takes longer than its deadline."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))
        except TimeoutError:
            raise InvalidRequest("The text took too long to process; send less of it.") from None

    async def parse(self, raw: bytes, parse: Callable[[bytes], R]) -> R:
        """Call `parse` on a client's JSON, in a text thread unless it is small. Raises RequestError."""
        if len(raw) <= INLINE_PARSE_BYTES:
            return parse(raw)
        return await self.run(self._parse_large, raw, parse)

    async def encode_prompt(self, prompt: Prompt, add_special_tokens: bool) -> tuple[int, ...]:
        """Ids of one prompt; ids given as such are only checked. Raises RequestError."""
        if isinstance(prompt, str):
            self._check_bytes([prompt], "prompt")
            return await self.run(self._encode, prompt, add_special_tokens)
        self.check_vocabulary(prompt, "prompt")
        return prompt

    async def encode_chat(self, body: ChatBody | TokenizeBody, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of a conversation in the model's template. Raises RequestError."""
        self._check_bytes([message["content"] for message in messages], "messages")
        return await self.run(self._encode_chat, body, messages)

    async def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Each token's own text."""
        return await self.run(lambda: [self.codec.token_text(token) for token in ids])

    async def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of ids that were checked."""
        return await self.run(self.codec.decode, ids, skip_special=skip_special)

    def check_vocabulary(self, ids: Sequence[int], param: str) -> None:
        """Raises InvalidRequest when an id is no token of the model."""
        if ids and max(ids) >= self.vocab_size:
            raise InvalidRequest(f"{param} holds a token id that is out of vocabulary.", param)

    def rules(self, shown: Presentation) -> TextRules:
        """How the answer of a request becomes text."""
        return TextRules(
            eos_ids=frozenset(self.codec.eos_ids),
            include_stop=shown.include_stop,
            wants_every_token=shown.return_token_ids or shown.logprobs,
            scores_only=shown.scores_only,
            new_text=lambda: self._new_text(shown),
        )

    def _new_text(self, shown: Presentation) -> ChoiceText:
        detokenizer = Detokenizer(self.codec, skip_special=shown.skip_special, continuation=True)
        return ChoiceText(detokenizer, StopStrings(shown.stops, include_stop=shown.include_stop))

    def _parse_large(self, raw: bytes, parse: Callable[[bytes], R]) -> R:
        check_size(raw, max(MIN_MAX_VALUES, 2 * self.max_tokens))
        return parse(raw)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self.codec.encode(text, add_special_tokens=add_special_tokens))

    def _encode_chat(self, body: ChatBody | TokenizeBody, messages: Sequence[Message]) -> tuple[int, ...]:
        rendered = self.codec.template.render(
            messages,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
        ids = self.codec.encode_chat(rendered)
        if body.add_special_tokens:
            ids = [*self.codec.encode("", add_special_tokens=True), *ids]
        return tuple(ids)

    def _check_bytes(self, texts: Sequence[str], param: str) -> None:
        limit = self.max_tokens * MAX_BYTES_PER_TOKEN
        size = sum(map(len, texts))
        if size <= limit:  # only then is it cheap to encode
            size = sum(len(text.encode()) for text in texts)
        if size > limit:
            detail = f"However, your {param} has more than {limit} bytes of text."
            raise context_exceeded(self.max_tokens, detail, param)
