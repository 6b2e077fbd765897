"""What guesses are worth and what steps cost, as learned: from figures that are known here."""

from __future__ import annotations

import random
from collections.abc import Sequence as Sequence_
from types import SimpleNamespace

import pytest

from shared.engine.acceptance import Acceptance
from shared.engine.account import Account
from shared.engine.draft_lengths import Chain, PlainStep
from shared.engine.patience import Patience
from shared.engine.proposer import Ask, Draft
from shared.engine.proposer_stack import ProposerStack
from shared.engine.scheduler import Scheduled
from shared.engine.sequence import Sequence
from shared.engine.speculation import Speculation
from shared.engine.step_costs import StepCosts
from shared.engine.trials import Trials
from tests.engine_fakes import make_engine, make_sequence, run_to_end
from tests.speculation_fakes import FREE_ROWS, FixedCosts, Oracle, Unlimited, always


def test_rates_are_learned_by_confidence() -> None:
    rng, acceptance = random.Random(1), Acceptance()
    for index in range(3000):
        confidence = rng.choice([0.2, 0.8])
        rate = 0.6 if confidence == 0.2 else 0.3  # the unsure guesses are the better ones here
        acceptance.observe(index, confidence, is_right=rng.random() < rate)
        acceptance.forget(index)
    assert acceptance.chance("new", 0.2) == pytest.approx(0.6, abs=0.12)
    assert acceptance.chance("new", 0.8) == pytest.approx(0.3, abs=0.12)


def test_a_request_of_its_own_kind_is_told_apart_and_forgotten() -> None:
    rng, acceptance = random.Random(2), Acceptance()
    for _ in range(400):
        acceptance.observe("lucky", 0.5, is_right=rng.random() < 0.9)
        acceptance.observe("unlucky", 0.5, is_right=rng.random() < 0.1)
    lucky, unlucky = acceptance.chance("lucky", 0.5), acceptance.chance("unlucky", 0.5)
    assert lucky > 0.65
    assert unlucky < 0.35
    acceptance.forget("lucky")
    acceptance.forget("unlucky")
    assert unlucky < acceptance.chance("lucky", 0.5) == acceptance.chance("unlucky", 0.5) < lucky


def test_nothing_is_ever_certain() -> None:
    acceptance = Acceptance()
    for _ in range(1000):
        acceptance.observe("r", 1.0, is_right=True)
    assert acceptance.chance("r", 1.0) < 1.0
    assert acceptance.typical("r") < 1.0


def test_what_is_chosen_and_wrong_too_often_lowers_all_chances_and_what_is_right_raises_none() -> None:
    rng, lucky, unlucky = random.Random(3), Acceptance(), Acceptance()
    for index in range(2000):  # 0.6 of all guesses are right; those that are chosen are the unlucky ones among them
        is_chosen = index % 4 == 0
        lucky.observe(index, 0.5, is_right=rng.random() < (0.9 if is_chosen else 0.5), is_chosen=is_chosen)
        unlucky.observe(index, 0.5, is_right=rng.random() < (0.3 if is_chosen else 0.7), is_chosen=is_chosen)
        lucky.forget(index)
        unlucky.forget(index)
    assert lucky.chance("new", 0.5) == pytest.approx(0.6, abs=0.12)
    assert unlucky.chance("new", 0.5) == pytest.approx(0.3, abs=0.12)
    assert unlucky.typical("new") == pytest.approx(0.3, abs=0.12)


def test_chances_recover_while_nothing_is_chosen() -> None:
    acceptance = Acceptance()
    for index in range(400):
        acceptance.observe(index, 0.5, is_right=False, is_chosen=index % 2 == 1)
        acceptance.observe(index, 0.5, is_right=True)
        acceptance.forget(index)
    lowered = acceptance.chance("new", 0.5)
    for index in range(1000):
        acceptance.observe(index, 0.5, is_right=index % 3 > 0)
        acceptance.forget(index)
    assert lowered < 0.5
    assert acceptance.chance("new", 0.5) == pytest.approx(2 / 3, abs=0.1)


def test_costs_between_measured_sizes_and_beyond() -> None:
    costs = StepCosts([1, 2, 4], [1.0, 2.0, 3.0])
    assert [costs.step(rows) for rows in (1, 2, 3, 4, 8)] == [1.0, 2.0, 2.5, 3.0, 6.0]


def test_a_disturbed_measurement_does_not_make_more_rows_cheaper() -> None:
    costs = StepCosts([1, 2, 4], [5.0, 2.0, 3.0])
    assert [costs.step(rows) for rows in (1, 2, 4)] == [2.0, 2.0, 3.0]


def test_a_slower_machine_moves_all_sizes_and_one_wrong_size_is_mended() -> None:
    costs = StepCosts([1, 2, 4], [1.0, 2.0, 4.0])
    for _ in range(100):
        costs.observe_step(1, 2.0)
    assert costs.step(1) == pytest.approx(2.0, rel=0.01)
    assert costs.step(4) == pytest.approx(8.0, rel=0.05)
    for _ in range(100):
        costs.observe_step(1, 2.0)
        costs.observe_step(2, 2.4)
    assert costs.step(2) / costs.step(1) == pytest.approx(1.2, rel=0.2)


def test_what_disturbs_the_steps_of_now_does_not_make_a_larger_one_look_cheaper() -> None:
    costs = StepCosts([1, 32, 64], [1.0, 32.0, 64.0])
    for _ in range(200):  # steps of 32 beside prefill, those of 1 by themselves
        costs.observe_step(32, 64.0)
        costs.observe_step(1, 1.0)
    plain = costs.step(32)
    assert costs.step(34) < plain, "by all sizes it would be cheaper"
    assert costs.larger_step(34, 32) == pytest.approx(plain * 34 / 32)
    assert PlainStep(costs, 32, 32, 64).row_seconds == pytest.approx(plain / 32)
    for _ in range(100):
        costs.observe_step(34, 80.0)
    assert costs.larger_step(34, 32) == pytest.approx(80.0, rel=0.1), "what a size costs is learned"
    for _ in range(100):
        costs.observe_step(34, 30.0)
    assert costs.larger_step(34, 32) == costs.step(32), "and never less than with fewer rows"


def test_guesses_that_would_not_pay_are_not_computed_because_their_step_is_rare() -> None:
    costs = StepCosts([1, 32, 64], [1.0, 32.0, 64.0])
    for _ in range(200):
        costs.observe_step(32, 64.0)
        costs.observe_step(1, 1.0)
    lengths = PlainStep(costs, 32, 32, 64).lengths([Chain([0.6])] * 4)
    assert lengths == [0] * 4


def test_what_comes_beside_the_model_is_paid_once() -> None:
    costs = StepCosts([1, 2], [1.0, 1.5])
    for _ in range(150):
        costs.observe_beside(0.5)
    assert costs.whole(2) == pytest.approx(2.0, rel=0.01)
    costs.observe_beside(60.0)  # a pause between requests
    assert costs.whole(2) == pytest.approx(2.0, rel=0.05)
    for _ in range(100):
        costs.observe_beside(2.0)  # more of them than a pause
    assert costs.whole(2) == pytest.approx(3.5, rel=0.05)


def test_a_wait_taken_for_time_beside_the_model_is_soon_forgotten() -> None:
    costs = StepCosts([1, 2], [0.001, 0.0015])
    costs.observe_beside(0.47)  # the first requests were on their way
    for _ in range(4):
        costs.observe_beside(0.001)
    assert costs.beside < 0.003


class _Watched(Speculation):
    besides: list[float]

    def observe_beside(self, seconds: float) -> None:
        self.besides.append(seconds)


def test_a_pause_between_requests_is_not_time_that_a_step_takes() -> None:
    speculation = _Watched((Oracle(0.0),), {1: FixedCosts([1, 64], [1.0, 64.0])}, max_rows=64)
    speculation.besides = []
    engine, _ = make_engine(num_blocks=200, speculation=speculation)
    for name in ("first", "second"):
        engine.add(make_sequence([1, 2, 3], name=name, max_tokens=3))
        run_to_end(engine)
    assert len(speculation.besides) == 4, "two between the three steps of each request, none between the requests"


def test_an_engine_measures_its_steps_while_it_has_nothing_to_do() -> None:
    speculation = Speculation((Oracle(0.0),), {}, max_rows=64)
    engine, model = make_engine(num_blocks=200, max_num_batched_tokens=64, speculation=speculation)
    sequence = make_sequence([1, 2, 3])
    engine.add(sequence)
    run_to_end(engine)
    assert sum(speculation.counts["oracle"].drafted) == 0, "nothing is known yet"
    turns = 0
    while engine.calibrate():
        engine.check_integrity()
        turns += 1
    assert list(speculation.tables) == [1]
    assert turns > 10
    assert model.rows_run > 64
    assert engine.blocks.num_free == engine.blocks.num_usable
    steps = [speculation.tables[1].step(rows) for rows in (1, 8, 64)]
    assert 0 < steps[0] <= steps[1] <= steps[2]


def test_a_full_cache_puts_measuring_off() -> None:
    speculation = Speculation((Oracle(0.0),), {}, max_rows=64)
    engine, model = make_engine(num_blocks=60, speculation=speculation)
    taken = engine.blocks.allocate(engine.blocks.num_free)
    for _ in range(5):
        assert engine.calibrate()
    assert model.rows_run == 0
    engine.blocks.release(taken)
    engine.calibrate()
    assert model.rows_run > 0


class _Priced(Oracle):
    """An oracle that takes its time; notes how many guesses it was asked for each time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(0.0)
        self.price = seconds
        self.asked: list[list[int]] = []

    def seconds(self, num_sequences: int) -> float:
        return self.price * bool(num_sequences)

    def propose(self, asks: Sequence_[Ask]) -> list[Draft]:
        self.asked.append([ask.max_tokens for ask in asks])
        return super().propose(asks)


def test_who_is_too_dear_is_tried_now_and_then_and_used_once_it_pays() -> None:
    oracle = _Priced(1000.0)
    speculation = Speculation((oracle,), {1: FixedCosts([1, 1000], [1.0, 1.001])}, max_rows=512, new_account=Unlimited)
    engine, _ = make_engine(num_blocks=200, speculation=speculation)
    sequences = [make_sequence([5, 6, 7], name=str(index), seed=index, max_tokens=100) for index in range(6)]
    for sequence in sequences:
        engine.add(sequence)
    while sequences[0].num_output < 60:
        engine.step()
    assert 1 <= len(oracle.asked) <= 4
    assert all(len(asked) <= 4 and max(asked) <= 2 for asked in oracle.asked)
    tried = len(oracle.asked)
    oracle.price = 1e-6
    before = engine.load().steps
    run_to_end(engine)
    assert len(oracle.asked) > tried
    assert engine.load().steps - before < 30, "forty tokens are left, and all guesses are right"


def test_trials_take_a_two_hundredth_of_the_time() -> None:
    trials, seconds = Trials(), 0.0
    for _ in range(5000):
        if trials.are_due():
            trials.made(0.05)
            seconds += 0.05
        trials.passed(0.01)
    assert seconds == pytest.approx(0.005 * 5000 * 0.01, abs=0.05)


def test_cheap_trials_are_some_steps_apart_and_begin_after_it_no_longer_pays() -> None:
    trials = Trials()
    due = []
    for step in range(100):
        if trials.are_due():
            due.append(step)
            trials.made(1e-6)
        trials.passed(0.01)
    assert due == [0, 48, 96]
    trials.not_needed()
    for _ in range(48):
        assert not trials.are_due()
        trials.passed(0.01)
    assert trials.are_due()


class _Reading(_Priced):
    """Guesses are cheap, but take a text that was read; `left` is how many tokens each sequence had left when asked."""

    def __init__(self, reading: float) -> None:
        super().__init__(0.01)
        self.reading = reading
        self.left: list[int] = []

    def reading_seconds(self, sequence: Sequence) -> float:
        return 0.0 if sequence in self._answers else self.reading

    def propose(self, asks: Sequence_[Ask]) -> list[Draft]:
        self.left += [ask.sequence.params.max_tokens - ask.sequence.num_output for ask in asks]
        return super().propose(asks)


@pytest.mark.parametrize(
    ("reading", "max_tokens", "first_left"),
    [(5.0, 200, 199), (5.0, 12, 11), (5.0, 6, None), (50.0, 30, None), (50.0, 400, range(190, 340))],
    ids=["pays", "pays in ten tokens", "too short", "never", "once the answer is long"],
)
def test_a_text_is_read_only_if_its_guesses_can_give_that_time_back(
    reading: float, max_tokens: int, first_left: int | range | None
) -> None:
    oracle = _Reading(reading)
    speculation = Speculation((oracle,), {1: FixedCosts([1, 1000], [1.0, 1.001])}, max_rows=512, new_account=Unlimited)
    speculation._stack._members[0].trials.made(1e9)
    engine, _ = make_engine(num_blocks=200, speculation=speculation)
    engine.add(make_sequence([5, 6, 7], max_tokens=max_tokens))
    run_to_end(engine)
    if first_left is None:
        assert not oracle.asked
    else:
        assert oracle.left[0] in (first_left if isinstance(first_left, range) else (first_left,))


class _Slow(_Priced):
    """Moves a clock by a quarter of a second, whatever it says that its guesses cost."""

    clock = 0.0

    def propose(self, asks: Sequence_[Ask]) -> list[Draft]:
        self.clock += 0.25
        return super().propose(asks)


class _Noting(FixedCosts):
    noted: float | None = None

    def observe_beside(self, seconds: float) -> None:
        self.noted = seconds


@pytest.mark.parametrize(("price", "beside"), [(0.25, 0.5), (0.0, 0.75)], ids=["priced", "said to be free"])
def test_the_time_of_guessing_is_counted_once(price: float, beside: float, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, costs = _Slow(price), _Noting([1, 1000], [1.0, 1.0 + 1e-9])
    speculation = Speculation((oracle,), {1: costs}, max_rows=512)
    sequence = make_sequence([5, 6, 7], max_tokens=100)
    engine, _ = make_engine(num_blocks=200, speculation=speculation)
    engine.add(sequence)
    monkeypatch.setattr("shared.engine.proposer_stack.time", SimpleNamespace(perf_counter=lambda: oracle.clock))
    while not oracle.asked:
        engine.step()
    speculation.observe_beside(0.75)
    assert costs.noted == pytest.approx(beside)


STEP_S = 0.01


def guessed_in(account: Account, took: float, gave: float = 0.0, num_steps: int = 5000) -> int:
    """In how many of so many steps guessing was let in, which took and gave so much in each."""
    guessed = 0
    for _ in range(num_steps):
        if not account.is_overdrawn():
            guessed += 1
            account.took(took)
            account.gave(gave)
        account.passed(STEP_S, 1)
    return guessed


@pytest.mark.parametrize("took", [0.0001, 0.0004, 0.001])
def test_guessing_that_gives_nothing_takes_two_thousandths_of_the_time(took: float) -> None:
    share = guessed_in(Account(), took) * took / (5000 * STEP_S)
    assert 0.0017 <= share <= 0.0023 + 3 / 5000


@pytest.mark.parametrize("gave", [0.0006, 0.0019])
def test_what_gives_less_than_it_takes_loses_no_more(gave: float) -> None:
    """However good the chances look that it is chosen by."""
    lost = guessed_in(Account(), 0.002, gave) * (0.002 - gave) / (5000 * STEP_S)
    assert 0.001 <= lost <= 0.0023 + 3 / 5000


def test_what_pays_is_never_held_up() -> None:
    assert guessed_in(Account(), 0.0005, 0.0006) == 5000


@pytest.mark.parametrize(("num_sequences", "steps"), [(1, 3.0), (2, 3.0), (4, 2.0), (16, 0.5)])
def test_what_was_gained_lets_three_steps_or_eight_tokens_time_be_lost(num_sequences: int, steps: float) -> None:
    account = Account()
    account.passed(STEP_S, num_sequences)
    assert not account.is_overdrawn()
    account.gave(1.0)
    account.passed(STEP_S, num_sequences)
    lost = 0.0
    while not account.is_overdrawn():
        account.took(0.0001)
        lost += 0.0001
    assert lost == pytest.approx(steps * STEP_S, abs=0.00015)


def test_who_loses_pauses_and_who_gains_goes_on() -> None:
    """Each proposer has an account of its own, and pays for its own guesses."""
    right, wrong = Oracle(0.0), Oracle(0.0)
    right.name, wrong.name = "right", "wrong"
    stack, step = ProposerStack((wrong, right), max_draft_tokens=4), PlainStep(FREE_ROWS, 2, 2, 512)
    sequences = [make_sequence([5, 6, 7], name=name, max_tokens=9, proposers=(name,)) for name in ("right", "wrong")]
    guessed = {"right": 0, "wrong": 0}
    for _ in range(200):
        stack.begin_step()
        guesses = stack.guess([Ask(sequence, 4) for sequence in sequences], step)
        for guess in guesses.values():
            guess.num_computed = 1
        stack.computed(guesses.values(), 0.2 * len(guesses))
        for guess in guesses.values():
            name = guess.member.proposer.name
            guessed[name] += 1
            token = guess.draft.tokens[0]
            stack.learn(guess, [token, 1] if name == "right" else [token + 1], token_seconds=0.5)
        stack.passed(1.0, 2)
    assert guessed["right"] == 200
    assert guessed["wrong"] < 30, "three steps' time to begin with, and little of 200 steps' time"


@pytest.mark.parametrize(("num_sequences", "gaps"), [(4, [1, 2, 4, 8, 8]), (8, [1, 2, 4, 8, 16, 16])])
def test_looks_of_no_use_come_later_and_later(num_sequences: int, gaps: list[int]) -> None:
    patience = Patience()
    for gap in gaps:
        assert not patience.rests()
        patience.looked(num_sequences, num_computed=0, num_right=0)
        assert [patience.rests() for _ in range(gap)] == [True] * gap


@pytest.mark.parametrize(("computed", "right", "rests"), [(1, 0, False), (0, 2, False), (0, 1, True)])
def test_a_look_was_of_use_if_it_was_computed_or_would_have_been_worth_it(
    computed: int, right: int, rests: bool
) -> None:
    patience = Patience()
    for _ in range(5):
        patience.looked(16, num_computed=0, num_right=0)
    patience.looked(16, computed, right)
    assert patience.rests() is rests


def test_steps_that_compute_prompts_have_no_guesses() -> None:
    speculation = always(Oracle(0.0))
    engine, _ = make_engine(num_blocks=200, speculation=speculation)
    first = make_sequence([5, 6, 7], name="first", max_tokens=60)
    engine.add(first)
    while not sum(speculation.totals()[0]):
        engine.step()
    engine.add(make_sequence([8, 9, 10], name="second", max_tokens=60))
    drafted, num_output = sum(speculation.totals()[0]), first.num_output
    engine.step()
    assert sum(speculation.totals()[0]) == drafted
    assert first.num_output == num_output + 1
    engine.step()
    assert sum(speculation.totals()[0]) > drafted


def test_what_disturbs_one_size_makes_sizes_dearer_that_did_not_run() -> None:
    costs = StepCosts([1, 4, 8], [1.0, 4.0, 8.0])
    for _ in range(100):
        costs.observe_step(4, 4.0)
        costs.observe_step(5, 5.0)
    for _ in range(40):
        costs.observe_step(4, 5.6)
    assert costs.step(4) > 5.0
    assert costs.larger_step(5, 4) / costs.step(4) > 1.15, "a row looks no cheaper than it was"


def test_one_step_that_was_disturbed_does_not_end_guessing() -> None:
    account = Account()
    account.passed(STEP_S, 1)
    assert not account.is_overdrawn()
    account.took(5.0)
    paused = 0
    while account.is_overdrawn():
        paused += 1
        account.passed(STEP_S, 1)
    assert 63 <= paused <= 65


class _Timed(Speculation):
    """Sees steps that take a second and `row_seconds` for each guess in them."""

    row_seconds = 0.1

    def observe_step(self, plan: Sequence_[Scheduled], seconds: float) -> None:
        super().observe_step(plan, 1.0 + self.row_seconds * sum(len(item.draft) for item in plan))


def timed(oracle: Oracle) -> _Timed:
    """With a table by which a guess takes a tenth of a step."""
    return _Timed((oracle,), {1: FixedCosts([1, 1000], [1.0, 1.0 + 99.9])}, max_rows=512)


@pytest.mark.parametrize(("row_seconds", "least", "most"), [(0.1, 500, 1000), (1.2, 1, 130)], ids=["as said", "dearer"])
def test_rows_that_are_dearer_than_they_are_said_to_be_are_noticed(row_seconds: float, least: int, most: int) -> None:
    """Every guess looks worth its row; its account sees whether it is."""
    oracle = Oracle(0.7)
    speculation = timed(oracle)
    speculation.row_seconds = row_seconds
    engine, _ = make_engine(num_blocks=400, speculation=speculation)
    sequence = make_sequence([5, 6, 7], max_tokens=3000)
    oracle.propose([Ask(sequence, 1)])  # which works out all its answer, and that takes seconds
    engine.add(sequence)
    for _ in range(1000):
        engine.step()
    assert least <= speculation.counts["oracle"].drafted[0] <= most


def test_what_becomes_right_is_noticed_after_a_long_time_in_vain() -> None:
    oracle = _Priced(0.0)
    oracle.wrong = 1.0
    speculation = timed(oracle)
    engine, _ = make_engine(num_blocks=1000, speculation=speculation)
    sequences = [make_sequence([5, 6, 7], name=str(index), seed=index, max_tokens=280) for index in range(8)]
    for sequence in sequences:
        engine.add(sequence)
    while sequences[0].num_output < 160:
        engine.step()
    assert len(oracle.asked) < 160
    before, oracle.wrong = engine.load().steps, 0.0
    run_to_end(engine)
    assert engine.load().steps - before < 100
