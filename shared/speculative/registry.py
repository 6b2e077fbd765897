"""The proposers that exist, by name. A new one is one line here and one file."""

from __future__ import annotations

from importlib import import_module

from shared.engine.proposer import Proposer
from shared.errors import ConfigurationError

PROPOSERS = {
    "suffix": "shared.speculative.suffix:SuffixProposer",
}


def load_proposer(name: str) -> Proposer:
    """Raises ConfigurationError, with the known names, for an unknown one."""
    if name not in PROPOSERS:
        raise ConfigurationError(f"unknown proposer {name!r}; known are {', '.join(sorted(PROPOSERS))}, or none")
    module, _, attribute = PROPOSERS[name].partition(":")
    proposer: Proposer = getattr(import_module(module), attribute)()
    return proposer
