"""Speculation changes how fast tokens come and nothing else; and it is done where it pays."""

from __future__ import annotations

import random
from collections.abc import Sequence as Sequence_
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.engine.draft_lengths import Chain, PlainStep, choose_lengths
from shared.engine.proposer import Ask, Draft
from shared.engine.proposer_stack import ProposerStack
from shared.engine.sequence import Sequence
from shared.engine.speculation import Speculation
from tests.engine_fakes import VOCAB, expected_tokens, make_engine, make_sequence, output_of, run_to_end
from tests.speculation_fakes import FREE_ROWS, FixedCosts, Oracle, Unlimited, always

PROMPTS = [[1, 2, 3], [9], list(range(20)), [4, 4, 4, 4, 4, 4, 4], [7, 8], list(range(11, 40))]
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 20},
    "temperature": {"temperature": 1.0, "max_tokens": 20},
    "filters": {"temperature": 0.7, "top_k": 8, "top_p": 0.9, "min_p": 0.02, "max_tokens": 20},
    "penalties": {
        "temperature": 0.8,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.3,
        "max_tokens": 20,
    },
    "bias and minimum": {
        "temperature": 1.0,
        "logit_bias": ((3, 2.5), (5, -4.0)),
        "stop_ids": (2, 3, 5, 7, 11, 13),
        "min_tokens": 6,
        "max_tokens": 20,
    },
    "log-probabilities": {"temperature": 1.0, "logprobs": 3, "max_tokens": 12},
}


def sequences_of(params: dict[str, Any]) -> list[Sequence]:
    return [make_sequence(prompt, name=str(i), **params) for i, prompt in enumerate(PROMPTS)]


def check(sequences: list[Sequence]) -> None:
    for sequence in sequences:
        prompt = sequence.tokens[: sequence.prompt_len]
        assert output_of(sequence) == expected_tokens(prompt, sequence.params, sequence.choices[0])


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("wrong", [0.0, 0.4, 1.0])
def test_drafts_change_no_token(params: dict[str, Any], wrong: float) -> None:
    speculation = always(Oracle(wrong))
    engine, _ = make_engine(speculation=speculation)
    sequences = sequences_of(params)
    for sequence in sequences:
        engine.add(sequence)
    run_to_end(engine)
    check(sequences)
    counts = speculation.counts["oracle"]
    assert counts.drafted[0] > 0
    assert (sum(counts.accepted) > 0) == (wrong < 1.0)
    assert engine.blocks.num_free == engine.blocks.num_usable


@pytest.mark.parametrize(("allowed", "guessed"), [(None, True), (("oracle",), True), ((), False), (("suffix",), False)])
def test_a_request_says_who_may_guess(allowed: tuple[str, ...] | None, guessed: bool) -> None:
    speculation = always(Oracle(0.0))
    engine, _ = make_engine(speculation=speculation)
    sequences = sequences_of({"temperature": 1.0, "proposers": allowed})
    for sequence in sequences:
        engine.add(sequence)
    run_to_end(engine)
    check(sequences)
    assert (speculation.counts["oracle"].drafted[0] > 0) == guessed


class _Broken(Oracle):
    """Guesses for a while, then raises."""

    def __init__(self, num_calls: int) -> None:
        super().__init__(0.0)
        self.num_calls = num_calls
        self.calls = 0

    def propose(self, asks: Sequence_[Ask]) -> list[Draft]:
        self.calls += 1
        if self.calls > self.num_calls:
            raise RuntimeError("out of guesses")
        return super().propose(asks)


@pytest.mark.parametrize("num_calls", [0, 2])
def test_a_proposer_that_fails_costs_its_guesses_and_nothing_else(num_calls: int) -> None:
    broken, other = _Broken(num_calls), Oracle(0.5)
    other.name = "other"
    speculation = always(broken, other)
    engine, _ = make_engine(speculation=speculation)
    sequences = sequences_of({"temperature": 1.0, "max_tokens": 20})
    for sequence in sequences:
        engine.add(sequence)
    run_to_end(engine)
    check(sequences)
    assert broken.calls == num_calls + 1, "it is not asked again"
    assert speculation.counts["other"].drafted[0] > 0, "the next proposer takes its place"
    assert engine.blocks.num_free == engine.blocks.num_usable


class _Forgetful(Oracle):
    """Cannot let go of a sequence."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.calls = 0

    def forget(self, sequence: Sequence) -> None:
        self.calls += 1
        raise RuntimeError("which sequence?")


def test_a_proposer_that_fails_to_forget_is_told_nothing_more() -> None:
    broken, other = _Forgetful(), Oracle(0.5)
    other.name = "other"
    engine, _ = make_engine(speculation=always(broken, other))
    sequences = sequences_of({"temperature": 1.0, "max_tokens": 20})
    for sequence in sequences:
        engine.add(sequence)
    run_to_end(engine)
    check(sequences)
    assert broken.calls == 1
    assert set(other.forgotten) == set(sequences), "the others are told of every end"
    assert engine.blocks.num_free == engine.blocks.num_usable


def test_what_greedy_requests_repeat_is_not_believed_of_sampled_ones() -> None:
    """Guesses are right for greedy requests and never for sampled ones: each kind is judged by its own record."""
    stack = ProposerStack((Oracle(0.0),), max_draft_tokens=4)
    step = PlainStep(FREE_ROWS, 2, 2, 512)
    chances = {}
    for temperature in (0.0, 1.0):
        for number in range(20):
            sequence = make_sequence([1, 2, 3], name=str(number), max_tokens=9, temperature=temperature)
            guess = stack.guess([Ask(sequence, 4)], step)[sequence]
            sampled = [token + (temperature > 0) for token in guess.draft.tokens]
            stack.learn(guess, sampled, token_seconds=1.0)
            stack.forget(sequence)
        newcomer = make_sequence([1, 2, 3], name="newcomer", max_tokens=9, temperature=temperature)
        chances[temperature] = stack.guess([Ask(newcomer, 4)], step)[newcomer].chain.chances[0]
    assert chances[0.0] > 0.9
    assert chances[1.0] < 0.4


def test_blocks_filled_under_speculation_serve_the_next_request() -> None:
    """Published blocks hold accepted tokens only: what was computed for wrong guesses is in no prefix."""
    engine, _ = make_engine(num_blocks=200, speculation=always(Oracle(0.5)))
    sequences = sequences_of({"temperature": 1.0, "max_tokens": 30})
    for sequence in sequences:
        engine.add(sequence)
    run_to_end(engine)
    again = [make_sequence(sequence.tokens[:-1], name="again", temperature=1.0, max_tokens=6) for sequence in sequences]
    for sequence in again:
        engine.add(sequence)
    run_to_end(engine)
    check(again)
    assert all(sequence.num_cached > sequence.prompt_len - 8 for sequence in again if sequence.prompt_len > 12)


def test_right_drafts_save_steps() -> None:
    steps = {}
    for name, speculation in (("without", None), ("with", always(Oracle(0.0), max_draft_tokens=4))):
        engine, _ = make_engine(speculation=speculation)
        engine.add(make_sequence([1, 2, 3], max_tokens=21))
        run_to_end(engine)
        steps[name] = engine.load().steps
    assert steps == {"without": 21, "with": 5}  # the prompt's step gives one token, four more give five each


def test_log_probabilities_are_those_of_single_steps() -> None:
    collected = []
    for speculation in (None, always(Oracle(0.3))):
        engine, _ = make_engine(speculation=speculation)
        engine.add(make_sequence([5, 6], temperature=1.0, logprobs=2, max_tokens=16))
        collected.append([sample.logprob for output in run_to_end(engine) for sample in output.samples])
    assert collected[0] == collected[1]
    assert len(collected[0]) == 16


@pytest.mark.parametrize("seed", range(4))
def test_preemption_and_departures_with_drafts(seed: int) -> None:
    rng = random.Random(seed)
    oracle = Oracle(0.3, seed)
    engine, _ = make_engine(num_blocks=14, reserve_blocks=0, max_num_batched_tokens=16, speculation=always(oracle))
    kept: list[Sequence] = []
    gone: list[Sequence] = []
    for index in range(8):
        sequence = make_sequence(
            [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))], name=str(index), max_tokens=12
        )
        (gone if index % 4 == 3 else kept).append(sequence)
        engine.add(sequence)
        for _ in range(rng.randint(0, 3)):
            engine.step()
            engine.check_integrity()
        if gone and rng.random() < 0.5:
            engine.free(gone[-1])
    for sequence in gone:
        engine.free(sequence)
    run_to_end(engine)
    check(kept)
    assert engine.blocks.num_free == engine.blocks.num_usable
    assert set(oracle.forgotten) == {*kept, *gone}


def test_a_step_with_drafts_keeps_to_its_rows() -> None:
    speculation = Speculation((Oracle(0.0),), {1: FREE_ROWS}, max_rows=8, max_draft_tokens=4, new_account=Unlimited)
    engine, model = make_engine(max_num_batched_tokens=8, speculation=speculation)
    sequences = [make_sequence([i], name=str(i), max_tokens=10) for i in range(4)]
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        before = model.rows_run
        engine.step()
        assert model.rows_run - before <= 8
    check(sequences)


def test_no_guess_is_computed_where_rows_cost_what_steps_do() -> None:
    speculation = Speculation((Oracle(0.0),), {1: FixedCosts([1, 64], [1.0, 64.0])}, max_rows=512)
    engine, _ = make_engine(speculation=speculation)
    sequence = make_sequence([1, 2, 3], max_tokens=10)
    engine.add(sequence)
    run_to_end(engine)
    check([sequence])
    assert speculation.counts["oracle"].drafted[0] == 0
    assert engine.load().steps == 10


def test_wrong_guesses_are_soon_not_computed_any_more_and_right_ones_come_back() -> None:
    costs = FixedCosts([1, 2, 3, 4, 5], [1.0, 1.4, 1.8, 2.2, 2.6])
    oracle = Oracle(1.0)
    speculation = Speculation((oracle,), {1: costs}, max_rows=512, new_account=Unlimited)
    engine, _ = make_engine(num_blocks=200, speculation=speculation)
    sequence = make_sequence([1, 2, 3], max_tokens=600)
    engine.add(sequence)
    for _ in range(100):
        engine.step()
    drafted = sum(speculation.counts["oracle"].drafted)
    for _ in range(50):
        engine.step()
    assert sum(speculation.counts["oracle"].drafted) == drafted < 60
    oracle.wrong = 0.0
    run_to_end(engine)
    check([sequence])
    assert sum(speculation.counts["oracle"].accepted) > 100


@given(
    chains=st.lists(st.lists(st.floats(0.0, 1.0), max_size=4), min_size=1, max_size=3),
    times=st.lists(st.floats(0.1, 3.0), min_size=16, max_size=16),
)
def test_chosen_lengths_are_as_good_as_any_in_order_of_gain(chains: list[list[float]], times: list[float]) -> None:
    """Against the slow way: with rising costs a row, no other number of rows does better."""
    steps = [1.0 + sum(sorted(times)[: n + 1]) for n in range(16)]

    def rate(lengths: list[int]) -> float:
        gained = sum(sum(Chain(chain).gains()[:length]) for chain, length in zip(chains, lengths, strict=True))
        return (len(chains) + gained) / steps[sum(lengths)]

    chosen = choose_lengths([Chain(chain) for chain in chains], len(chains), lambda num_guesses: steps[num_guesses])
    options: list[list[int]] = [[]]
    for chain in chains:
        options = [[*option, length] for option in options for length in range(len(chain) + 1)]
    best = max(rate(option) for option in options)
    assert rate(chosen) == pytest.approx(best) or (not any(chosen) and best <= 1.08 * rate([0] * len(chains)) + 1e-9)


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    chance=st.floats(0.3, 0.95),
    prices=st.lists(st.floats(0.0, 0.3), min_size=3, max_size=3),
)
def test_making_guesses_is_paid_place_by_place(lengths: list[int], chance: float, prices: list[float]) -> None:
    """Against the slow way: a call for each place, for as many sequences as are guessed for so far."""

    def guessing(num_sequences: int) -> float:
        return sum(prices[:num_sequences])

    def rate(chosen: list[int]) -> float:
        calls = [sum(length > place for length in chosen) for place in range(4)]
        expected = len(chosen) + sum(sum(chance ** (place + 1) for place in range(length)) for length in chosen)
        return expected / (1.0 + 0.1 * sum(chosen) + sum(map(guessing, calls)))

    chains = [Chain([chance] * length) for length in lengths]
    chosen = choose_lengths(chains, len(chains), lambda num_guesses: 1.0 + 0.1 * num_guesses, guessing)
    options: list[list[int]] = [[0] * len(chains)]
    for place in range(4):  # the order in which they are weighed: all first places, all second ones, ...
        for index in reversed(range(len(chains))):
            if lengths[index] > place:
                options.append([length + (at == index) for at, length in enumerate(options[-1])])
    best = max(rate(option) for option in options)
    assert rate(chosen) == pytest.approx(best) or (not any(chosen) and best <= 1.08 * rate([0] * len(chains)) + 1e-9)
