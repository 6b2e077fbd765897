"""The whole distillation, phase after phase; each goes on where an interrupted run stopped.

1. The target writes texts (`texts`), which are kept in the work folder.
2. The student, heads or layers, learns the target's distributions on them: forward KL, which learns fast because every
   id counts.
3. It goes on with total variation on the same texts: 1 - acceptance itself, which gives up what would be refused.
4. Layers learn on drafts of their own that the target judges, with total variation too.
5. The draft is exported, with the likeliest of the ids it has learnt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.config import EngineSettings
from shared.distill.checkpoint import Notes, load_checkpoint, refuse_other_run, save_checkpoint
from shared.distill.corpus import digest_of, encode_all, load_prompts
from shared.distill.export import export_draft
from shared.distill.heads import Heads, HeadsCourse
from shared.distill.lessons import Course
from shared.distill.on_policy import DraftWriter
from shared.distill.options import DistillOptions
from shared.distill.student import LayersCourse, Student, keep_ids, read_frozen, read_layers, refuse_target
from shared.distill.target import Target
from shared.distill.texts import Text, TextStore, TextWriter
from shared.distill.training import Quality, Trainer
from shared.errors import ConfigurationError
from shared.model.draft_kind import DraftKind
from shared.model.source import ModelSource, read_json
from shared.tokenizer.loader import load_tokenizer

LOADING, WRITING, READING = "loading", "writing texts", "reading texts"
LEARNING, SHARPENING, DRAFTING, KEEPING = "forward KL", "total variation", "on-policy", "fewer ids"
_SHARPENING_SHARE = 0.3
_TESTS = 20
"""How often a phase is measured on held-out texts while it runs."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: `done` of `total` tokens or steps of a phase. `quality` is the newest measure."""

    phase: str
    done: int
    total: int
    loss: float | None = None
    quality: Quality | None = None


Report = Callable[[Progress], None]


def distill(
    source: ModelSource, settings: EngineSettings, options: DistillOptions, report: Report
) -> dict[str, object]:
    """Make the draft; the recipe that is exported with it. Blocking, and may be repeated after an interruption.

    Raises ConfigurationError or ModelFormatError with what to do.
    """
    refuse_target(source.config)
    if options.exit_layer >= source.config.num_layers:
        raise ConfigurationError(
            f"--exit-layer is {options.exit_layer}: {source.name} has {source.config.num_layers} layers"
        )
    began = time.monotonic()
    options.work.mkdir(parents=True, exist_ok=True)
    max_tokens = options.row_tokens
    target = Target(source, settings, max_tokens, lambda share: report(Progress(LOADING, round(100 * share), 100)))
    texts = _texts(source, target, options, report)
    run = _Training(target, settings.device, texts, options, report)
    notes = run.go(began)
    recipe = {
        **options.of_texts(),
        **options.of_weights(),
        "kept_ids": options.kept_ids,
        "prompts": str(options.prompts or "packaged"),
    }
    recipe |= {"target": source.name, "num_texts": len(texts), "held_out": notes.measured, "seconds": notes.seconds}
    export_draft(options.out, options.kind, run.student, source, recipe)
    return recipe


def _texts(source: ModelSource, target: Target, options: DistillOptions, report: Report) -> list[Text]:
    codec = load_tokenizer(source)
    prompts = load_prompts(options.prompts)
    identity = {**options.of_texts(), "target": source.revision, "prompts": digest_of(prompts)}
    _claim(options.work / "texts.json", identity)
    store = TextStore(options.work / "texts")
    encoded = encode_all(prompts, codec, options.max_prompt_tokens)
    writer = TextWriter(target, encoded, codec.eos_ids, options.seed, options.max_new_tokens)
    writer.write(store, options.num_tokens, lambda done: report(Progress(WRITING, done, options.num_tokens)))
    return store.read_until(options.num_tokens)


def _claim(path: Path, identity: Mapping[str, object]) -> None:
    """The texts of the work folder belong to these options; others are refused."""
    if path.is_file():
        refuse_other_run(read_json(path), identity, path)
    else:
        path.write_text(json.dumps(identity), encoding="utf-8")


def likeliest_ids(texts: list[Text], vocab_size: int, count: int) -> npt.NDArray[np.int64]:
    """The ids the target expects most over all texts, ascending; the lowest ids where it expects too few."""
    mass = np.zeros(vocab_size)
    for text in texts:
        np.add.at(mass, text.expected.ids.reshape(-1), np.exp(text.expected.logprobs.astype(np.float64)).reshape(-1))
    order = np.argsort(-mass, kind="stable")[:count]
    return np.sort(order)


def initial_layers(num_layers: int, num_target_layers: int) -> list[int]:
    """The target's layers a student starts from: the first ones.

    For SmolLM2 two first layers end with more acceptance than the first and the last.
    """
    return [min(index, num_target_layers - 1) for index in range(num_layers)]


class _Training:
    """The student's two phases and their checkpoint."""

    def __init__(self, target: Target, device: str, texts: list[Text], options: DistillOptions, report: Report) -> None:
        source = target.source
        config = source.config
        self._options = options
        self._report = report
        own = [text for text in texts if not text.is_held_out]
        if len(own) in (0, len(texts)):
            raise ConfigurationError(
                f"--tokens {options.num_tokens} makes {len(texts)} texts, {len(texts) - len(own)} of them held out: "
                "too few to train on some and test on others. Their prompts decide which are, about one of 16. "
                f"Try --tokens {4 * options.num_tokens}; what is written by now is kept."
            )
        self._likeliest = partial(likeliest_ids, own, config.vocab_size)
        frozen = read_frozen(source, self._likeliest(options.head_size))
        course: Course[Any]
        if options.kind is DraftKind.HEADS:
            heads = Heads(config, options.num_layers, config.intermediate_size, frozen).to(device)
            course = HeadsCourse(
                heads, target, texts, options.seed, lambda done: report(Progress(READING, done, len(texts)))
            )
            self.student: Heads | Student = heads
        else:
            student = Student(config, options.num_layers, frozen, options.exit_layer)
            layers = initial_layers(options.exit_layer + options.num_layers, config.num_layers)
            student.load_state_dict(read_layers(source, layers))
            self.student = student.to(device)
            course = LayersCourse(student, texts, options)
            self._drafts = DraftWriter(student, target, own, options.row_tokens, options.seed)
        self._course = course
        self._learning_steps = max(1, round(options.epochs * len(course.epoch(0))))
        self._sharpening_steps = round(_SHARPENING_SHARE * self._learning_steps)
        self._trainer: Trainer[Any] = Trainer(
            self.student, course, options, self._learning_steps + options.on_policy_steps
        )
        self._path = options.work / "training.safetensors"
        self._run = {**options.of_weights(), "target": source.revision, "num_texts": len(texts)}
        self._measured: dict[str, dict[str, float]] = {}
        self._quality: Quality | None = None

    def go(self, began: float) -> Notes:
        """Both phases from wherever the checkpoint stands; what was measured, and the seconds of all runs."""
        found = load_checkpoint(self._path, self._trainer, self._run)
        self._began = began - (found.seconds if found else 0.0)
        self._measured = found.measured if found else {}
        if not found:
            self._measure("initial")
        self._saved = time.monotonic()
        self._learn(LEARNING, self._learning_steps - self._sharpening_steps, varied=False)
        self._learn(SHARPENING, self._learning_steps, varied=True)
        self._draft()
        self._keep()
        return self._notes()

    def _learn(self, phase: str, last: int, *, varied: bool) -> None:
        """On the target's texts up to step `last`; the epochs go on over phases."""
        trainer, first, epoch = self._trainer, 0, 0
        start = self._learning_steps - self._sharpening_steps if varied else 0
        while trainer.step < last:
            batches = self._course.epoch(epoch)
            for batch in batches[max(0, trainer.step - first) :]:
                if trainer.step >= last:
                    break
                loss = trainer.learn(batch, varied=varied)
                self._after_step(phase, loss, trainer.step - start, last - start)
            first, epoch = first + len(batches), epoch + 1
        if last > start and phase not in self._measured:
            self._measure(phase)

    def _draft(self) -> None:
        """Total variation, on texts and on drafts the student wrote into them."""
        trainer, steps = self._trainer, self._options.on_policy_steps
        while trainer.step < self._learning_steps + steps:
            done = trainer.step - self._learning_steps
            pieces = self._drafts.pieces(done, self._options.batch_rows)
            self._after_step(DRAFTING, trainer.learn(pieces, varied=True), done + 1, steps)
        if steps and DRAFTING not in self._measured:
            self._measure(DRAFTING)

    def _keep(self) -> None:
        """The likeliest ids only: output rows are most of what a guess reads, and the last ones are rarely right."""
        if self._options.kept_ids is not None:
            keep_ids(self.student, self._likeliest(self._options.kept_ids))
            self._measure(KEEPING)

    def _after_step(self, phase: str, loss: float, done: int, total: int) -> None:
        if done % max(1, total // _TESTS) == 0:
            self._quality = self._trainer.test()
        self._report(Progress(phase, done, total, loss, self._quality))
        if time.monotonic() - self._saved > self._options.checkpoint_s:
            self._save()

    def _measure(self, phase: str) -> None:
        """Note the held-out quality at the end of a phase."""
        self._quality = self._trainer.test()
        self._measured[phase] = asdict(self._quality)
        self._save()

    def _save(self) -> None:
        save_checkpoint(self._path, self._trainer, self._notes())
        self._saved = time.monotonic()

    def _notes(self) -> Notes:
        return Notes(self._run, self._measured, round(time.monotonic() - self._began, 1))
