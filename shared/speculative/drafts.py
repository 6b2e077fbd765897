"""Which draft a worker guesses with, and how it is loaded for the proposers that compute one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shared.cores import core_share
from shared.engine.runner import NativeRunner, Runner, TorchRunner
from shared.kernels.library import Library, load_library
from shared.kv.cache import KVCache
from shared.kv.layout import KVLayout
from shared.model.decoder import Decoder
from shared.model.draft import DraftSource, is_for, resolve_draft
from shared.model.draft_kind import DraftKind
from shared.model.language_model import LanguageModel
from shared.model.native import NativeDecoder
from shared.model.native_draft import load_native_heads, load_native_layers
from shared.model.source import ModelSource
from shared.model.torch_draft import load_torch_heads, load_torch_layers
from shared.speculative.context import ProposerContext
from shared.speculative.draft_vocabulary import DraftVocabulary
from shared.speculative.heads_models import HeadsModel, HeadsOnKernels, HeadsOnTorch

AUTO, NONE = "auto", "none"
SHIPPED = Path(__file__).parent / "shipped"
"""Drafts that come with the package, a folder each; made by `slipstream distill`, with their recipes beside them."""


def find_draft(name: str, target: ModelSource) -> DraftSource | None:
    """The draft in the folder `name`; for `auto` the one that is shipped for this target, if there is one.

    Raises as `resolve_draft`.
    """
    if name == NONE:
        return None
    if name != AUTO:
        return resolve_draft(Path(name), target)
    shipped = (file.parent for file in sorted(SHIPPED.glob("*/config.json")))
    return next((resolve_draft(folder, target) for folder in shipped if is_for(folder, target)), None)


def open_layers(context: ProposerContext) -> tuple[Runner, DraftVocabulary] | None:
    """The worker's draft with a cache of as many blocks as the target has; None where it is of another kind."""
    draft, target = context.draft, context.model
    if draft is None or draft.kind is not DraftKind.LAYERS:
        return None
    layout = _layout(draft, context)
    if isinstance(target, NativeDecoder):
        decoder = load_native_layers(draft, context.source, target, _library(), layout, target.num_threads)
        return NativeRunner(decoder, KVCache(layout, context.num_blocks), core_share()), _vocabulary(draft)
    model = load_torch_layers(draft, context.source, _on_torch(target))
    device = str(target.device)
    return TorchRunner(model, KVCache(layout, context.num_blocks, device), device), _vocabulary(draft)


def open_heads(context: ProposerContext) -> HeadsModel | None:
    """The worker's heads; None where its draft is of another kind."""
    draft, target = context.draft, context.model
    if draft is None or draft.kind is not DraftKind.HEADS:
        return None
    if isinstance(target, NativeDecoder):
        heads = load_native_heads(
            draft, context.source, target, _library(), _layout(draft, context), target.num_threads
        )
        return HeadsOnKernels(heads, core_share())
    return HeadsOnTorch(load_torch_heads(draft, context.source, _on_torch(target)), _vocabulary(draft), target.device)


def _library() -> Library:
    library = load_library()
    assert library is not None, "the kernels compute the target"
    return library


def _layout(draft: DraftSource, context: ProposerContext) -> KVLayout:
    return replace(context.layout, num_layers=draft.num_layers)


def _on_torch(target: LanguageModel) -> Decoder:
    assert isinstance(target, Decoder), "models are computed by the kernels or by torch"
    return target


def _vocabulary(draft: DraftSource) -> DraftVocabulary:
    return DraftVocabulary(draft.head_ids, draft.config.vocab_size)
