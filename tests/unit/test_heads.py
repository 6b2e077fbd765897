"""Heads on the target's hidden rows: the native ones against the module they were trained as, and real engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.distill.heads import Heads
from shared.engine.proposer import Ask, Draft
from shared.engine.sampler import SampleInput, sample
from shared.model.source import ModelSource
from shared.speculative.draft_vocabulary import DraftVocabulary
from shared.speculative.heads import HeadsProposer
from shared.speculative.registry import load_proposer
from tests.drafts import PARAMS, context_of, engine_of, generate, target_of, write_draft, write_heads
from tests.engine_fakes import make_sequence
from tests.model_checkpoints import VOCAB_SIZE, tokens
from tests.speculation_fakes import Confident, NeverResting, always


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return target_of(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def heads(target: ModelSource, folder: Path) -> Heads:
    return write_heads(folder, target, num_layers=2)


@pytest.fixture(params=["native", "cpu"], ids=["kernels", "torch"])
def on(request: pytest.FixtureRequest) -> str:
    """What computes the target and its heads."""
    return str(request.param)


@pytest.fixture
def proposer(target: ModelSource, folder: Path, heads: Heads, on: str) -> HeadsProposer:
    made = load_proposer("heads", context_of(target, folder, on))
    assert isinstance(made, HeadsProposer)
    return made


def state(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def chains(heads: Heads, hidden: np.ndarray, ask: Ask, draft: Draft) -> list[np.ndarray]:
    """The module's logits over all ids at each place of a draft, -inf for ids that the heads do not know."""
    rows, token, found = torch.from_numpy(hidden)[None], ask.sequence.tokens[-1], []
    for guess in draft.tokens:
        with torch.no_grad():
            rows = heads(rows, torch.tensor([token]))
            whole = np.full(VOCAB_SIZE, -np.inf, dtype=np.float32)
            whole[heads.head_ids.numpy()] = heads.logits(rows)[0].numpy()
        found.append(whole)
        token = guess
    return found


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_guesses_are_what_the_trained_module_would_draw(
    params: dict[str, Any], target: ModelSource, heads: Heads, proposer: HeadsProposer, on: str
) -> None:
    """The kernels round weights and activations to 8 bits, which may turn a close race; in float32 few are so close."""
    right = total = 0
    asks = []
    for index in range(24):
        sequence = make_sequence(tokens(9 + index, seed=index), max_tokens=50, seed=index, **params)
        sequence.tokens += tokens(5, seed=100 + index)
        sequence.num_computed = len(sequence.tokens) - 1
        asks.append(Ask(sequence, 1 + index % 4, state(index, target.config.hidden_size)))
    for ask, draft in zip(asks, proposer.propose(asks), strict=True):
        own = ask.sequence
        assert ask.hidden is not None
        assert 1 <= len(draft.tokens) <= ask.max_tokens
        output = own.tokens[own.prompt_len :]
        for place, logits in enumerate(chains(heads, ask.hidden, ask, draft)):
            request = SampleInput(own.params, 0, own.tokens[: own.prompt_len], [*output, *draft.tokens[:place]])
            right += draft.tokens[place] == sample(logits, request)
            total += 1
    assert right >= (0.85 if on == "native" else 0.97) * total


def test_confidences_are_the_heads_own_probabilities(
    target: ModelSource, heads: Heads, proposer: HeadsProposer
) -> None:
    sequence = make_sequence(tokens(12, seed=9))
    ask = Ask(sequence, 1, state(1, target.config.hidden_size))
    (draft,) = proposer.propose([ask])
    assert ask.hidden is not None
    (logits,) = chains(heads, ask.hidden, ask, draft)
    wanted = torch.from_numpy(logits.astype(np.float64)).softmax(0)[draft.tokens[0]]
    assert draft.confidences[0] == pytest.approx(float(wanted), rel=0.1)


def test_a_guess_is_the_same_whoever_is_guessed_for_beside_it(target: ModelSource, proposer: HeadsProposer) -> None:
    asks = [
        Ask(make_sequence(tokens(6, seed=index), seed=index, temperature=1.0), 4, state(index, 64))
        for index in range(9)
    ]
    together = proposer.propose(asks)
    assert together == [proposer.propose([ask])[0] for ask in asks]


def test_without_a_hidden_row_nothing_is_guessed(proposer: HeadsProposer) -> None:
    first, second = (make_sequence(tokens(6, seed=seed)) for seed in (1, 2))
    drafts = proposer.propose([Ask(first, 3), Ask(second, 3, state(2, 64))])
    assert [bool(draft.tokens) for draft in drafts] == [False, True]


def test_rows_of_another_width_are_refused(proposer: HeadsProposer) -> None:
    with pytest.raises(ValueError, match="width"):
        proposer.propose([Ask(make_sequence(tokens(6)), 1, state(1, 48))])


# --- with an engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_tokens_are_those_without_heads(
    params: dict[str, Any], batch: int, target: ModelSource, proposer: HeadsProposer, on: str
) -> None:
    speculation = always(Confident(proposer), max_draft_tokens=4)
    with_heads = generate(engine_of(target, speculation, on=on), batch, **params)
    assert with_heads == generate(engine_of(target, None, on=on), batch, **params)
    drafted, accepted = speculation.totals()
    assert sum(drafted) > 0
    if batch == 32 and params["temperature"] == 1.0:
        assert sum(accepted) > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_the_same_after_preemption(
    temperature: float, target: ModelSource, proposer: HeadsProposer, on: str
) -> None:
    """A sequence that was preempted is computed anew, and its last hidden row with it."""
    speculation = always(Confident(proposer), max_draft_tokens=4)
    small = engine_of(target, speculation, num_blocks=20, on=on)
    with_heads = generate(small, 16, temperature=temperature)
    assert small.load().preemptions > 0
    assert sum(speculation.totals()[0]) > 0
    assert with_heads == generate(engine_of(target, None, on=on), 16, temperature=temperature)


class _Watching:
    """Notes the hidden rows it is asked with, and guesses nothing."""

    name = "watching"

    def __init__(self) -> None:
        self.rows: dict[int, np.ndarray] = {}

    def seconds(self, num_sequences: int) -> float:
        return 0.0

    def propose(self, asks: list[Ask]) -> list[Draft]:
        for ask in asks:
            if ask.hidden is not None:
                self.rows[len(ask.sequence.tokens)] = ask.hidden
        return [Draft() for _ in asks]

    def forget(self, sequence: object) -> None:
        pass


def test_the_hidden_row_is_the_one_that_the_last_token_was_drawn_from(target: ModelSource) -> None:
    """The target's logits of that row have the last token as the best one."""
    watching = _Watching()
    speculation = always(watching)  # type: ignore[arg-type]
    speculation.patience = NeverResting()
    [output] = generate(engine_of(target, speculation), 1, temperature=0.0)
    prompt_len = 5
    context = context_of(target, None)
    assert len(watching.rows) >= 10
    for num_tokens, row in watching.rows.items():
        logits = context.model.logits(torch.from_numpy(row)[None])[0]
        assert int(logits.argmax()) == output[num_tokens - prompt_len - 1]


@pytest.mark.usefixtures("heads")
def test_another_kind_of_draft_is_left_to_its_own_proposer(target: ModelSource, folder: Path, tmp_path: Path) -> None:
    layers = write_draft(tmp_path / "layers", target, 1)
    assert load_proposer("heads", context_of(target, layers)) is None
    assert load_proposer("draft", context_of(target, folder)) is None
    assert load_proposer("heads", context_of(target, None)) is None


@pytest.mark.parametrize(("token", "probability"), [(4, 0.25), (9, 0.75), (3, 0.0), (5, 0.0), (10, 0.0)])
def test_what_a_draft_cannot_say_has_no_probability(token: int, probability: float) -> None:
    vocabulary = DraftVocabulary(np.array([4, 9], dtype=np.int32), 12)
    logits = np.log(np.array([0.25, 0.75], dtype=np.float32))
    assert vocabulary.confidence(logits, token) == pytest.approx(probability)
