"""The same split on a CUDA device: equal to one engine on that device, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.protocol.messages import PATH_REMOTE
from tests.inprocess import unsplit_tokens, workers
from tests.tiny_model import VOCAB, write_tiny_model

pytestmark = pytest.mark.gpu

PROMPTS = [[(7 * size + 3 * i) % (VOCAB - 4) + 3 for i in range(size)] for size in (1, 17, 200)]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "sampled"])
async def test_split_equals_one_process(
    redis_url: str, deployment: str, tmp_path: Path, params: dict[str, Any]
) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    cuda = {"device": "cuda", "dtype": "float32"}
    expected = unsplit_tokens(model, PROMPTS, engine=cuda, **params)
    async with workers(redis_url, deployment, model, engine=cuda, transfer={"transports": ("tcp",)}) as bench:
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            state = await bench.generate(prompt, **params)
            assert state.choices[0].tokens == tokens
            assert state.end is not None
            assert state.end.usage.path == PATH_REMOTE
