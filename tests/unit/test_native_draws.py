"""Tokens drawn inside the native call are those the plain sampler draws from the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.engine.batch import build_step
from shared.engine.draws import ELSEWHERE, GREEDY, GUMBEL, plan_draws
from shared.engine.sampler import SampleInput, sample
from shared.engine.scheduler import Scheduled
from shared.engine.sequence import Sequence
from shared.model.native import NativeDecoder
from shared.protocol.sampling import SamplingParams
from tests.model_checkpoints import VOCAB_SIZE, random_model, tokens
from tests.native_models import isas, native

BLOCKS_EACH = 4


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
    return decoder.run(build_step(plan, 16), kv, plan_draws(plan))


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


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_that_share_a_draw_give_the_sampler_s_token(threads: int, folder: Path) -> None:
    """The vocabulary has three blocks of noise: with more threads some parts are empty."""
    decoder = native(folder, threads=threads)
    found = []
    for index in range(40):
        item = planned(index, SamplingParams(64, index, temperature=(1.0, 5.0)[index % 2]), num_output=index % 5)
        item.sequence.block_ids = [1, 2, 3, 4]
        logits, drawn = run(decoder, [item])
        assert drawn.tolist() == [wanted(item, logits[0])]
        found.append(int(drawn[0]) // 64)
    assert {0, 1} <= set(found)  # tokens of several parts


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


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"logit_bias": ((3, 1.0),)},
        {"stop_ids": (2,), "min_tokens": 3},
    ],
)
def test_rows_that_need_more_than_logits_and_noise_are_left_to_the_sampler(change: dict[str, object]) -> None:
    plan = [planned(0, SamplingParams(8, 1)), planned(1, SamplingParams(8, 1, **change))]  # type: ignore[arg-type]
    assert plan_draws(plan).ways.tolist() == [GUMBEL, ELSEWHERE]


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
