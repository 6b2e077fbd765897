"""Guesses by repetition: what followed the same words before, in this text or in one of the same tenant's.

After Saxena, "Prompt Lookup Decoding" (2023), and Oliaro et al., "SuffixDecoding" (arXiv 2411.04975). A request's own
prompt and output are looked at first, then a bounded store of what requests of the same hash root (tenant, model,
adapter) were answered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Sequence_

from shared.engine.proposer import NO_DRAFT, Ask, Draft
from shared.engine.sequence import Sequence
from shared.speculative.context import ProposerContext
from shared.speculative.token_text import LONGEST, TokenText

MAX_OWN_TOKENS = 16384
MAX_STORED_TOKENS = 16384
"""Of a request, and of one tenant's answers."""

MAX_TENANTS = 4

_END = -1
"""Stands between two answers in a store; no token has this id, so nothing is continued across it."""


class SuffixProposer:
    """Implements `shared.engine.proposer.Proposer`; costs next to nothing, and guesses only where something matches."""

    name = "suffix"

    def __init__(self) -> None:
        self._texts: dict[Sequence, TokenText] = {}
        self._stores: OrderedDict[bytes, TokenText] = OrderedDict()

    def seconds(self, num_sequences: int) -> float:
        return 0.0

    def reading_seconds(self, sequence: Sequence) -> float:
        return 0.0

    def propose(self, asks: Sequence_[Ask]) -> list[Draft]:
        return [self._propose_one(ask) for ask in asks]

    def forget(self, sequence: Sequence) -> None:
        """The answer of a sequence that was followed here goes to its tenant's store."""
        if self._texts.pop(sequence, None) is None or not sequence.num_output:
            return
        store = self._stores.setdefault(sequence.hash_root, TokenText(MAX_STORED_TOKENS))
        self._stores.move_to_end(sequence.hash_root)
        store.extend([*sequence.tokens[sequence.prompt_len :], _END])
        while len(self._stores) > MAX_TENANTS:
            self._stores.popitem(last=False)

    def _propose_one(self, ask: Ask) -> Draft:
        text = self._text_of(ask.sequence)
        length, place = text.repeated()
        store = self._stores.get(ask.sequence.hash_root)
        if store is not None and length < LONGEST:
            stored, where = store.find(text.ending())
            if stored > length:
                length, place, text = stored, where, store
        return _draft(text.continuation(place, ask.max_tokens), length) if length else NO_DRAFT

    def _text_of(self, sequence: Sequence) -> TokenText:
        """With all that is known of the sequence."""
        text = self._texts.get(sequence)
        if text is None:
            text = self._texts[sequence] = TokenText(MAX_OWN_TOKENS)
        text.extend(sequence.tokens[text.num_read :])
        return text


def make(context: ProposerContext) -> SuffixProposer:
    """For the registry."""
    return SuffixProposer()


def _draft(tokens: list[int], length: int) -> Draft:
    """The longer the match, the surer its continuation; each token that turned out right would have made it longer."""
    if _END in tokens:
        tokens = tokens[: tokens.index(_END)]
    return Draft(tuple(tokens), tuple([(length + place) / (length + place + 2.0) for place in range(len(tokens))]))
