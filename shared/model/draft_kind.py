"""The kinds of drafts, apart from what reads them: the command line names them before torch is loaded."""

from __future__ import annotations

from enum import StrEnum


class DraftKind(StrEnum):
    HEADS = "heads"
    """Feed-forward layers that go on from the target's own hidden rows."""

    LAYERS = "layers"
    """A small decoder with a cache of its own."""
