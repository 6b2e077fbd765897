"""The engine on a model that reads its whole context back through the cache: same tokens, whatever happens."""

from __future__ import annotations

import random
from typing import Any

import pytest

from shared.engine.sequence import Sequence, Status
from shared.protocol.sampling import SamplingParams
from tests.engine_fakes import (
    BLOCK_SIZE,
    expected_tokens,
    logits_for,
    make_engine,
    make_sequence,
    output_of,
    run_to_end,
)

PROMPTS = [[1, 2, 3], [4] * 9, list(range(20)), [7], [5, 6, 7, 8], list(range(30, 47))]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 99, "max_tokens": 12}


def check(sequences: list[Sequence]) -> None:
    for sequence in sequences:
        prompt = sequence.tokens[: sequence.prompt_len]
        assert output_of(sequence) == expected_tokens(prompt, sequence.params, sequence.choices[0])
        assert sequence.status is Status.FINISHED


@pytest.mark.parametrize("params", [{}, SAMPLED, SAMPLED | {"top_k": 5, "presence_penalty": 1.0, "min_tokens": 3}])
def test_a_batch_gives_each_request_what_it_gets_alone(params: dict[str, Any]) -> None:
    engine, _ = make_engine()
    sequences = [make_sequence(prompt, name=str(i), **params) for i, prompt in enumerate(PROMPTS)]
    for sequence in sequences:
        engine.add(sequence)
    run_to_end(engine)
    check(sequences)
    assert engine.blocks.num_free == engine.blocks.num_usable


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 7, 11, 33])
def test_chunked_prefill_changes_nothing(budget: int) -> None:
    engine, _ = make_engine(max_num_batched_tokens=budget)
    sequences = [make_sequence(prompt, name=str(i), **SAMPLED) for i, prompt in enumerate(PROMPTS)]
    for sequence in sequences:
        engine.add(sequence)
    run_to_end(engine)
    check(sequences)


def test_a_step_never_exceeds_its_token_budget() -> None:
    engine, model = make_engine(max_num_batched_tokens=8, max_num_seqs=4)
    for i, prompt in enumerate(PROMPTS):
        engine.add(make_sequence(prompt, name=str(i)))
    while engine.has_work:
        before = model.rows_run
        engine.step()
        assert model.rows_run - before <= 8
        assert len(engine.scheduler.running) <= 4


def test_decoding_streams_go_on_while_a_long_prompt_is_computed() -> None:
    engine, _ = make_engine(max_num_batched_tokens=8, prefill_share=0.25)
    stream = make_sequence([1, 2], name="stream", max_tokens=30)
    engine.add(stream)
    engine.step()
    long = make_sequence(list(range(40)), name="long", max_tokens=2)
    engine.add(long)
    while not output_of(long):
        produced = len(output_of(stream))
        engine.step()
        assert len(output_of(stream)) == produced + 1
    run_to_end(engine)
    check([stream, long])


def test_preempted_requests_produce_the_same_tokens() -> None:
    engine, _ = make_engine(num_blocks=9, reserve_blocks=0)
    sequences = [make_sequence([i, i + 1, i + 2], name=str(i), **SAMPLED) for i in range(4)]
    for sequence in sequences:
        engine.add(sequence)
    run_to_end(engine)
    check(sequences)
    assert engine.scheduler.num_preemptions > 0
    assert sequences[0].num_preemptions == 0, "the oldest always makes progress"


@pytest.mark.parametrize("seed", range(6))
def test_random_arrivals_aborts_and_preemptions(seed: int) -> None:
    rng = random.Random(seed)
    engine, _ = make_engine(num_blocks=14, max_num_batched_tokens=9, max_num_seqs=5, reserve_blocks=0)
    live: list[Sequence] = []
    aborted: list[Sequence] = []
    for number in range(120):
        if rng.random() < 0.3:
            prompt = [rng.randrange(50) for _ in range(rng.randint(1, 16))]
            live.append(make_sequence(prompt, name=str(number), max_tokens=rng.randint(1, 16), temperature=1.0))
            engine.add(live[-1])
        if live and rng.random() < 0.05:
            victim = live.pop(rng.randrange(len(live)))
            engine.free(victim)
            aborted.append(victim)
        engine.step()
        engine.check_integrity()
    run_to_end(engine)
    check(live)
    assert engine.blocks.num_free == engine.blocks.num_usable
    for sequence in aborted:
        prompt = sequence.tokens[: sequence.prompt_len]
        whole = expected_tokens(prompt, sequence.params)
        assert output_of(sequence) == whole[: len(output_of(sequence))]


def test_a_prefix_hit_gives_the_tokens_of_a_miss_and_computes_less() -> None:
    prompt = list(range(21))
    engine, model = make_engine()
    first, second = make_sequence(prompt, name="a", **SAMPLED), make_sequence(prompt, name="b", **SAMPLED)
    engine.add(first)
    run_to_end(engine)
    rows_before = model.rows_run
    engine.add(second)
    run_to_end(engine)
    check([first, second])
    assert second.num_cached == 0 or second.num_cached == 20
    assert model.rows_run - rows_before < rows_before


def test_prefix_hits_leave_the_last_token_to_compute() -> None:
    """KV rule 4: a prompt that is cached as a whole still computes at least one row."""
    prompt = list(range(4 * BLOCK_SIZE))
    engine, _ = make_engine()
    for name in "ab":
        sequence = make_sequence(prompt, name=name, max_tokens=1)
        engine.add(sequence)
        engine.step()
        check([sequence])
    assert engine.scheduler.cached_prefix(make_sequence(prompt)) != []
    assert len(engine.scheduler.cached_prefix(make_sequence(prompt))) == (len(prompt) - 1) // BLOCK_SIZE


def test_tenants_do_not_share_prefixes() -> None:
    engine, _ = make_engine()
    engine.add(make_sequence(list(range(16))))
    run_to_end(engine)
    other = make_sequence(list(range(16)))
    other.hash_root = b"another tenant"
    assert engine.scheduler.cached_prefix(other) == []
    assert engine.scheduler.cached_prefix(make_sequence(list(range(16)))) != []


def test_prompt_logprobs_skip_prefix_reads_but_publish() -> None:
    """KV rule 7."""
    prompt = list(range(12))
    engine, _ = make_engine(max_num_batched_tokens=5)
    engine.add(make_sequence(prompt, name="warm"))
    run_to_end(engine)
    scored = make_sequence(prompt, name="scored", max_tokens=1, prompt_logprobs=2)
    engine.add(scored)
    outputs = run_to_end(engine)
    final = next(output for output in outputs if output.samples)
    assert scored.num_cached == 0
    assert final.prompt_logprobs[0] is None
    assert len(final.prompt_logprobs) == len(prompt)
    for position in range(1, len(prompt)):
        row = logits_for(tuple(prompt[:position])).astype("float64")
        expected = row[prompt[position]] - _log_sum_exp(row)
        entry = final.prompt_logprobs[position]
        assert entry is not None
        assert entry.logprob == pytest.approx(expected)
        assert len(entry.top) == 2


def _log_sum_exp(row: Any) -> float:
    import numpy as np

    return float(np.log(np.exp(row).sum()))


def hold_sequence(prompt: list[int], choices: tuple[int, ...], **params: Any) -> Sequence:
    fields = {"max_tokens": 8, "seed": 7, "temperature": 1.0} | params
    return Sequence("p", SamplingParams(**fields), list(prompt), len(prompt), choices, b"root", hold=True)


def test_a_held_sequence_samples_each_choice_once_and_keeps_its_blocks() -> None:
    engine, _ = make_engine()
    sequence = hold_sequence(list(range(10)), (0, 1, 2))
    engine.add(sequence)
    (output,) = engine.step()
    params = sequence.params
    assert [s.token for s in output.samples] == [expected_tokens(list(range(10)), params, c)[0] for c in range(3)]
    assert engine.step() == []
    assert sequence.status is Status.HELD
    assert len(sequence.block_ids) == 3
    engine.check_integrity()
    engine.free(sequence)
    engine.check_integrity()
    assert engine.blocks.num_free == engine.blocks.num_usable


def test_a_held_sequence_without_choices_computes_and_samples_nothing() -> None:
    engine, _ = make_engine(max_num_batched_tokens=4)
    sequence = hold_sequence(list(range(10)), ())
    engine.add(sequence)
    outputs = run_to_end(engine)
    assert [output.num_computed for output in outputs] == [4, 8, 10]
    assert not any(output.samples for output in outputs)
    assert sequence.status is Status.HELD


@pytest.mark.parametrize("length", [7, 8, 9])
@pytest.mark.parametrize("choices", [1, 3])
def test_choices_decode_from_handed_off_blocks(length: int, choices: int) -> None:
    """Hand-off between two engines by copying the reserved blocks' content."""
    prompt = list(range(length))
    prefill, _ = make_engine()
    decode, _ = make_engine()
    source = hold_sequence(prompt, tuple(range(choices)))
    prefill.add(source)
    (output,) = prefill.step()
    targets = [make_sequence([*prompt, s.token], choice=s.choice, temperature=1.0) for s in output.samples]
    for target in targets:
        target.prompt_len = length
    reservation = decode.reserve(targets, length, growth=3)
    assert reservation is not None
    for src, dst in zip(source.block_ids, targets[0].block_ids, strict=False):
        decode._runner.cache.data[:, dst] = prefill._runner.cache.data[:, src]
    decode.start_received(reservation)
    run_to_end(decode)
    for target in targets:
        assert output_of(target) == expected_tokens(prompt, target.params, target.choices[0])
    assert decode.blocks.num_free == decode.blocks.num_usable


def test_choices_that_were_moved_here_get_slots_for_all_their_tokens() -> None:
    """A hand-off of several choices covers the prompt; what they said elsewhere may be longer than the growth."""
    prompt = list(range(9))
    prefill, _ = make_engine()
    decode, _ = make_engine()
    source = hold_sequence(prompt, ())
    prefill.add(source)
    prefill.step()
    targets = []
    for choice in range(3):
        fresh = make_sequence(prompt, choice=choice, temperature=1.0, max_tokens=16)
        moved = make_sequence([*prompt, *expected_tokens(prompt, fresh.params, choice)[:11]], choice=choice)
        moved.params, moved.prompt_len = fresh.params, len(prompt)
        targets.append(moved)
    reservation = decode.reserve(targets, len(prompt), growth=1)
    assert reservation is not None
    for src, dst in zip(source.block_ids, targets[0].block_ids, strict=False):
        decode._runner.cache.data[:, dst] = prefill._runner.cache.data[:, src]
    decode.start_received(reservation)
    run_to_end(decode)
    check(targets)


def test_a_failed_hand_off_is_recomputed_from_clean_blocks() -> None:
    prompt = list(range(11))
    engine, _ = make_engine()
    targets = [make_sequence(prompt, choice=choice, temperature=1.0) for choice in range(2)]
    reservation = engine.reserve(targets, len(prompt), growth=3)
    assert reservation is not None
    engine._runner.cache.data[:, targets[0].block_ids] = float("nan")
    engine.start_recompute(reservation)
    run_to_end(engine)
    check(targets)


def test_a_reservation_is_refused_when_blocks_are_short_and_can_be_given_back() -> None:
    engine, _ = make_engine(num_blocks=6)
    first = engine.reserve([make_sequence(list(range(8)))], 8, growth=4)
    assert first is not None
    assert engine.reserve([make_sequence(list(range(30, 42)))], 12, growth=0) is None
    engine.check_integrity()
    engine.cancel_reservation(first)
    engine.cancel_reservation(first)
    assert engine.blocks.num_free == engine.blocks.num_usable


def test_one_failing_request_leaves_the_others_alone() -> None:
    engine, _ = make_engine()
    good = make_sequence([1, 2, 3], name="good")
    bad = make_sequence([1, 2, 3, 4], name="bad", temperature=1.0, logit_bias=((10**6, 1.0),))
    engine.add(bad)
    engine.add(good)
    outputs = run_to_end(engine)
    assert [o.sequence.request_id for o in outputs if o.error] == ["bad"]
    check([good])


def test_stop_ids_end_a_choice() -> None:
    prompt = [3, 1, 4]
    free_run = expected_tokens(prompt, SamplingParams(max_tokens=8, seed=7, temperature=0.0))
    sequence = make_sequence(prompt, stop_ids=(free_run[2],))
    engine, _ = make_engine()
    engine.add(sequence)
    outputs = run_to_end(engine)
    assert output_of(sequence) == free_run[: free_run.index(free_run[2]) + 1]
    assert outputs[-1].samples[0].finish == "stop"
