"""Distillation of a tiny target: what is written, learnt, kept over interruptions and exported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.speculation import PROMPTS_OF_A_ROUND
from benchmarks.speculation_prompts import KINDS, TOPICS
from shared.config import EngineSettings
from shared.distill.corpus import Prompt, asked, encode_all, load_prompts
from shared.distill.heads import NUM_PLACES, Heads, HeadsCourse
from shared.distill.on_policy import DRAFT_TOKENS, DraftWriter
from shared.distill.options import DistillOptions
from shared.distill.rows import Draft, Piece, make_batch, pack
from shared.distill.run import (
    DRAFTING,
    KEEPING,
    LEARNING,
    SHARPENING,
    WRITING,
    Progress,
    distill,
    initial_layers,
    likeliest_ids,
)
from shared.distill.student import Student, read_frozen, read_layers, refuse_target
from shared.distill.target import Target, best_of
from shared.distill.texts import Text, TextStore, TextWriter, temperature_of
from shared.errors import ConfigurationError
from shared.model.draft import KEY, resolve_draft
from shared.model.draft_kind import DraftKind
from shared.model.source import ModelSource, resolve
from shared.tokenizer.loader import load_tokenizer
from tests.model_checkpoints import random_model, write_llama_gguf
from tests.tiny_model import LAYERS, VOCAB, write_tiny_model

SETTINGS = EngineSettings(threads=1)


def nothing(_: object) -> None:
    """A report nobody reads."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve(str(write_tiny_model(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def target(source: ModelSource) -> Target:
    return Target(source, SETTINGS, 128, nothing)


@pytest.fixture(scope="module")
def texts(source: ModelSource, target: Target, tmp_path_factory: pytest.TempPathFactory) -> list[Text]:
    store = TextStore(tmp_path_factory.mktemp("texts"))
    writer(source, target).write(store, 1000, nothing)
    return store.read_until(1000)


def writer(source: ModelSource, target: Target) -> TextWriter:
    codec = load_tokenizer(source)
    prompts = [asked(f"{number}?") for number in range(48)]
    return TextWriter(target, encode_all(prompts, codec, 64), codec.eos_ids, seed=3, max_new=24)


@pytest.fixture
def options(tmp_path: Path) -> DistillOptions:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"say {number}" for number in range(64)))
    return DistillOptions(
        tmp_path / "draft",
        tmp_path / "work",
        prompts,
        kind=DraftKind.LAYERS,
        num_tokens=1200,
        num_layers=2,
        head_size=400,
        epochs=3,
        on_policy_steps=3,
        learning_rate=3e-3,
        batch_rows=4,
        row_tokens=128,
        max_new_tokens=32,
        max_prompt_tokens=64,
        checkpoint_s=0,
    )


# --- prompts and texts ------------------------------------------------------------------------------------------------


def test_the_packaged_prompts_are_many_and_distinct_and_some_are_held_out() -> None:
    prompts = load_prompts(None)
    assert len({prompt.digest for prompt in prompts}) == len(prompts) > 10_000
    assert 0.03 < sum(prompt.is_held_out for prompt in prompts) / len(prompts) < 0.1
    gaps = re.compile(r"\{(topic|text|note|code|task|person|thing|one|two|fn|arg|it|field|n|cls|town|house|year)\}")
    assert not [prompt for prompt in prompts if gaps.search(prompt.text) or gaps.search(str(prompt.messages))]


def test_what_speculation_is_measured_with_is_not_trained_on() -> None:
    packaged = [prompt.text or prompt.messages[0][1] for prompt in load_prompts(None)]
    assert not [topic for topic in TOPICS if any(topic in text for text in packaged)]
    measured = {make(index) for make in KINDS.values() for index in range(PROMPTS_OF_A_ROUND)}
    assert measured.isdisjoint(packaged)


def test_a_file_of_prompts_may_hold_lines_and_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    lines = ['{"prompt": "a"}', '{"text": "b"}', '{"messages": [{"role": "user", "content": "c"}]}']
    path.write_text("\n".join([*lines, "", *(f"plain {number}" for number in range(60))]))
    prompts = load_prompts(path)
    assert prompts[:3] == [asked("a"), Prompt(text="b"), asked("c")]
    assert len(prompts) == 63


@pytest.mark.parametrize("line", ['{"prompt": 1}', "{", '{"messages": []}', "only one prompt"])
def test_a_bad_file_of_prompts_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts"
    path.write_text(line)
    with pytest.raises(ConfigurationError, match="prompts"):
        load_prompts(path)


def test_each_prompt_is_answered_at_each_temperature_before_it_comes_again_sampled() -> None:
    of_one = [temperature_of(number, 10) for number in range(4, 60, 10)]
    assert sorted(of_one[:3]) == [0.0, 0.7, 1.0]
    assert 0.0 not in of_one[3:]


def test_distributions_are_those_of_one_pass_over_the_finished_text(target: Target, texts: list[Text]) -> None:
    for text in texts[:6]:
        assert len(text.expected) == text.num_generated > 0
        start, tokens = text.prompt_len, text.tokens.tolist()
        again = target.score(tokens, [start], [tokens[start:]])
        np.testing.assert_array_equal(again.ids[:-1], text.expected.ids[1:])
        np.testing.assert_array_equal(again.logprobs[:-1], text.expected.logprobs[1:])


def test_greedy_texts_take_the_likeliest_token(texts: list[Text]) -> None:
    greedy = [text for number, text in enumerate(texts) if temperature_of(number, 48) == 0]
    assert greedy
    for text in greedy:
        np.testing.assert_array_equal(text.tokens[text.prompt_len :], text.expected.ids[:, 0])


def test_texts_are_the_same_when_writing_is_interrupted(
    source: ModelSource, target: Target, texts: list[Text], tmp_path: Path
) -> None:
    store = TextStore(tmp_path / "texts")

    def stop_late(done: int) -> None:
        if done > 800:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer(source, target).write(store, 1000, stop_late)
    assert store.num_shards == 1
    writer(source, Target(source, SETTINGS, 128, nothing)).write(store, 1000, nothing)
    again = store.read_until(1000)
    assert [text.tokens.tolist() for text in again] == [text.tokens.tolist() for text in texts]
    assert [text.is_held_out for text in again] == [text.is_held_out for text in texts]


# --- the student ------------------------------------------------------------------------------------------------------


def whole_student(source: ModelSource) -> Student:
    """All layers of the target and all its ids: it has to compute what the target computes."""
    config = source.config
    student = Student(config, config.num_layers, read_frozen(source, np.arange(config.vocab_size)))
    student.load_state_dict(read_layers(source, range(config.num_layers)))
    return student


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_student_of_all_layers_computes_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    model = random_model("LlamaForCausalLM")
    path = tmp_path / "model.gguf" if kind == "gguf" else tmp_path
    write_llama_gguf(path, model) if kind == "gguf" else model.save_pretrained(path)
    student = whole_student(resolve(str(path)))
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, 131, (1, 20)))
    positions, mask = torch.arange(20)[None], torch.ones(20, 20).tril().bool()[None]
    with torch.no_grad():
        hidden, _ = student(ids, positions, mask)
        wanted = model(ids).logits[0]
    torch.testing.assert_close(student.logits(hidden[0]), wanted, rtol=1e-4, atol=1e-4)


def test_packed_texts_and_drafts_are_computed_as_if_alone(source: ModelSource, texts: list[Text]) -> None:
    student = whole_student(source)
    text, other = texts[0], texts[1]
    tokens, cut = [5, 6, 7], text.prompt_len + 2
    draft = Draft(cut, tokens, text.expected[0:3])
    batch = make_batch(
        [[Piece(other), Piece(text, (draft, Draft(cut + 1, [9], text.expected[0:1])))]], 256, torch.device("cpu")
    )
    alone = torch.tensor([[*text.tokens[:cut].tolist(), *tokens]])
    length = alone.shape[1]
    with torch.no_grad():
        packed, _ = student(batch.token_ids, batch.positions, batch.mask)
        single, _ = student(alone, torch.arange(length)[None], torch.ones(length, length).tril().bool()[None])
    first = len(other.tokens)
    torch.testing.assert_close(packed[0, first : first + cut], single[0, :cut], rtol=1e-4, atol=1e-4)
    first += len(text.tokens)
    torch.testing.assert_close(packed[0, first : first + 3], single[0, cut:], rtol=1e-4, atol=1e-4)
    assert batch.is_draft.sum() == 4
    assert len(batch.chosen) == len(batch.expected) == other.num_generated + text.num_generated + 4


def test_every_text_is_packed_once(texts: list[Text]) -> None:
    rows = pack([Piece(text) for text in texts], 128)
    assert sum(len(row) for row in rows) == len(texts)
    assert all(sum(piece.num_tokens for piece in row) <= 128 for row in rows)
    assert len(rows) < len(texts)


def test_drafts_are_judged_as_the_target_judges_their_whole_text(
    source: ModelSource, target: Target, texts: list[Text]
) -> None:
    student = whole_student(source)
    drafts = DraftWriter(student, target, texts, 128, seed=1)
    [[piece]] = drafts.pieces(0, 1)
    assert piece.drafts
    assert [[other.tokens for other in again.drafts] for [again] in drafts.pieces(0, 1)] == [
        [draft.tokens for draft in piece.drafts]
    ]
    for draft in piece.drafts:
        assert len(draft.tokens) == DRAFT_TOKENS
        text = [*piece.text.tokens[: draft.cut].tolist(), *draft.tokens]
        length = len(text)
        with torch.no_grad():
            rows, _ = student(
                torch.tensor([text]), torch.arange(length)[None], torch.ones(length, length).tril().bool()[None]
            )
        wanted = best_of(student.logits(rows[0, draft.cut :]))
        found = np.sort(draft.expected.ids, axis=1)
        shared = np.mean([np.isin(a, b).mean() for a, b in zip(found, wanted.ids, strict=True)])
        assert shared > 0.9  # the target may compute with quantised activations


def test_targets_of_another_form_are_refused(source: ModelSource) -> None:
    with pytest.raises(ConfigurationError, match="Llama"):
        refuse_target(replace(source.config, qkv_bias=True))


def test_students_start_from_the_first_layers_of_the_target() -> None:
    assert [initial_layers(*counts) for counts in ((1, 30), (3, 30), (3, 2))] == [[0], [0, 1, 2], [0, 1, 1]]


# --- the whole --------------------------------------------------------------------------------------------------------


def weights(options: DistillOptions) -> dict[str, torch.Tensor]:
    return load_file(options.out / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stopping(phase: str, done: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.phase == phase and progress.done >= done:
            raise KeyboardInterrupt

    return report


def test_a_run_teaches_and_exports_a_draft_and_equal_seeds_give_equal_drafts(
    source: ModelSource, options: DistillOptions, tmp_path: Path
) -> None:
    phases: list[str] = []
    recipe = distill(source, SETTINGS, options, lambda progress: phases.append(progress.phase))
    assert {WRITING, LEARNING, SHARPENING, DRAFTING} <= set(phases)
    measured = json.loads((options.out / "recipe.json").read_text())["held_out"]
    assert measured == recipe["held_out"]
    assert measured[LEARNING]["acceptance"] > measured["initial"]["acceptance"] + 0.02
    assert measured[SHARPENING]["acceptance"] > measured["initial"]["acceptance"] + 0.02
    assert measured[DRAFTING]["acceptance"] > measured["initial"]["acceptance"] + 0.02
    tensors = weights(options)
    config = json.loads((options.out / "config.json").read_text())
    assert config[KEY] == {
        **{"version": 2, "kind": "layers", "exit_layer": 0},
        **{"target_sha256": source.revision, "vocab_size": VOCAB},
    }
    assert config["num_hidden_layers"] == 2 < LAYERS
    head_ids = tensors.pop("head_ids")
    assert head_ids.dtype == torch.int32
    assert head_ids.tolist() == sorted(set(head_ids.tolist()))
    assert len(head_ids) == options.head_size
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    student = Student(source.config, 2, read_frozen(source, head_ids.long().numpy()))
    student.load_state_dict(tensors)

    again = replace(options, out=tmp_path / "again", work=tmp_path / "again.work")
    distill(source, SETTINGS, again, nothing)
    assert same(weights(again), weights(options))
    other = replace(options, out=tmp_path / "other", work=tmp_path / "other.work", seed=1)
    distill(source, SETTINGS, other, nothing)
    assert not same(weights(other), weights(options))


def test_an_interrupted_run_ends_with_the_same_weights(
    source: ModelSource, options: DistillOptions, tmp_path: Path
) -> None:
    whole = replace(options, out=tmp_path / "whole", work=tmp_path / "whole.work")
    distill(source, SETTINGS, whole, nothing)
    for phase, done in ((WRITING, 900), (LEARNING, 2), (LEARNING, 5), (SHARPENING, 2), (DRAFTING, 2)):
        with pytest.raises(KeyboardInterrupt):
            distill(source, SETTINGS, options, stopping(phase, done))
        assert not options.out.exists()
    steps: list[Progress] = []
    recipe = distill(source, SETTINGS, options, steps.append)
    assert next(step.done for step in steps if step.phase == DRAFTING) > 1
    assert same(weights(options), weights(whole))
    assert isinstance(recipe["held_out"], dict)
    assert list(recipe["held_out"]) == ["initial", LEARNING, SHARPENING, DRAFTING]


def test_a_work_folder_of_another_run_is_refused(source: ModelSource, options: DistillOptions) -> None:
    with pytest.raises(KeyboardInterrupt):
        distill(source, SETTINGS, options, stopping(LEARNING, 2))
    with pytest.raises(ConfigurationError, match="another seed"):
        distill(source, SETTINGS, replace(options, seed=9), nothing)
    with pytest.raises(ConfigurationError, match="another learning_rate"):
        distill(source, SETTINGS, replace(options, learning_rate=1e-4), nothing)


def test_texts_that_are_too_few_to_hold_some_out_say_how_many_tokens_to_try(
    source: ModelSource, options: DistillOptions
) -> None:
    asked_last = sorted((f"say {number}" for number in range(64)), key=lambda text: asked(text).is_held_out)
    assert options.prompts
    options.prompts.write_text("\n".join(asked_last))
    few, steps = replace(options, num_tokens=2), list[Progress]()
    with pytest.raises(ConfigurationError, match=r"--tokens 2 makes \d+ texts, 0 of them held out.*Try --tokens 8;"):
        distill(source, SETTINGS, few, nothing)
    distill(source, SETTINGS, options, steps.append)
    assert next(step.done for step in steps if step.phase == WRITING) >= 2, "what was written is kept"


def test_the_head_has_the_ids_the_target_expects_most(texts: list[Text]) -> None:
    mass = np.zeros(VOCAB)
    for text in texts:
        for ids, logprobs in zip(text.expected.ids, text.expected.logprobs, strict=True):
            for token, logprob in zip(ids, logprobs, strict=True):
                mass[token] += np.exp(float(logprob))
    wanted = sorted(range(VOCAB), key=lambda token: -mass[token])[:20]
    assert likeliest_ids(texts, VOCAB, 20).tolist() == sorted(wanted)


@pytest.mark.parametrize("change", [{"num_layers": 5}, {"num_tokens": 0}, {"epochs": 0.0}, {"seed": -1}])
def test_bad_options_are_refused(options: DistillOptions, change: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        replace(options, **change)  # type: ignore[arg-type]


# --- heads ------------------------------------------------------------------------------------------------------------


def of_heads(options: DistillOptions) -> DistillOptions:
    return replace(options, kind=DraftKind.HEADS, num_layers=1, epochs=8, on_policy_steps=0)


def test_heads_learn_are_exported_and_come_out_the_same_after_interruptions(
    source: ModelSource, options: DistillOptions, tmp_path: Path
) -> None:
    options = of_heads(options)
    whole = replace(options, out=tmp_path / "whole", work=tmp_path / "whole.work")
    held_out = distill(source, SETTINGS, whole, nothing)["held_out"]
    assert isinstance(held_out, dict)
    assert list(held_out) == ["initial", LEARNING, SHARPENING]
    assert held_out[SHARPENING]["acceptance"] > held_out["initial"]["acceptance"] + 0.02
    assert len(held_out[SHARPENING]["by_place"]) == NUM_PLACES
    tensors = weights(whole)
    head_ids = tensors.pop("head_ids").long().numpy()
    heads = Heads(source.config, 1, source.config.intermediate_size, read_frozen(source, head_ids))
    heads.load_state_dict(tensors)
    assert resolve_draft(whole.out, source).kind is DraftKind.HEADS

    for phase, done in ((WRITING, 900), (LEARNING, 3), (SHARPENING, 2)):
        with pytest.raises(KeyboardInterrupt):
            distill(source, SETTINGS, options, stopping(phase, done))
    distill(source, SETTINGS, options, nothing)
    assert same(weights(options), weights(whole))


def test_a_chain_is_taught_what_the_target_expects_where_it_stands(
    source: ModelSource, target: Target, texts: list[Text]
) -> None:
    """Each place of a chain beside the obvious way: text by text, token by token, from the states of one pass."""
    head_ids = np.arange(VOCAB)
    heads = Heads(source.config, 1, 64, read_frozen(source, head_ids))
    course = HeadsCourse(heads, target, texts, 1, nothing)
    batches = course.epoch(0)
    trained = sum(max(0, text.num_generated - 1) for text in texts if not text.is_held_out)
    assert sorted(np.concatenate(batches).tolist()) == sorted(set(np.concatenate(batches).tolist()))
    assert sum(map(len, batches)) == trained
    assert [batch.tolist() for batch in course.epoch(0)] == [batch.tolist() for batch in batches]
    first = next(index for index, text in enumerate(texts) if text.num_generated > 4 and not text.is_held_out)
    at = sum(text.num_generated for text in texts[:first])
    text = texts[first]
    with torch.no_grad():
        lessons = course.lessons(np.array([at]))
        states = torch.from_numpy(target.states(text.tokens.tolist(), len(text.tokens))).float()
        state = states[text.prompt_len - 1][None]
        for place, lesson in enumerate(lessons):
            token = torch.tensor([int(text.tokens[text.prompt_len + place])])
            with torch.autocast("cpu", torch.bfloat16):
                state = heads(state, token)
                logits = heads.logits(state)
            assert torch.equal(logits, lesson.logits)
            assert lesson.expected.best.item() == text.expected.ids[place + 1, 0]
    assert [lesson.weight for lesson in lessons] == sorted((lesson.weight for lesson in lessons), reverse=True)


@pytest.mark.parametrize("kind", DraftKind)
def test_a_draft_keeps_the_likeliest_of_its_ids(
    kind: DraftKind, source: ModelSource, options: DistillOptions, tmp_path: Path
) -> None:
    all_ids = replace(of_heads(options), kind=kind, out=tmp_path / "all")
    held_out = distill(source, SETTINGS, all_ids, nothing)["held_out"]
    fewer = replace(all_ids, kept_ids=100, out=tmp_path / "fewer")
    assert isinstance(held_out, dict)
    found = distill(source, SETTINGS, fewer, nothing)["held_out"]
    assert isinstance(found, dict)
    assert found[SHARPENING] == held_out[SHARPENING]
    assert 0 < found[KEEPING]["acceptance"] < held_out[SHARPENING]["acceptance"]
    before, after = weights(all_ids), weights(fewer)
    ids = set(before.pop("head_ids").tolist())
    kept = after.pop("head_ids").tolist()
    assert len(kept) == 100
    assert kept == sorted(ids.intersection(kept))
    assert same(before, after)
    assert len(resolve_draft(fewer.out, source).head_ids) == 100


def test_a_draft_behind_the_targets_first_layers_has_its_own_only(
    source: ModelSource, options: DistillOptions, tmp_path: Path
) -> None:
    options = replace(options, num_layers=1, exit_layer=1)
    whole = replace(options, out=tmp_path / "whole", work=tmp_path / "whole.work")
    held_out = distill(source, SETTINGS, whole, nothing)["held_out"]
    assert isinstance(held_out, dict)
    assert held_out[DRAFTING]["acceptance"] > held_out["initial"]["acceptance"] + 0.02
    assert not any(".layers.1." in name for name in weights(whole))
    draft = resolve_draft(whole.out, source)
    assert (draft.exit_layer, draft.num_layers) == (1, 2)
    with pytest.raises(KeyboardInterrupt):
        distill(source, SETTINGS, options, stopping(SHARPENING, 2))
    distill(source, SETTINGS, options, nothing)
    assert same(weights(options), weights(whole))


def test_an_exit_behind_the_last_layer_is_refused(source: ModelSource, options: DistillOptions) -> None:
    with pytest.raises(ConfigurationError, match="--exit-layer"):
        distill(source, SETTINGS, replace(options, exit_layer=LAYERS), nothing)
    with pytest.raises(ConfigurationError, match="--exit-layer"):
        replace(options, exit_layer=-1)
    for count in (0, options.head_size + 1):
        with pytest.raises(ConfigurationError, match="--keep-ids"):
            replace(options, kept_ids=count)


def test_heads_do_not_learn_from_drafts_of_their_own(options: DistillOptions) -> None:
    with pytest.raises(ConfigurationError, match="--on-policy"):
        replace(of_heads(options), on_policy_steps=3)
    with pytest.raises(ConfigurationError, match="--exit-layer"):
        replace(of_heads(options), exit_layer=1)
