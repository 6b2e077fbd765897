"""The proposers that exist, by name. A new one is one line here and one file."""

from __future__ import annotations

from importlib import import_module

from shared.engine.proposer import Proposer
from shared.errors import ConfigurationError
from shared.speculative.context import ProposerContext

PROPOSERS = {
    "suffix": "shared.speculative.suffix:make",
    "draft": "shared.speculative.draft_model:make",
    "heads": "shared.speculative.heads:make",
}


def load_proposer(name: str, context: ProposerContext) -> Proposer | None:
    """The proposer, or None where it has nothing to work with. Raises ConfigurationError for an unknown name."""
    if name not in PROPOSERS:
        raise ConfigurationError(f"unknown proposer {name!r}; known are {', '.join(sorted(PROPOSERS))}, or none")
    module, _, attribute = PROPOSERS[name].partition(":")
    proposer: Proposer | None = getattr(import_module(module), attribute)(context)
    return proposer
