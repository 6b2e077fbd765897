"""What a proposer may need to know of the worker that it guesses for."""

from __future__ import annotations

from dataclasses import dataclass

from shared.kv.layout import KVLayout
from shared.model.draft import DraftSource
from shared.model.language_model import LanguageModel
from shared.model.source import ModelSource


@dataclass(frozen=True, slots=True)
class ProposerContext:
    """The target, how its cache is laid out and how many blocks it has; the draft that was found for it."""

    source: ModelSource
    model: LanguageModel
    layout: KVLayout
    num_blocks: int
    draft: DraftSource | None = None
