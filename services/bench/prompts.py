"""Distinct prompts of an exact length, the same for the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

import aiohttp

from services.bench.options import BenchOptions

WORDS = (
    *("river", "stone", "window", "garden", "letter", "winter", "market", "engine", "silver", "bridge", "forest"),
    *("candle", "harbor", "meadow", "ticket", "planet", "copper", "shadow", "basket", "violin", "carpet", "desert"),
)


@dataclass(frozen=True, slots=True)
class Prompts:
    """`exact`: token ids cut to the length asked for; otherwise text of that many words."""

    items: tuple[list[int] | str, ...]
    exact: bool


def texts(count: int, num_words: int, seed: int) -> list[str]:
    """`count` texts of random words; no two begin alike, so a prefix cache cannot help by accident."""
    rng = random.Random(seed)
    return [f"{index} " + " ".join(rng.choice(WORDS) for _ in range(num_words)) for index in range(count)]


async def make_prompts(session: aiohttp.ClientSession, options: BenchOptions, model: str, count: int) -> Prompts:
    """Ask the server's /tokenize for ids and cut them; a server without it gets plain text.

    A word is at least one token in every vocabulary, so `prompt_len` words are enough to cut from.
    """
    words = texts(count, options.prompt_len, options.seed)
    items: list[list[int] | str] = []
    for text in words:
        ids = await _tokenize(session, options, model, text)
        if ids is None or len(ids) < options.prompt_len:
            return Prompts(tuple(words), exact=False)
        items.append(ids[: options.prompt_len])
    return Prompts(tuple(items), exact=True)


async def _tokenize(session: aiohttp.ClientSession, options: BenchOptions, model: str, text: str) -> list[int] | None:
    # `prompt` is the field of vLLM and Slipstream, `content` that of llama.cpp's server.
    body = {"model": model, "prompt": text, "content": text, "add_special_tokens": False}
    async with session.post(options.url("/tokenize"), json=body) as response:
        if response.status != 200:
            return None
        tokens = (await response.json(content_type=None)).get("tokens")
    if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens):
        return tokens
    return None
