"""Tokens drawn inside the native call are those the plain sampler draws from the same logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.engine.batch import build_step
from shared.engine.draws import ELSEWHERE, FILTERED, GREEDY, GUMBEL, plan_draws
from shared.engine.sampler import SampleInput, sample
from shared.engine.scheduler import Scheduled
from shared.engine.sequence import Sequence
from shared.model.native import NativeDecoder
from shared.protocol.sampling import SamplingParams
from tests.model_checkpoints import VOCAB_SIZE, random_model, tokens
from tests.native_models import isas, native

BLOCKS_EACH = 4
OFF: dict[str, Any] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": (),
    "min_tokens": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model("LlamaForCausalLM", heads=4, kv_heads=2, hidden_size=64).save_pretrained(path)
    return path


def planned(index: int, params: SamplingParams, *, num_output: int = 0, choice: int = 0) -> Scheduled:
    """A sequence whose prompt and output are computed in one step."""
    prompt = tokens(9 + index % 40, seed=index)
    ids = [*prompt, *tokens(num_output, seed=1000 + index)]
    sequence = Sequence(f"r{index}", params, ids, len(prompt), (choice,), b"root")
    sequence.block_ids = list(range(1 + BLOCKS_EACH * index, 1 + BLOCKS_EACH * (index + 1)))
    return Scheduled(sequence, len(ids))


def run(decoder: NativeDecoder, plan: list[Scheduled]) -> tuple[np.ndarray, np.ndarray]:
    config = decoder.config
    num_blocks = 1 + BLOCKS_EACH * len(plan)
    kv = torch.zeros((config.num_layers, num_blocks, 2, config.num_kv_heads, 16, config.head_dim))
    logits, drawn, _ = decoder.run(build_step(plan, 16), kv, plan_draws(plan))
    return logits, drawn


def wanted(item: Scheduled, logits: np.ndarray) -> int:
    sequence = item.sequence
    prompt, output = sequence.tokens[: sequence.prompt_len], sequence.tokens[sequence.prompt_len :]
    return sample(logits, SampleInput(sequence.params, sequence.choices[0], prompt, output))


@pytest.mark.parametrize("isa", isas())
def test_draws_equal_the_sampler(folder: Path, isa) -> None:  # type: ignore[no-untyped-def]
    decoder = native(folder, isa=isa, threads=2)
    rng = np.random.default_rng(4)
    plan = []
    for index in range(60):
        temperature = (0.0, 0.3, 1.0, 1.7, 40.0)[index % 5]
        params = SamplingParams(64, int(rng.integers(0, 1 << 64, dtype=np.uint64)), temperature=temperature)
        plan.append(planned(index, params, num_output=index % 7, choice=index % 3))
    logits, drawn = run(decoder, plan)
    assert drawn.tolist() == [wanted(item, row) for item, row in zip(plan, logits, strict=True)]
    assert len(set(drawn.tolist())) > 10


@pytest.mark.parametrize("isa", isas())
def test_filtered_draws_equal_the_sampler(folder: Path, isa) -> None:  # type: ignore[no-untyped-def]
    decoder = native(folder, isa=isa, threads=2)
    plan = [
        planned(
            index,
            SamplingParams(
                64,
                1000 + index,
                temperature=(0.5, 1.0, 3.0)[index % 3],
                top_k=(0, 3, 20, 0)[index % 4],
                top_p=(0.9, 1.0, 0.6, 0.95, 0.999)[index % 5],
                min_p=(0.0, 0.02)[index % 2],
            ),
            num_output=index % 7,
        )
        for index in range(90)
    ]
    logits, drawn = run(decoder, plan)
    assert drawn.tolist() == [wanted(item, row) for item, row in zip(plan, logits, strict=True)]
    assert len(set(drawn.tolist())) > 10


def test_ties_go_to_the_lowest_id(folder: Path) -> None:
    """Equal embeddings give equal logits for every token."""
    model = random_model("LlamaForCausalLM", heads=4, kv_heads=2, hidden_size=64, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight[5]
    path = folder / "tied"
    model.save_pretrained(path)
    for isa in isas():
        logits, drawn = run(native(path, isa=isa), [planned(0, SamplingParams(4, 1, temperature=0.0))])
        assert (logits == logits[0, 0]).all()
        assert drawn.tolist() == [0]


ADJUSTED: list[dict[str, Any]] = [
    {"presence_penalty": 0.5},
    {"frequency_penalty": 0.3},
    {"frequency_penalty": -0.7, "presence_penalty": -1.1},
    {"repetition_penalty": 1.2},
    {"repetition_penalty": 0.8, "frequency_penalty": 0.1},
    {"logit_bias": ((3, 4.0), (5, -100.0), (3, 0.1))},
    {"stop_ids": (2, 7), "min_tokens": 40},
    {"stop_ids": (2, 7), "min_tokens": 1},
    {"logit_bias": ((3, 1.0),), "repetition_penalty": 1.3, "presence_penalty": 0.2, "stop_ids": (3,), "min_tokens": 9},
]


@pytest.mark.parametrize("isa", isas())
def test_adjusted_draws_equal_the_sampler(folder: Path, isa) -> None:  # type: ignore[no-untyped-def]
    decoder = native(folder, isa=isa, threads=2)
    plan = []
    for index in range(120):
        fields = ADJUSTED[index % len(ADJUSTED)]
        filters = ({}, {"top_p": 0.8}, {"top_k": 4})[index // 9 % 3]
        params = SamplingParams(64, index, temperature=(0.0, 0.8, 2.0)[index // 27 % 3], **filters, **fields)
        plan.append(planned(index, params, num_output=index % 10))
    logits, drawn = run(decoder, plan)
    assert drawn.tolist() == [wanted(item, row) for item, row in zip(plan, logits, strict=True)]
    plain = [replace(item.sequence.params, **OFF) for item in plan]
    changed = [sample(row, SampleInput(params, 0, (), ())) for params, row in zip(plain, logits, strict=True)]
    assert drawn.tolist() != changed


def test_an_adjustment_of_no_id_of_the_vocabulary_is_left_to_the_sampler(folder: Path) -> None:
    for token_id in (VOCAB_SIZE, -1):
        plan = [planned(0, SamplingParams(8, 1, logit_bias=((token_id, 1.0),))), planned(1, SamplingParams(8, 1))]
        _, drawn = run(native(folder), plan)
        assert drawn[0] == -1
        assert drawn[1] >= 0


def test_several_choices_of_one_row_are_left_to_the_sampler() -> None:
    item = planned(0, SamplingParams(8, 1, n=2, repetition_penalty=1.1))
    item.sequence.choices = (0, 1)
    draws = plan_draws([item, planned(1, SamplingParams(8, 1))])
    assert draws.ways.tolist() == [ELSEWHERE, GUMBEL]
    assert draws.adjust_starts.tolist() == [0, 0, 0]


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_filtered_rows_are_planned_with_their_filters(filters: dict[str, float]) -> None:
    draws = plan_draws([planned(0, SamplingParams(8, 1, **filters)), planned(1, SamplingParams(8, 1))])  # type: ignore[arg-type]
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert draws.ways.tolist() == [FILTERED, GUMBEL]
    for name, values in (("top_k", draws.top_ks), ("top_p", draws.top_ps), ("min_p", draws.min_ps)):
        assert values.tolist() == [filters.get(name, off[name]), off[name]]


def test_filters_do_not_matter_to_argmax_and_chunks_draw_nothing(folder: Path) -> None:
    greedy = planned(0, SamplingParams(8, 1, temperature=0.0, top_p=0.5, top_k=3))
    part = planned(1, SamplingParams(8, 1))
    plan = [greedy, Scheduled(part.sequence, 4)]
    assert plan_draws(plan).ways.tolist() == [GREEDY]
    logits, drawn = run(native(folder), plan)
    assert drawn.tolist() == [int(np.argmax(logits[0]))]
    assert logits.shape == (1, VOCAB_SIZE)


def test_all_rows_of_prompt_logprobs_have_logits_and_the_last_one_a_draw() -> None:
    item = planned(0, SamplingParams(8, 1, prompt_logprobs=2))
    assert plan_draws([item]).ways.tolist() == [ELSEWHERE] * (item.num_tokens - 1) + [GUMBEL]
