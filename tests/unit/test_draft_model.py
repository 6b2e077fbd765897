"""Draft models: loading, drawing from a part of the vocabulary, and guessing for a real engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.engine.batch import build_step
from shared.engine.draws import plan_draws
from shared.engine.proposer import Ask
from shared.engine.runner import TorchRunner
from shared.engine.sampler import SampleInput, sample
from shared.engine.scheduler import Scheduled
from shared.engine.sequence import Sequence
from shared.engine.speculation import Speculation
from shared.errors import ConfigurationError, ModelFormatError
from shared.kv.cache import KVCache
from shared.model.draft import resolve_draft
from shared.model.native import NativeDecoder
from shared.model.source import ModelSource
from shared.protocol.sampling import SamplingParams
from shared.speculative.draft_model import DraftModelProposer
from shared.speculative.registry import load_proposer
from tests.drafts import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    PARAMS,
    context_of,
    engine_of,
    generate,
    prompts,
    target_of,
    write_draft,
)
from tests.engine_fakes import make_sequence, output_of, run_to_end
from tests.model_checkpoints import VOCAB_SIZE, tokens
from tests.speculation_fakes import always


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return target_of(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft(target: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Most of the target's tokens, all of its layers: right as often as a head of that size can be."""
    return write_draft(tmp_path_factory.mktemp("draft"), target, target.config.num_layers)


EVERYWHERE = pytest.mark.parametrize("on", ["native", "cpu"], ids=["kernels", "torch"])


def proposer_of(target: ModelSource, draft: Path, on: str = "native") -> DraftModelProposer:
    made = load_proposer("draft", context_of(target, draft, on))
    assert isinstance(made, DraftModelProposer)
    return made


# --- drawing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_a_draft_draws_what_the_sampler_draws_where_all_other_tokens_are_impossible(
    params: dict[str, Any], target: ModelSource, draft: Path
) -> None:
    proposer = proposer_of(target, draft)
    plan, step = [], None
    for index in range(12):
        sequence = Sequence(
            str(index), SamplingParams(max_tokens=50, seed=index, **({"temperature": 0.0} | params)), [], 0, (0,), b""
        )
        sequence.tokens, sequence.prompt_len = tokens(9 + index, seed=index), 4
        sequence.block_ids = [1 + 2 * index, 2 + 2 * index]
        plan.append(Scheduled(sequence, len(sequence.tokens)))
    step = build_step(plan, BLOCK_SIZE)
    result = proposer._runner.run(step, plan_draws(plan))
    assert result.logits.shape == (12, len(proposer._vocabulary.ids))
    for item, logits, drawn in zip(plan, result.logits, result.drawn, strict=True):
        whole = np.full(VOCAB_SIZE, -np.inf, dtype=np.float32)
        whole[proposer._vocabulary.ids] = logits
        own = item.sequence
        request = SampleInput(own.params, 0, own.tokens[: own.prompt_len], own.tokens[own.prompt_len :])
        assert drawn == sample(whole, request)


@pytest.mark.parametrize("exit_layer", [0, 1])
def test_a_draft_of_the_whole_target_computes_the_targets_logits(
    exit_layer: int, target: ModelSource, tmp_path: Path
) -> None:
    whole = write_draft(tmp_path, target, target.config.num_layers, VOCAB_SIZE, exit_layer=exit_layer)
    context, proposer = context_of(target, whole), proposer_of(target, whole)
    assert isinstance(context.model, NativeDecoder)
    sequence = make_sequence(tokens(30, seed=3))
    sequence.block_ids = [1, 2]
    step = build_step([Scheduled(sequence, 30)], BLOCK_SIZE)
    draws = plan_draws([Scheduled(sequence, 30)])
    theirs = context.model.run(step, KVCache(context.layout, 3).data, draws)[0][0]
    ours = proposer._runner.run(step, draws).logits[0]
    correlation = np.corrcoef(theirs, ours)[0, 1]
    assert correlation > 0.999  # the draft's weights are rounded to 8 bits


@pytest.mark.parametrize("exit_layer", [0, 1])
def test_on_torch_a_draft_of_the_whole_target_has_the_targets_logits(
    exit_layer: int, target: ModelSource, tmp_path: Path
) -> None:
    whole = write_draft(tmp_path, target, target.config.num_layers, VOCAB_SIZE, exit_layer=exit_layer)
    context, proposer = context_of(target, whole, "cpu"), proposer_of(target, whole, "cpu")
    sequence = make_sequence(tokens(30, seed=3))
    sequence.block_ids = [1, 2]
    plan = [Scheduled(sequence, 30)]
    step, draws = build_step(plan, BLOCK_SIZE), plan_draws(plan)
    theirs = TorchRunner(context.model, KVCache(context.layout, 3), "cpu").run(step, draws).logits[0]
    ours = proposer._runner.run(step, draws).logits[0]
    np.testing.assert_allclose(ours, theirs, atol=0.02)  # the draft's weights are stored in float16


# --- guessing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("batch", [1, 8, 32])
@EVERYWHERE
def test_tokens_are_those_without_a_draft(
    on: str, params: dict[str, Any], batch: int, target: ModelSource, draft: Path
) -> None:
    speculation = always(proposer_of(target, draft, on), max_draft_tokens=4)
    with_draft = generate(engine_of(target, speculation, on=on), batch, **params)
    assert with_draft == generate(engine_of(target, None, on=on), batch, **params)
    drafted, accepted = speculation.totals()
    assert sum(drafted) > 0
    if batch == 32:
        assert sum(accepted) > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@EVERYWHERE
def test_tokens_are_the_same_after_preemption(on: str, temperature: float, target: ModelSource, draft: Path) -> None:
    """The draft's own cache is left as it was, and goes on where the target comes back to."""
    speculation = always(proposer_of(target, draft, on), max_draft_tokens=4)
    small = engine_of(target, speculation, num_blocks=20, on=on)
    with_draft = generate(small, 16, temperature=temperature)
    assert small.load().preemptions > 0
    assert sum(speculation.totals()[0]) > 0
    assert with_draft == generate(engine_of(target, None, on=on), 16, temperature=temperature)


def test_tokens_are_those_without_a_draft_that_skips_layers(target: ModelSource, tmp_path: Path) -> None:
    skipping = write_draft(tmp_path, target, target.config.num_layers, exit_layer=1)
    speculation = always(proposer_of(target, skipping), max_draft_tokens=4)
    assert generate(engine_of(target, speculation), 8, temperature=1.0) == generate(
        engine_of(target, None), 8, temperature=1.0
    )
    drafted, accepted = speculation.totals()
    assert sum(accepted) > 0.3 * sum(drafted) > 0


def test_the_targets_noise_makes_a_draft_agree_at_temperature_one(target: ModelSource, draft: Path) -> None:
    """With noise of its own it would agree as seldom as two samples do."""
    speculation = always(proposer_of(target, draft), max_draft_tokens=1)
    generate(engine_of(target, speculation), 32, temperature=1.0, max_tokens=30)
    (drafted, *_), (accepted, *_) = speculation.totals()
    assert accepted / drafted > 0.5


def handed_off(target: ModelSource, speculation: Speculation, count: int, **params: Any) -> list[list[int]]:
    """As `generate`, with the prompts computed and first tokens sampled by an engine that has no draft."""
    prefill, decode = engine_of(target, None), engine_of(target, speculation)
    sequences = []
    for index, prompt in enumerate(prompts(count)):
        source = make_sequence(prompt, name=str(index), seed=index, **({"max_tokens": 20, "temperature": 0.0} | params))
        source.hold = True
        prefill.add(source)
        (output,) = prefill.step()
        moved = make_sequence([*prompt, output.samples[0].token], name=str(index))
        moved.params, moved.prompt_len = source.params, len(prompt)
        reservation = decode.reserve([moved], len(prompt), growth=4)
        assert reservation is not None
        for src, dst in zip(source.block_ids, moved.block_ids, strict=False):
            decode._runner.cache.data[:, dst] = prefill._runner.cache.data[:, src]
        prefill.free(source)
        decode.start_received(reservation)
        sequences.append(moved)
    run_to_end(decode)
    return [output_of(sequence) for sequence in sequences]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_as_many_guesses_are_right_behind_a_hand_off_as_without_one(
    temperature: float, target: ModelSource, draft: Path
) -> None:
    """The draft's cache is rebuilt from tokens, so it guesses the very same."""
    counts = []
    for run in (generate_with, handed_off):
        speculation = always(proposer_of(target, draft), max_draft_tokens=4)
        answers = run(target, speculation, 6, temperature=temperature)
        assert answers == generate(engine_of(target, None), 6, temperature=temperature)
        counts.append(speculation.totals())
    assert counts[0] == counts[1]
    assert sum(counts[0][1]) > 0


def generate_with(target: ModelSource, speculation: Speculation, count: int, **params: Any) -> list[list[int]]:
    return generate(engine_of(target, speculation), count, **params)


def test_a_rejected_guess_leaves_nothing_behind(target: ModelSource, draft: Path) -> None:
    """The draft's cache follows the target's tokens: it guesses as a draft does that never saw the wrong ones."""
    followed, fresh = proposer_of(target, draft), proposer_of(target, draft)
    sequence = make_sequence(tokens(20, seed=1), max_tokens=40)
    for token in tokens(30, seed=2):
        (guess,) = followed.propose([Ask(sequence, 3)])
        assert len(guess.tokens) == 3
        sequence.tokens.append(token if token % 2 else guess.tokens[0])
    copy = make_sequence(sequence.tokens[:20], max_tokens=40)
    copy.tokens[:] = sequence.tokens
    assert followed.propose([Ask(sequence, 4)])[0] == fresh.propose([Ask(copy, 4)])[0]


def test_confidences_are_the_drafts_own_probabilities(target: ModelSource, draft: Path) -> None:
    proposer = proposer_of(target, draft)
    sequence = make_sequence(tokens(12, seed=9))
    (guess,) = proposer.propose([Ask(sequence, 1)])
    logits = torch.from_numpy(proposer._runner.run(*_whole_step(sequence)).logits[0].astype(np.float64))
    place = int(np.searchsorted(proposer._vocabulary.ids, guess.tokens[0]))
    assert guess.confidences[0] == pytest.approx(float(logits.softmax(0)[place]), rel=1e-4)


def _whole_step(sequence: Sequence) -> tuple[Any, Any]:
    copy = make_sequence(list(sequence.tokens))
    copy.block_ids = [NUM_BLOCKS - 1]
    plan = [Scheduled(copy, len(copy.tokens))]
    return build_step(plan, BLOCK_SIZE), plan_draws(plan)


def test_a_long_prompt_is_caught_up_with_over_several_steps(target: ModelSource, draft: Path) -> None:
    proposer = proposer_of(target, draft)
    sequence = make_sequence(tokens(400, seed=4))
    drafts = [proposer.propose([Ask(sequence, 2)])[0] for _ in range(2)]
    assert [len(guess.tokens) for guess in drafts] == [0, 2]


def test_without_room_nothing_is_guessed_and_what_ends_makes_room(target: ModelSource, draft: Path) -> None:
    proposer = proposer_of(target, draft)
    free = proposer._blocks.num_free
    many = [make_sequence(tokens(400, seed=index), name=str(index)) for index in range(NUM_BLOCKS // 25 + 1)]
    for _ in range(2):
        drafts = proposer.propose([Ask(sequence, 2) for sequence in many])
    fitting = (NUM_BLOCKS - 1) // 26  # blocks of 16 for 400 tokens and a draft of 2
    assert fitting < len(many)
    assert [bool(guess.tokens) for guess in drafts] == [True] * fitting + [False] * (len(many) - fitting)
    for sequence in many:
        proposer.forget(sequence)
        proposer.forget(sequence)
    assert proposer._blocks.num_free == free


def test_steps_of_the_draft_are_timed(target: ModelSource, draft: Path) -> None:
    proposer = proposer_of(target, draft)
    assert proposer.seconds(0) == 0.0
    proposer.propose([Ask(make_sequence(tokens(9)), 4)])
    assert 0.0 < proposer.seconds(1) <= proposer.seconds(8)


def test_what_was_read_need_not_be_read_again(target: ModelSource, draft: Path) -> None:
    proposer = proposer_of(target, draft)
    short, long = make_sequence(tokens(15)), make_sequence(tokens(120))
    assert proposer.reading_seconds(short) == 0.0
    first = proposer.reading_seconds(long)
    assert first > 0.0
    assert proposer.reading_seconds(make_sequence(tokens(240))) == pytest.approx(2 * first)
    proposer.propose([Ask(long, 2)])
    assert proposer.reading_seconds(long) == 0.0
    long.tokens += tokens(30)
    assert proposer.reading_seconds(long) > 0.0
    proposer.forget(long)
    assert proposer.reading_seconds(long) > 0.0


# --- loading ----------------------------------------------------------------------------------------------------------


def _changed(folder: Path, into: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    config = json.loads((into / "config.json").read_text())
    change(config)
    (into / "config.json").write_text(json.dumps(config))
    return into


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c["slipstream_draft"].update(target_sha256="0"), ConfigurationError, "another model"),
        (lambda c: c["slipstream_draft"].update(version=99), ModelFormatError, "not a draft"),
        (lambda c: c["slipstream_draft"].update(kind="oracle"), ModelFormatError, "heads, layers"),
        (lambda c: c.pop("slipstream_draft"), ModelFormatError, "not a draft"),
        (lambda c: c["slipstream_draft"].update(exit_layer=2), ModelFormatError, "exit_layer"),
        (lambda c: c["slipstream_draft"].update(exit_layer="1"), ModelFormatError, "exit_layer"),
        (lambda c: c.update(hidden_size=32), ModelFormatError, "hidden_size"),
        (lambda c: c.update(intermediate_size=256), ModelFormatError, "intermediate_size"),
        (lambda c: c.update(num_key_value_heads=1), ModelFormatError, "num_kv_heads"),
        (lambda c: c.update(rope_theta=5.0), ModelFormatError, "rope_theta"),
    ],
)
def test_what_is_no_draft_of_this_target_is_refused(
    change: Callable[[dict[str, Any]], None],
    error: type[Exception],
    message: str,
    target: ModelSource,
    draft: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        resolve_draft(_changed(draft, tmp_path / "changed", change), target)


def test_ids_outside_the_targets_vocabulary_are_refused(target: ModelSource, draft: Path) -> None:
    small = replace(target, config=replace(target.config, vocab_size=60))
    with pytest.raises(ModelFormatError, match="vocab"):
        resolve_draft(draft, small)


def test_no_draft_no_proposer(target: ModelSource) -> None:
    assert load_proposer("draft", context_of(target, None)) is None
