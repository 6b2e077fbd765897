"""Which draft a worker guesses with, and how it is loaded for the proposers that compute one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import structlog

from shared.kernels.library import load_library
from shared.model.draft import DraftSource, is_for, resolve_draft
from shared.model.draft_kind import DraftKind
from shared.model.native import NativeDecoder
from shared.model.native_draft import load_native_draft
from shared.model.source import ModelSource
from shared.speculative.context import ProposerContext

log = structlog.get_logger()

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


def open_draft(context: ProposerContext, kind: DraftKind) -> tuple[DraftSource, NativeDecoder] | None:
    """The worker's draft on the CPU kernels, if it is of this kind and they compute the target."""
    draft, library = context.draft, load_library()
    if draft is None or draft.kind is not kind:
        return None
    if not isinstance(context.model, NativeDecoder) or library is None:
        reason = "drafts are computed by the native kernels, and they do not compute the target"
        if draft.path.parent == SHIPPED:
            log.info("draft_not_used", reason=reason)
        else:
            log.warning(
                "draft_not_used",
                draft=str(draft.path),
                reason=reason,
                hint="start with --kernels native to see why, or without --draft",
            )
        return None
    layout = replace(context.layout, num_layers=draft.num_layers)
    model = load_native_draft(draft, context.source, context.model, library, layout, context.model.num_threads)
    return draft, model
