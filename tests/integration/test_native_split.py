"""A whole stack on the CPU kernels: prefill, hand-off with K transposed in its blocks, decode; equal to one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.protocol.messages import OUTCOME_FINISHED, PATH_REMOTE
from tests.inprocess import unsplit_tokens, workers
from tests.model_checkpoints import VOCAB_SIZE, random_model
from tests.native_models import library

LENGTHS = (1, 15, 16, 17, 40, 200)
PROMPTS = [[(7 * length + 3 * i) % (VOCAB_SIZE - 4) + 3 for i in range(length)] for length in LENGTHS]
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 1234}
NATIVE: dict[str, Any] = {"kernels": "native"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library()  # skips where there are no kernels
    folder = tmp_path_factory.mktemp("model") / "native"
    random_model("LlamaForCausalLM", heads=6, kv_heads=2, hidden_size=96).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_split_equals_one_process(
    redis_url: str, deployment: str, model: Path, transport: str, params: dict[str, Any]
) -> None:
    expected = unsplit_tokens(model, PROMPTS, **params)
    async with workers(redis_url, deployment, model, engine=NATIVE, transfer={"transports": (transport,)}) as bench:
        assert all(service.engine._runner.cache.layout.k_transposed for service in bench.services.values())
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            state = await bench.generate(prompt, **params)
            assert state.end is not None
            assert (state.end.outcome, state.end.usage.path) == (OUTCOME_FINISHED, PATH_REMOTE)
            assert state.end.usage.transport == transport
            assert state.choices[0].tokens == tokens
        await bench.nothing_leaks()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_an_int8_cache_travels_with_its_scales(
    redis_url: str, deployment: str, model: Path, transport: str
) -> None:
    engine = NATIVE | {"kv_cache_dtype": "int8"}
    expected = unsplit_tokens(model, PROMPTS, engine=engine, **SAMPLED)
    async with workers(redis_url, deployment, model, engine=engine, transfer={"transports": (transport,)}) as bench:
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            state = await bench.generate(prompt, **SAMPLED)
            assert state.end is not None
            assert (state.end.usage.path, state.end.usage.transport) == (PATH_REMOTE, transport)
            assert state.choices[0].tokens == tokens
        await bench.nothing_leaks()
