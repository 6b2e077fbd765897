"""Guesses by repetition: what followed the same words before, in this text or in one of the same tenant's.

After Saxena, "Prompt Lookup Decoding" (2023), and Oliaro et al., "SuffixDecoding" (arXiv 2411.04975). A request's own
prompt and output are looked at first, then a bounded store of what requests of the same hash root (tenant, model,
adapter) were answered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field

from shared.engine.proposer import NO_DRAFT, Ask, Draft
from shared.engine.sequence import Sequence
from shared.speculative.context import ProposerContext
from shared.speculative.suffix_automaton import ROOT, SuffixAutomaton

MAX_OWN_TOKENS = 16384
MAX_STORED_TOKENS = 8192
"""Of one tenant, twice: a store that is full is kept beside a new one until that is full too."""

MAX_TENANTS = 4
_CATCH_UP = 512
"""Tokens read in one step at most, some 2 ms: a long prompt is read over several steps."""

_END = -1
"""Stands between two answers in a store; no token has this id, so nothing is continued across it."""


@dataclass(slots=True)
class _Match:
    """How far a sequence has been read against one store."""

    store: SuffixAutomaton
    num_read: int = 0
    state: int = ROOT
    length: int = 0


@dataclass(slots=True)
class _Reader:
    """What is kept for one sequence."""

    own: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    matches: list[_Match] = field(default_factory=list)


class TenantStore:
    """Recent answers of one tenant: the store being filled, and the one filled before."""

    def __init__(self) -> None:
        self.generations = [SuffixAutomaton()]

    def add(self, output: Sequence_[int]) -> None:
        """Keep an answer; the oldest ones go when there is no room."""
        output = output[-MAX_STORED_TOKENS:]
        if len(self.generations[0]) + len(output) + 1 > MAX_STORED_TOKENS:
            self.generations = [SuffixAutomaton(), self.generations[0]]
        for token in (*output, _END):
            self.generations[0].append(token)


class SuffixProposer:
    """Implements `shared.engine.proposer.Proposer`; costs next to nothing, and guesses only where something matches."""

    name = "suffix"

    def __init__(self) -> None:
        self._readers: dict[Sequence, _Reader] = {}
        self._stores: OrderedDict[bytes, TenantStore] = OrderedDict()

    def seconds(self, num_sequences: int) -> float:
        return 0.0

    def propose(self, asks: Sequence_[Ask]) -> list[Draft]:
        return [self._propose_one(ask) for ask in asks]

    def forget(self, sequence: Sequence) -> None:
        """The answer of a sequence that was followed here goes to its tenant's store."""
        if self._readers.pop(sequence, None) is None or not sequence.num_output:
            return
        store = self._stores.setdefault(sequence.hash_root, TenantStore())
        self._stores.move_to_end(sequence.hash_root)
        store.add(sequence.tokens[sequence.prompt_len :])
        while len(self._stores) > MAX_TENANTS:
            self._stores.popitem(last=False)

    def _propose_one(self, ask: Ask) -> Draft:
        reader = self._readers.setdefault(ask.sequence, _Reader())
        if not _read_own(reader.own, ask.sequence.tokens):
            return NO_DRAFT
        length, end = reader.own.repeated()
        text = reader.own
        for match in self._matches(reader, ask.sequence):
            _read_on(match, ask.sequence.tokens)
            if match.length > length and match.num_read == len(ask.sequence.tokens):
                length, end, text = match.length, match.store.end_of(match.state), match.store
        return _draft(text.continuation(end, ask.max_tokens), length) if length else NO_DRAFT

    def _matches(self, reader: _Reader, sequence: Sequence) -> list[_Match]:
        """One for each store of the tenant that holds something, begun anew where a store is new."""
        tenant = self._stores.get(sequence.hash_root)
        stores = tenant.generations if tenant else []
        known = {id(match.store): match for match in reader.matches}
        begin = max(0, len(sequence.tokens) - _CATCH_UP)
        reader.matches = [known.get(id(store)) or _Match(store, begin) for store in stores]
        return reader.matches


def make(context: ProposerContext) -> SuffixProposer:
    """For the registry."""
    return SuffixProposer()


def _read_own(own: SuffixAutomaton, tokens: list[int]) -> bool:
    """Read what is new of a sequence; False while it is behind, or when the sequence is too long to follow."""
    behind = len(tokens) - len(own)
    if len(tokens) > MAX_OWN_TOKENS:
        return False
    for token in tokens[len(own) : len(own) + _CATCH_UP]:
        own.append(token)
    return behind <= _CATCH_UP


def _read_on(match: _Match, tokens: list[int]) -> None:
    for token in tokens[match.num_read : match.num_read + _CATCH_UP]:
        match.state, match.length = match.store.advance(match.state, match.length, token)
    match.num_read = min(len(tokens), match.num_read + _CATCH_UP)


def _draft(tokens: list[int], length: int) -> Draft:
    """The longer the match, the surer its continuation; each token that turned out right would have made it longer."""
    if _END in tokens:
        tokens = tokens[: tokens.index(_END)]
    return Draft(tuple(tokens), tuple([(length + place) / (length + place + 2.0) for place in range(len(tokens))]))
