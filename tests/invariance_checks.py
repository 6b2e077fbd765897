"""Checks that a row has the same bits alone, in any batch, and however its sequence was cut into chunks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from shared.model.language_model import LanguageModel
from tests.model_driver import DrivenSequence, ModelDriver

ROW_COUNTS = range(1, 65)
CHUNK_SIZES = (1, 2, 3, 5, 7, 11, 33, 97)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Stricter than equality: also 0.0 and -0.0 differ, and NaN is like itself."""
    return left.shape == right.shape and torch.equal(left.view(torch.int32), right.view(torch.int32))


def alone(decoder: LanguageModel, prompt: list[int]) -> Tensor:
    """Hidden row of the last token of a prompt computed whole, by itself."""
    return ModelDriver(decoder).step([(DrivenSequence(), prompt)])[0][-1:]


def check_every_row_of_every_row_count(decoder: LanguageModel, prompts: Sequence[list[int]]) -> None:
    driver = ModelDriver(decoder, num_blocks=1 + sum(len(prompt) // 16 + 1 for prompt in prompts))
    sequences = [DrivenSequence() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        driver.step([(sequence, prompt[:-1])])

    def decode(count: int) -> Tensor:
        rows = driver.step([(seq, prompt[-1:]) for seq, prompt in zip(sequences[:count], prompts, strict=False)])
        for sequence in sequences[:count]:
            sequence.num_tokens -= 1
        return torch.cat(rows)

    hidden = torch.cat([alone(decoder, prompt) for prompt in prompts])
    logits = torch.cat([decoder.logits(row[None]) for row in hidden])
    for count in range(1, len(prompts) + 1):
        assert same_bits(decode(count), hidden[:count]), f"hidden rows of a batch of {count}"
        assert same_bits(decoder.logits(hidden[:count]), logits[:count]), f"logits of {count} rows"


def check_chunks(decoder: LanguageModel, prompt: list[int], kv_dtype: torch.dtype = torch.float32) -> None:
    num_blocks = 1 + (len(CHUNK_SIZES) + 1) * (len(prompt) // 16 + 1)
    driver = ModelDriver(decoder, num_blocks, kv_dtype=kv_dtype)
    whole = driver.chunked(prompt, len(prompt))
    for size in CHUNK_SIZES:
        assert same_bits(driver.chunked(prompt, size), whole), f"chunks of {size}"


def check_mixed_steps(decoder: LanguageModel, prompts: Sequence[list[int]], seed: int) -> None:
    """Random steps over all prompts, each contributing nothing, one token or a chunk, against each prompt alone."""
    rng = random.Random(seed)
    num_blocks = 1 + 2 * sum(len(prompt) // 16 + 1 for prompt in prompts)
    driver = ModelDriver(decoder, num_blocks)
    wanted = [driver.chunked(prompt, len(prompt)) for prompt in prompts]
    sequences = [DrivenSequence() for _ in prompts]
    found: list[list[Tensor]] = [[] for _ in prompts]
    while any(seq.num_tokens < len(prompt) for seq, prompt in zip(sequences, prompts, strict=True)):
        spans = {
            index: prompts[index][seq.num_tokens : seq.num_tokens + rng.choice((0, 1, 1, 1, 2, 3, 4, 5, 17, 64, 90))]
            for index, seq in enumerate(sequences)
        }
        items = [(sequences[index], span) for index, span in spans.items() if span]
        if items:
            logits = iter(driver.logits(items, extra_blocks=rng.choice((0, 1, 9))))
            for index in [index for index, span in spans.items() if span]:
                found[index].append(next(logits))
    for rows, expected in zip(found, wanted, strict=True):
        assert same_bits(torch.cat(rows), expected)
