"""The draft that comes with the package: found for its model, small enough, with its recipe, and right often enough."""

from __future__ import annotations

import json

import pytest

from shared.engine.engine import Engine
from shared.engine.runner import NativeRunner
from shared.engine.scheduler import SchedulerLimits
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.model.draft import DraftSource
from shared.model.draft_kind import DraftKind
from shared.model.source import ModelSource, resolve
from shared.speculative.context import ProposerContext
from shared.speculative.drafts import SHIPPED, find_draft
from shared.speculative.registry import load_proposer
from shared.tokenizer.loader import load_tokenizer
from tests.drafts import target_of
from tests.engine_fakes import make_sequence, output_of, run_to_end
from tests.native_models import native
from tests.speculation_fakes import always

MOST_BYTES = 16 << 20
QUESTIONS = ("How do tides work?", "What should I cook for six friends?", "Why do cats purr?", "Who was Ada Lovelace?")


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return resolve("smollm2")


@pytest.fixture(scope="module")
def draft(source: ModelSource) -> DraftSource:
    found = find_draft("auto", source)
    assert found is not None
    return found


def test_it_is_small_and_says_how_it_was_made(draft: DraftSource) -> None:
    assert draft.path.parent == SHIPPED
    assert sum(file.stat().st_size for file in draft.path.iterdir()) <= MOST_BYTES
    recipe = json.loads((draft.path / "recipe.json").read_text())
    assert recipe["kind"] == DraftKind.HEADS == draft.kind
    measured = recipe["held_out"]
    assert measured["total variation"]["acceptance"] > measured["forward KL"]["acceptance"] > 0.4


@pytest.mark.parametrize("name", ["auto", "none"])
def test_another_model_has_none(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert find_draft(name, target_of(tmp_path_factory.mktemp("other"))) is None


def test_none_is_none_where_one_is_shipped(source: ModelSource) -> None:
    assert find_draft("none", source) is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_guesses_right_where_the_model_answers_questions(
    temperature: float, source: ModelSource, draft: DraftSource
) -> None:
    """Less than in its recipe, which is of longer texts: answers begin with facts and repeat themselves later."""
    config = source.config
    layout = KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, 16, dtype="float32", k_transposed=True)
    model, codec = native(source, threads=2), load_tokenizer(source)
    answers = []
    for guessing in (False, True):
        proposer = load_proposer("heads", ProposerContext(source, model, layout, 64, draft)) if guessing else None
        speculation = always(proposer, max_draft_tokens=3) if proposer else None
        engine = Engine(NativeRunner(model, KVCache(layout, 64)), SchedulerLimits(), speculation=speculation)
        sequences = []
        for index, question in enumerate(QUESTIONS):
            text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            ids = codec.encode(text, allow_special=True)
            sequences.append(make_sequence(ids, name=str(index), max_tokens=64, temperature=temperature, seed=index))
            engine.add(sequences[-1])
        run_to_end(engine)
        answers.append([output_of(sequence) for sequence in sequences])
    assert answers[0] == answers[1]
    assert speculation is not None
    (first_drafted, *_), (first_accepted, *_) = speculation.totals()
    assert first_drafted > 100
    assert first_accepted > 0.25 * first_drafted
