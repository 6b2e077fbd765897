"""Drafts the student writes by itself, for the target to judge: training on what drafting really looks like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shared.distill.rows import Draft, Piece, make_batch
from shared.distill.student import Student
from shared.distill.target import Target
from shared.distill.texts import Text

NUM_DRAFTS = 8
DRAFT_TOKENS = 8


class DraftWriter:
    """Pieces with fresh drafts of the student as it is now, judged by the target."""

    def __init__(self, student: Student, target: Target, texts: Sequence[Text], row_tokens: int, seed: int) -> None:
        self._student = student
        self._target = target
        self._texts = texts
        self._row_tokens = row_tokens
        self._seed = seed

    def pieces(self, step: int, count: int) -> list[list[Piece]]:
        """`count` rows of one text each; equal steps of equal students give equal drafts."""
        rng = np.random.default_rng([self._seed, 1, step])
        chosen = [self._texts[index] for index in rng.choice(len(self._texts), count, replace=len(self._texts) < count)]
        cuts = [self._cuts(text, rng) for text in chosen]
        written = iter(self._write(chosen, cuts, int(rng.integers(1 << 62))))
        return [[self._judged(text, at, [next(written) for _ in at])] for text, at in zip(chosen, cuts, strict=True)]

    def _cuts(self, text: Text, rng: np.random.Generator) -> list[int]:
        """Places in the generated part to draft from, as many as the row has room for."""
        places = np.arange(text.prompt_len, len(text.tokens))
        room = (self._row_tokens - len(text.tokens)) // DRAFT_TOKENS
        count = min(NUM_DRAFTS, room, len(places))
        return sorted(int(place) for place in rng.choice(places, count, replace=False))

    def _judged(self, text: Text, cuts: list[int], drafts: list[list[int]]) -> Piece:
        if not cuts:
            return Piece(text)
        expected = self._target.score(text.tokens.tolist(), cuts, drafts)
        rows = [slice(first * DRAFT_TOKENS, (first + 1) * DRAFT_TOKENS) for first in range(len(cuts))]
        parts = zip(cuts, drafts, rows, strict=True)
        return Piece(text, tuple(Draft(cut, draft, expected[at]) for cut, draft, at in parts))

    @torch.no_grad()
    def _write(self, texts: Sequence[Text], cuts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """Continue each text after each of its cuts by `DRAFT_TOKENS` tokens at temperature 1."""
        student, device = self._student, self._student.head.device
        owners = torch.tensor([row for row, at in enumerate(cuts) for _ in at], device=device)
        starts = torch.tensor([cut for at in cuts for cut in at], device=device)
        if not len(starts):
            return []
        generator = torch.Generator().manual_seed(seed)
        batch = make_batch([[Piece(text)] for text in texts], self._row_tokens, device)
        with torch.autocast(device.type, torch.bfloat16):
            hidden, cache = student(batch.token_ids, batch.positions, batch.mask)
            past = [(keys[owners], values[owners]) for keys, values in cache]
            last = hidden[owners, starts - 1]
            seen = torch.arange(self._row_tokens, device=device) < starts[:, None]
            drafts: list[torch.Tensor] = []
            for offset in range(DRAFT_TOKENS):
                probs = student.logits(last).softmax(-1).cpu()
                places = torch.multinomial(probs, 1, generator=generator)
                tokens = student.head_ids[places.to(device)]
                drafts.append(tokens)
                seen = torch.cat([seen, torch.ones_like(tokens, dtype=torch.bool)], 1)
                rows, past = student(tokens, (starts + offset)[:, None], seen[:, None], past)
                last = rows[:, 0]
        found: list[list[int]] = torch.cat(drafts, 1).tolist()
        return found
